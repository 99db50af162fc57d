"""How the C library's allocator treats the memory of freed tensors on a processor.

By default glibc gives the memory of a large tensor back to the system as soon as it is freed, and the kernel hands it
out again zeroed, page by page, for the next tensor of the same size: a step of a small network spends an eighth of its
time so (``python -m benchmarks.allocator``). Kept in the process, it costs nothing to use again. Values of tensors do
not depend on it.
"""

from __future__ import annotations

import ctypes
import os
import sys

# The names of glibc's malloc.h, and the variables that set the same from outside.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")

_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024  # bytes; glibc refuses more. Larger tensors still go back at once.
_KEPT = 128 * 1024 * 1024  # bytes of free memory at the end of the heap that stay in the process


def keep_freed_memory() -> bool:
    """Keep up to 128 MiB of freed memory in this process; returns whether it is so.

    Does nothing where glibc is not the C library (macOS, Windows, musl), or where the user's environment sets
    the allocator's thresholds.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = {_M_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD, _M_TRIM_THRESHOLD: _KEPT}
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings.items())
