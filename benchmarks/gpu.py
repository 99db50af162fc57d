"""What only a GPU shows: every method learns there as on a processor, and the paper's comparison at full width.

`methods` runs every method on scikit-learn's digits on the processor and on the GPU, there in fp32 and in bf16, each
twice. `paper` runs methods of `experiment=fsl_sage/cifar10_iid` side by side on one GPU until the time is over, and
prints accuracy against communication so far; CIFAR-10 is read from a folder of images. Both stop by themselves.
"""

from __future__ import annotations

import argparse
import csv
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import cutlayer.algorithms as algorithms
from benchmarks.measure import ROOT, machine_options, set_up
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.process import prepare_process
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation

DIGITS = (
    *("dataset=digits", "model=cnn2", "num_clients=2", "batch_size=32", "rounds=5", "eval_interval=1000"),
    *("optimizer=sgd", "lr=0.1"),
)
# SGD at that rate does not fit gradients, and a client that follows a random model ends anywhere.
MORE = {"fsl_sage": ("model.auxiliary.optimizer.name=adam", "model.auxiliary.optimizer.lr=0.001")}
GB = 1e9


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
    prepare_process(torch.device(options.device))
    show(f"{'method':<18} {'cpu':>8}  {'gpu fp32':>8} {'a round':>9} {'twice':>10}  {'gpu bf16':>8}")
    failed = 0
    for name in options.algorithm or algorithms.names():
        try:
            show(method(name, options.device))
        except (ConfigError, RuntimeError) as error:
            failed += 1
            show(f"{name:<18} {type(error).__name__}: {str(error).splitlines()[0]}")
    return failed


def curve(metrics: Path) -> list[tuple[int, float, float]]:
    """Round, test accuracy and gigabytes (10^9 bytes) so far, by evaluated round."""
    if not metrics.is_file():
        return []
    with metrics.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["test_acc"]]
    return [(int(row["round"]), float(row["test_acc"]), float(row["comm_load"]) / GB) for row in rows]


def paper(options: argparse.Namespace, show: Callable[[str], None]) -> int:
    """Run the methods side by side for the given time; what each reached, every few rounds."""
    saves = Path(options.saves).absolute()
    runs: dict[str, subprocess.Popen[bytes]] = {}
    for name in options.algorithm or ("fsl_sage", "cse_fsl"):
        command = [
            *(sys.executable, "main.py", "experiment=fsl_sage/cifar10_iid", f"algorithm={name}"),
            *("dataset=image_folder", f"dataset.root={Path(options.data).absolute()}", f"device={options.device}"),
            *(f"precision={options.precision}", f"save_dir={saves / name}", "progress=none", *options.set),
        ]
        log = (saves / f"{name}.log").open("wb")
        runs[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        log.close()
    end = time.monotonic() + options.seconds
    while time.monotonic() < end and any(run.poll() is None for run in runs.values()):
        time.sleep(1)
    for run in runs.values():
        run.send_signal(signal.SIGINT)
    failed = 0
    for name, run in runs.items():
        try:
            run.wait(60)
        except subprocess.TimeoutExpired:
            run.kill()
        found = [point for path in sorted((saves / name).rglob("metrics.csv")) for point in curve(path)]
        show(f"{name}: {len(found)} rounds in {options.seconds} s")
        for number, accuracy, gigabytes in found:
            if number % options.every == 0 or number == found[-1][0]:
                show(f"  round {number:>4}  {accuracy:7.2%}  {gigabytes:8.2f} GB")
        if not found:
            failed += 1
            show(f"  nothing was evaluated; see {saves / name}.log")
    return failed


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Run one of the two; exit status 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("methods", "paper"))
    parser.add_argument("--algorithm", nargs="+", help="default: all; of the paper fsl_sage and cse_fsl")
    parser.add_argument("--data", default="data/cifar10_images", help="folder with train/<class>/*.jpg and test/")
    parser.add_argument("--saves", default="saves/gpu", help="where the paper's runs go (default: saves/gpu)")
    parser.add_argument("--seconds", type=int, default=600, help="how long the paper's runs take (default: 600)")
    parser.add_argument("--every", type=int, default=10, help="rounds from one printed line to the next (default: 10)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more keys of the paper's runs")
    machine_options(parser)
    options = parser.parse_args(arguments)
    show(set_up(options))
    if options.what == "methods":
        return min(1, methods(options, show))
    Path(options.saves).mkdir(parents=True, exist_ok=True)
    return min(1, paper(options, show))


if __name__ == "__main__":
    sys.exit(main())
