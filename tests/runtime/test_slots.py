"""A GPU's slot belongs to one living process; a machine with GPUs is played by a tool that lists them."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cutlayer.runtime.launching.sweeps.slots import VISIBLE, Gpu, gpu_slot, visible_gpus
from tests.places import ROOT

GPUS = [Gpu("GPU-a", "H100"), Gpu("GPU-b", "H100")]
# Takes a slot, says when and of which GPU, holds it for as long as it is told, and says when it lets go.
HOLD = """
import os, sys, time; from cutlayer.runtime.launching.sweeps.slots import gpu_slot
with gpu_slot(sys.argv[1], int(sys.argv[2]), lambda text: print("waiting", flush=True)) as gpu:
    print("took", gpu.uuid, os.environ["CUDA_VISIBLE_DEVICES"], time.monotonic(), flush=True)
    sys.stdin.readline() if sys.argv[3] == "asked" else time.sleep(float(sys.argv[3]))
    print("left", gpu.uuid, time.monotonic(), flush=True)
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``machine(listing)``: nvidia-smi lists this; slots lie in a folder of the test."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(VISIBLE, "")  # so that what a slot sets is undone
    monkeypatch.delenv(VISIBLE)

    def install(listing: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{listing}\nEND\n")
        tool.chmod(0o755)

    return install


TWO = "0, GPU-a, NVIDIA H100\n1, GPU-b, NVIDIA H100"


def hold(device: str = "cuda", jobs_per_gpu: int = 1, how_long: str = "asked") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, device, str(jobs_per_gpu), how_long]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)


def test_jobs_get_gpus_of_their_own_and_the_third_waits_until_one_dies(machine: Callable[[str], None]) -> None:
    machine(TWO)
    first, second = hold(), hold()
    taken = [line(first), line(second)]
    assert {gpu for _, gpu, _, _ in taken} == {"GPU-a", "GPU-b"}
    assert all(gpu == visible for _, gpu, visible, _ in taken)
    third = hold()
    assert line(third) == ["waiting"]
    first.send_signal(signal.SIGKILL)  # no cleaning up: the kernel gives the slot back
    assert line(third)[:2] == ["took", taken[0][1]]
    for process in (second, third):
        end(process)
    first.communicate()


def test_no_gpu_ever_has_more_jobs_than_slots(machine: Callable[[str], None]) -> None:
    machine(TWO)
    processes = [hold(jobs_per_gpu=2, how_long="0.3") for _ in range(7)]
    spans: dict[str, list[tuple[float, int]]] = {"GPU-a": [], "GPU-b": []}
    for process in processes:
        for words in (text.split() for text in process.communicate(timeout=120)[0].splitlines()):
            if words[0] != "waiting":
                spans[words[1]].append((float(words[-1]), 1 if words[0] == "took" else -1))
    assert sum(len(events) for events in spans.values()) == 2 * len(processes)
    for events in spans.values():
        assert max(itertools.accumulate(change for _, change in sorted(events))) <= 2


def test_jobs_spread_over_gpus_before_they_share_one(machine: Callable[[str], None]) -> None:
    machine(TWO)
    with gpu_slot("auto", 2, gpus=GPUS) as first, gpu_slot("auto", 2, gpus=GPUS) as second:
        assert {first, second} == set(GPUS)
        with gpu_slot("auto", 2, gpus=GPUS) as third:
            assert third in GPUS


def test_a_named_gpu_is_waited_for_and_the_others_stay_visible(machine: Callable[[str], None]) -> None:
    machine(TWO)
    with gpu_slot("cuda:1", gpus=GPUS) as gpu:
        assert gpu == GPUS[1]
        assert VISIBLE not in os.environ
        other = hold("cuda:1", how_long="0")
        assert line(other) == ["waiting"]
    other.communicate(timeout=60)


@pytest.mark.parametrize(("device", "gpus"), [("cpu", GPUS), ("auto", []), ("cuda", []), ("cuda:7", GPUS)])
def test_without_a_gpu_nothing_is_held(machine: Callable[[str], None], device: str, gpus: list[Gpu]) -> None:
    with gpu_slot(device, gpus=gpus) as gpu:
        assert gpu is None


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["GPU-aaa", "GPU-bbb", "GPU-ccc"]),
        ("", []),
        ("2,0", ["GPU-ccc", "GPU-aaa"]),
        ("GPU-bbb", ["GPU-bbb"]),
        ("GPU-c", ["GPU-ccc"]),
        ("1,7,0", ["GPU-bbb"]),
        ("-1", []),
        ("MIG-123", ["MIG-123"]),
    ],
)
def test_gpus_are_those_that_cuda_would_see(
    machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    machine("0, GPU-aaa, H100, 80 GB\n1, GPU-bbb, H100\n2, GPU-ccc, H100\n")
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    assert [gpu.uuid for gpu in visible_gpus()] == expected


def test_a_tool_that_fails_or_hangs_up_means_no_gpus(machine: Callable[[str], None]) -> None:
    machine("No devices were found")
    assert visible_gpus() == []


def test_a_slot_is_free_again_after_the_block_even_if_it_fails(machine: Callable[[str], None]) -> None:
    machine(TWO)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), gpu_slot("auto", gpus=GPUS[:1]):
            raise ZeroDivisionError
    with gpu_slot("auto", waiting=pytest.fail, gpus=GPUS[:1]) as gpu:
        assert gpu == GPUS[0]
