"""Freed memory stays in the process, seen by the kernel's own count of page faults."""

import os
import platform
import subprocess
import sys

import pytest

from cutlayer.runtime.ground import allocator

GLIBC = platform.libc_ver()[0] == "glibc"
needs_glibc = pytest.mark.skipif(not GLIBC, reason="the setting is glibc's")

# Thirty training steps of a small network; prints what was set, and the page faults of the last twenty-five.
STEPS = """
import resource, sys, torch
from torch import nn
from cutlayer.runtime.ground.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else False
layers = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()
network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 32 * 32, 10))
for step in range(30):
    if step == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    network(torch.ones(50, 3, 32, 32)).sum().backward()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def steps(side: str) -> tuple[bool, int]:
    """Whether the setting was made, and page faults, of the steps in a fresh process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", STEPS, side]
    done = subprocess.run(command, env=clean, check=True, capture_output=True, text=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@needs_glibc
def test_freed_memory_is_used_again() -> None:
    (kept, few), (_, many) = steps("kept"), steps("default")
    assert kept
    assert few * 3 < many


@needs_glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_thresholds_of_the_users_environment_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "131072")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("the library is asked for"))
    assert not allocator.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(allocator.ctypes, "CDLL", missing)
    assert not allocator.keep_freed_memory()
