"""What the benchmarks share: a clock that waits for the device, spreads of repeated measurements, common options."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from cutlayer.runtime.ground.process import Arithmetic, prepare_process
from cutlayer.runtime.settings import resolve_device

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of repeated measurements."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(min(values), statistics.median(values), max(values))

    def show(self, scale: float = 1.0, digits: int = 2, unit: str = "") -> str:
        """``median unit (low .. high)``, each multiplied by ``scale``."""
        low, middle, high = (f"{scale * value:.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{middle}{unit} ({low} .. {high})"


class Seconds(NamedTuple):
    """Wall seconds, and processor seconds of all of this process's threads, which other load disturbs less."""

    wall: float
    processor: float


def timed(device: torch.device, work: Callable[[], T]) -> tuple[Seconds, T]:
    """Time of ``work``, and its result. On a GPU: until everything that it enqueued has finished."""
    _synchronise(device)
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    _synchronise(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - processor), result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(process: int | str = "self") -> float:
    """Largest resident set of this process so far, or of another by its number, in MB (10^6 bytes); Linux only.

    Not ``getrusage``, whose figure a process inherits from the one that started it.
    """
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("this kernel does not report VmHWM")


def processor_seconds(process: int) -> float:
    """What another process has computed so far, by its number, in steps of a hundredth or so; Linux only."""
    spent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK")


def thread_seconds(process: int | str = "self") -> dict[str, float]:
    """What a process's threads have computed so far: ``main``, ``others`` of the same name, ``libraries``; Linux only.

    Threads that Python starts have the process's name, those of a library that names its threads another one.
    """
    folder = Path(f"/proc/{process}/task")
    own, main = Path(f"/proc/{process}/comm").read_text(), Path(f"/proc/{process}").resolve().name
    found = {"main": 0.0, "others": 0.0, "libraries": 0.0}
    for thread in folder.iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            same = (thread / "comm").read_text() == own
            kind = "main" if thread.name == main else "others" if same else "libraries"
            found[kind] += int((thread / "schedstat").read_text().split()[0]) / 1e9
    return found


def machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options on where and how to compute."""
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:k (default: cpu)")
    choices = ("fp32", "tf32", "bf16", "fp64")
    parser.add_argument("--precision", default="fp32", choices=choices, help="default: fp32")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the processor (default: 1)")


def set_up(options: argparse.Namespace) -> str:
    """Let this process compute as a run's does, with so many threads; returns one line on the machine and its load."""
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    prepare_process(device, Arithmetic(tf32=options.precision == "tf32"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return f"torch {torch.__version__}, {device.type} {name}, {options.precision}, {options.threads} threads, {load}"
