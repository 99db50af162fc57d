"""Peak resident memory with a small and with a large population, each in a fresh process, at one cohort size.

The training set is the same in both, so that only the number of clients differs. A run loads the data, divides it,
trains a few rounds and evaluates once. With ``disk`` it also does what a run does in its folder: it saves the table and
the picture of the partition, writes a checkpoint every other round, and keeps state of clients beyond ``--store-mb`` in
files. The import of torch and the other libraries is in the figures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.measure import ROOT, machine_options, peak_mb, set_up
from cutlayer.datasets.partition_files import save_partition
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation

ALGORITHMS = ("fed_avg", "scaffold", "fsl_sage")
TARGET_MB = 100.0


def run_once(algorithm: str, clients: int, disk: bool, options: argparse.Namespace) -> float:
    """Run in this process; returns its peak in MB."""
    config = load_config(
        [
            f"algorithm={algorithm}",
            "model=mlp",
            "dataset=synthetic",
            f"dataset.options.n_train={options.samples}",
            "dataset.options.height=8",
            "dataset.options.width=8",
            f"num_clients={clients}",
            f"frac={min(1.0, options.cohort / clients)}",
            f"rounds={options.rounds}",
            f"eval_interval={options.rounds}",
            f"state_memory_mb={options.store_mb}",
            f"device={options.device}",
            f"precision={options.precision}",
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(config, Path(folder) if disk else None)
        if disk:
            labels, info = federation.setup.dataset.train.labels, federation.setup.dataset.info
            save_partition(Path(folder), federation.setup.partition, labels, info.classes, info.class_names)
        federation.resume()
        while not federation.done:
            federation.step()
            if disk and federation.round % 2 == 0:
                federation.checkpoint({})
    return peak_mb()


def in_fresh_process(algorithm: str, clients: int, disk: bool, options: argparse.Namespace) -> float:
    """The peak of a process of its own, in MB."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", str(clients), "--algorithm", algorithm]
    for name in ("samples", "cohort", "rounds", "store_mb", "threads", "device", "precision"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--disk", "yes" if disk else "no"]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def compare(algorithm: str, disk: bool, options: argparse.Namespace) -> str:
    """The line of one algorithm: the peaks of both populations, and their difference against the target."""
    few, many = (in_fresh_process(algorithm, clients, disk, options) for clients in options.clients)
    verdict = "met" if abs(many - few) <= TARGET_MB else "MISSED"
    return (
        f"  {algorithm:<9} {'disk' if disk else 'memory':<7} {few:7.0f} MB  {many:7.0f} MB  "
        f"difference {many - few:+.0f} MB, ratio {many / few:.3f}, target {TARGET_MB:.0f} MB {verdict}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--algorithm", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help="default: all")
    parser.add_argument("--clients", nargs=2, type=int, default=[1_000, 100_000], help="default: 1000 100000")
    parser.add_argument("--cohort", type=int, default=50, help="clients in a round (default: 50)")
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    parser.add_argument("--samples", type=int, default=200_000, help="training images, 1x8x8 (default: 200000)")
    parser.add_argument("--disk", choices=("no", "yes", "both"), default="both", help="with a run's folder or without")
    parser.add_argument("--store-mb", type=float, default=8.0, help="client state in memory, with disk (default: 8 MB)")
    parser.add_argument("--one", type=int, metavar="CLIENTS", help="one run in this process; prints its peak in MB")
    machine_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure the algorithms that the options name."""
    options = _parser().parse_args(arguments)
    if options.one is not None:
        torch.set_num_threads(options.threads)
        show(f"{run_once(options.algorithm[0], options.one, options.disk == 'yes', options):.1f}")
        return 0
    few, many = options.clients
    show(set_up(options))
    show(
        f"{options.samples} images, {options.cohort} clients in each of {options.rounds} rounds: {few}, {many} clients"
    )
    for algorithm in options.algorithm:
        for disk in {"no": (False,), "yes": (True,), "both": (False, True)}[options.disk]:
            show(compare(algorithm, disk, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
