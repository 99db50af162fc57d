"""Time of a round with freed memory kept in the process against the C library's own setting, and its cost in memory.

The setting cannot be undone in a process, so each measurement has a fresh one; the two sides take turns. Each trains
one round that is not counted and then the counted ones, without evaluation, on one network of four convolutions or on
the one that ``--model`` names.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.measure import ROOT, Spread, machine_options, peak_mb, set_up, timed
from cutlayer.runtime.ground.allocator import keep_freed_memory
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation


def run_once(options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the counted rounds and peak memory in MB, of this process."""
    if options.one == "kept" and not keep_freed_memory():
        raise RuntimeError("the allocator's setting was refused, or this is not glibc")
    federation = Federation(
        load_config(
            [
                "algorithm=fed_avg",
                f"model={options.model}",
                "dataset=synthetic",
                "dataset.options.channels=3",
                "dataset.options.height=32",
                "dataset.options.width=32",
                f"dataset.options.n_train={options.samples}",
                "num_clients=2",
                f"batch_size={options.batch}",
                f"precision={options.precision}",
                f"device={options.device}",
                "rounds=1000000",
                "eval_interval=1000000",
            ]
        )
    )
    federation.step()
    seconds, _ = timed(federation.setup.device, lambda: [federation.step() for _ in range(options.rounds)])
    return seconds.wall, peak_mb()


def in_fresh_process(side: str, options: argparse.Namespace) -> tuple[float, float]:
    """`run_once` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.allocator", "--one", side]
    for name in ("model", "samples", "batch", "rounds", "threads", "device", "precision"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak)


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure both sides alternately."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allocator", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="cnn4", help="default: cnn4")
    parser.add_argument("--samples", type=int, default=2000, help="training images 3x32x32 (default: 2000)")
    parser.add_argument("--batch", type=int, default=50, help="default: 50")
    parser.add_argument("--rounds", type=int, default=2, help="counted rounds of each process (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each side (default: 5)")
    parser.add_argument("--one", choices=("kept", "default"), help="one side in this process; prints seconds and MB")
    machine_options(parser)
    options = parser.parse_args(arguments)
    if options.one is not None:
        torch.set_num_threads(options.threads)
        show("{:.3f} {:.1f}".format(*run_once(options)))
        return 0
    show(f"{set_up(options)}; {options.repeats} repeats, median (min .. max)")
    pairs = [[in_fresh_process(side, options) for side in ("kept", "default")] for _ in range(options.repeats)]
    ratio = Spread.of([kept[0] / default[0] for kept, default in pairs])
    extra = Spread.of([kept[1] - default[1] for kept, default in pairs])
    show(f"{options.model}, {options.samples} images 3x32x32, batch {options.batch}")
    show(f"  ratio of time {ratio.show(digits=3)}, more memory {extra.show(digits=0, unit=' MB')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
