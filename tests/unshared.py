"""Namespaces of the kernel of a test's own, which end with the test and everything in them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


def first_process(kinds: Sequence[str], script: str) -> tuple[subprocess.Popen[str], str]:
    """Start a shell script as the first process of new namespaces; returns once it has printed "ready".

    Args:
        kinds: options of ``unshare``; ``--pid`` among them, so that the kernel ends everything with that process.

    Returns:
        The process to kill, and the number of the script's own, for ``nsenter``.
    """
    process = subprocess.Popen(
        ["unshare", *kinds, "--fork", "--kill-child=KILL", "--mount-proc", "bash", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n", "the namespaces were not made"
    except BaseException:
        process.kill()
        process.communicate()
        raise
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return process, children.read_text().split()[0]
