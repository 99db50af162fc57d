"""What only a GPU shows: every method learns there as on a processor, how fast, and the paper's comparison.

`methods` runs every method on scikit-learn's digits on the processor and on the GPU, there in fp32 and in bf16, each
twice. `paper` runs the five methods of `experiment=fsl_sage/algorithms` on one GPU, two side by side and FSL-SAGE and
CSE-FSL first, until all have gone through their 200 rounds or the time is over. It prints accuracy against
communication so far, and what each needed for some accuracies beside the published figures; given again it goes on from
the last checkpoints. `speed` measures rounds against a bare loop and against the card's matmul peak, see
`benchmarks.speed`. All stop by themselves.
"""

from __future__ import annotations

import argparse
import csv
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import cutlayer.algorithms as algorithms
from benchmarks.measure import ROOT, machine_options, set_up
from benchmarks.speed import speed
from cutlayer.datasets.registry import read
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation

DIGITS = (
    *("dataset=digits", "model=cnn2", "num_clients=2", "batch_size=32", "rounds=5", "eval_interval=1000"),
    *("optimizer=sgd", "lr=0.1"),
)
# SGD at that rate does not fit gradients, and a client that follows a random model ends anywhere.
MORE = {"fsl_sage": ("model.auxiliary.optimizer.name=adam", "model.auxiliary.optimizer.lr=0.001")}
# What the paper reports for 81% test accuracy: GiB, and the rounds that these are; in the order in which they are run.
PUBLISHED = {
    "fsl_sage": (12.2, 89),
    "cse_fsl": (26.0, 91),
    "sl_multi_server": (60.2, 74),
    "fed_avg": (70.0, 84),  # with one server part that all clients share
    "sl_single_server": (109.1, 134),
}
LEVELS = (0.70, 0.75, 0.78, 0.80, 0.81)
GIB = 2**30


def play(name: str, device: str, precision: str) -> tuple[Federation, float, float]:
    """A run of a method on the digits: its end, its accuracy, and wall seconds a round after the first."""
    overrides = (f"algorithm={name}", *DIGITS, *MORE.get(name, ()), f"device={device}", f"precision={precision}")
    federation = Federation(load_config(overrides))
    federation.step()
    start = time.perf_counter()
    while not federation.done:
        federation.step()
    accuracy = federation.evaluate().accuracy  # on a GPU this waits for what was enqueued
    return federation, accuracy, (time.perf_counter() - start) / (federation.round - 1)


def learnt(federation: Federation) -> dict[str, Tensor]:
    """The weights of the server's parts."""
    parts = federation.server.ctx.parts
    return {f"{name}/{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


def method(name: str, device: str) -> str:
    """One line on a method: accuracy on the processor and on the GPU, whether the GPU repeats itself, seconds."""
    _, expected, _ = play(name, "cpu", "fp32")
    columns = [f"{name:<18} {expected:8.2%}"]
    for precision in ("fp32", "bf16"):
        (first, accuracy, seconds), (second, _, _) = (play(name, device, precision) for _ in range(2))
        one, two = learnt(first), learnt(second)
        same = all(torch.equal(one[key], two[key]) for key in one)
        columns.append(f"{accuracy:8.2%} {seconds:7.2f} s {'same bits' if same else 'OTHER BITS':>10}")
    return "  ".join(columns)


def methods(options: argparse.Namespace, show: Callable[[str], None]) -> int:
    """A table of all methods; the number of those that failed."""
    show(f"{'method':<18} {'cpu':>8}  {'gpu fp32':>8} {'a round':>9} {'twice':>10}  {'gpu bf16':>8}")
    failed = 0
    for name in options.algorithm or algorithms.names():
        try:
            show(method(name, options.device))
        except (ConfigError, RuntimeError) as error:
            failed += 1
            show(f"{name:<18} {type(error).__name__}: {str(error).splitlines()[0]}")
    return failed


Point = tuple[int, float, float]
"""Round, test accuracy, and bytes so far, labels included."""


def curve(metrics: Path) -> list[Point]:
    """The points of a run, by evaluated round."""
    if not metrics.is_file():
        return []
    with metrics.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["test_acc"]]
    return [(int(row["round"]), float(row["test_acc"]), float(row["comm_load"])) for row in rows]


def prepare_data(folder: str | None) -> tuple[str, ...]:
    """The keys of CIFAR-10: a folder or zip of images, or None for torchvision's files, downloaded if need be.

    Raises:
        ConfigError: there are no such images.
    """
    if folder is None:
        root = ROOT / "data"
        read("cifar10", root, {}, 0)
        return "dataset=cifar10", f"dataset.root={root}"
    if not Path(folder).exists():
        raise ConfigError("--data", folder, "a folder or a zip file with train/<class>/ and test/<class>/ in it")
    return "dataset=image_folder", f"dataset.root={Path(folder).absolute()}"


