"""Runs a command, and prints its seconds and those that processors spent on all of its processes; Linux only.

A program of its own, which has no other processes: those of the command whose parent ends become its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import sys
import time

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <linux/prctl.h>


def main(command: list[str]) -> int:
    """Run it, wait for all that it leaves behind, and print the two figures; its exit status."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    began = time.perf_counter()
    status = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    wall = time.perf_counter() - began
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(wall, used.ru_utime + used.ru_stime)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
