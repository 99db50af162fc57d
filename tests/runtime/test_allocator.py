"""Freed memory stays in the process, seen by the kernel's own count of page faults."""

import os
import platform
import subprocess
import sys

import pytest

GLIBC = platform.libc_ver()[0] == "glibc"
needs_glibc = pytest.mark.skipif(not GLIBC, reason="the setting is glibc's")

# Six tensors of 16 MB live together and are freed, ten times; prints what was set, and the faults of the last nine.
CYCLES = """
import resource, sys, torch
from runtime.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else False
for cycle in range(10):
    if cycle == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(4_000_000) for _ in range(6)]
    del tensors
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def cycles(side: str, **variables: str) -> tuple[bool, int]:
    """Whether the setting was made, and page faults of nine cycles, in a fresh process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", CYCLES, side]
    done = subprocess.run(command, env=clean | variables, check=True, capture_output=True, text=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@needs_glibc
def test_freed_memory_is_used_again() -> None:
    (kept, few), (_, many) = cycles("kept"), cycles("default")
    assert kept
    assert few * 10 < many


@needs_glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_thresholds_of_the_users_environment_are_left_alone(name: str) -> None:
    kept, _ = cycles("kept", **{name: "131072"})
    assert not kept


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import allocator

    def missing(name: str) -> object:
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(allocator.ctypes, "CDLL", missing)
    assert not allocator.keep_freed_memory()