def start(name: str, data: Sequence[str], options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Begin a method's run, or go on with it; what it prints is in a file beside its folder."""
    saves = Path(options.saves).absolute()
    command = [
        *(sys.executable, "main.py", "experiment=fsl_sage/cifar10_iid", f"algorithm={name}", *data),
        *(f"device={options.device}", f"precision={options.precision}", f"save_dir={saves / name}", "progress=none"),
        *options.set,
    ]
    with (saves / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def run_for(names: Sequence[str], data: Sequence[str], options: argparse.Namespace) -> dict[str, int]:
    """Run the methods in this order, some side by side, until all are over or the time is.

    Returns:
        The exit status of those that came to their end, in whatever way, before that.
    """
    end, waiting, ended = time.monotonic() + options.seconds, list(names), dict[str, int]()
    running = dict[str, subprocess.Popen[bytes]]()
    try:
        while time.monotonic() < end and (waiting or running):
            for name in [name for name, run in running.items() if run.poll() is not None]:
                ended[name] = running.pop(name).returncode
            while waiting and len(running) < options.together:
                running[waiting[0]] = start(waiting[0], data, options)
                del waiting[0]
            time.sleep(0.2)
    finally:
        for run in running.values():
            run.send_signal(signal.SIGINT)
        for run in running.values():
            try:
                run.wait(60)
            except subprocess.TimeoutExpired:
                run.kill()
    return ended


def first(points: Sequence[Point], accuracy: float) -> Point | None:
    """The first point with this accuracy or more."""
    return next((point for point in points if point[1] >= accuracy), None)


def show_levels(curves: Mapping[str, Sequence[Point]], show: Callable[[str], None]) -> None:
    """What each method needed for some accuracies, and what is published for the last of them."""
    show(f"{'needed for':<18}" + "".join(f"{level:>21.0%}" for level in LEVELS) + f"{'published for 81%':>24}")
    for name, points in curves.items():
        cells = []
        for level in LEVELS:
            found = first(points, level)
            cells.append("-" if found is None else f"{found[2] / GIB:.2f} GiB, r. {found[0]}")
        gib, number = PUBLISHED.get(name, (float("nan"), 0))
        show(f"{name:<18}" + "".join(f"{cell:>21}" for cell in cells) + f"{f'{gib} GiB, r. {number}':>24}")


def paper(options: argparse.Namespace, show: Callable[[str], None]) -> int:
    """Run the methods for the given time; what each reached every few rounds, and beside what is published."""
    saves, names = Path(options.saves).absolute(), options.algorithm or tuple(PUBLISHED)
    saves.mkdir(parents=True, exist_ok=True)
    try:
        data = prepare_data(options.data)
    except ConfigError as error:
        show(str(error))
        return 1
    ended = run_for(names, data, options)
    curves: dict[str, list[Point]] = {}
    for name in names:
        found = [point for path in sorted((saves / name).rglob("metrics.csv")) for point in curve(path)]
        show(f"{name}: {len(found)} rounds in {options.seconds:g} s")
        for number, accuracy, sent in found:
            if number % options.every == 0 or number == found[-1][0]:
                show(f"  round {number:>4}  {accuracy:7.2%}  {sent / GIB:8.2f} GiB")
        if ended.get(name):
            show(f"  it failed: see {saves / name}.log")
        curves[name] = found
    show_levels(curves, show)
    return int(any(ended.values()) or not curves[names[0]])


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Run one of the three; exit status 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("methods", "paper", "speed"))
    parser.add_argument("--algorithm", nargs="+", help="default: all; of the paper its five")
    images = "CIFAR-10 as a folder or zip of images, train/<class>/ and test/<class>/"
    parser.add_argument("--data", help=f"{images} (default: torchvision's files in data/, downloaded if need be)")
    parser.add_argument("--saves", default="saves/gpu", help="where the paper's runs go (default: saves/gpu)")
    longest = "how long the paper's runs take, or the measurement of speed (default: 720, and 600)"
    parser.add_argument("--seconds", type=float, default=None, help=longest)
    parser.add_argument("--quick", action="store_true", help="speed in at most 150 s")
    parser.add_argument("--together", type=int, default=2, help="how many of them side by side (default: 2)")
    parser.add_argument("--every", type=int, default=10, help="rounds from one printed line to the next (default: 10)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more keys of the runs")
    machine_options(parser)
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 600 if options.what == "speed" else 720
    show(set_up(options))
    return min(1, {"methods": methods, "paper": paper, "speed": speed}[options.what](options, show))


if __name__ == "__main__":
    sys.exit(main())
