"""A sweep with two jobs at a time against the same one with one, and what the start of a job takes.

Jobs train a small network on the digits. Sweeps alternate, and jobs per time are counted from the first job's begin to
the last one's end. Processor seconds are those of all processes of a sweep.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import ROOT, Spread, machine_options, set_up
from cutlayer.datasets import partition_files
from cutlayer.runtime import experiment
from cutlayer.runtime.job import claim
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.launching.sweeps.sweep import Sweep
from cutlayer.runtime.records.results import Results
from cutlayer.runtime.rounds.federation import Federation

_KEYS = ("algorithm=fed_avg", "dataset=digits", "model=mlp", "num_clients=10", "batch_size=100", "progress=none")


class Taken(NamedTuple):
    """Seconds: from the first job's begin to the last one's end, of the whole command, of processors."""

    jobs: float
    wall: float
    processor: float


def sweep(jobs: int, at_a_time: int, rounds: int, options: argparse.Namespace, key: str = "lr") -> Taken:
    """Run a sweep of so many jobs, which differ in one key; needs Linux.

    Raises:
        RuntimeError: a job failed.
    """
    saves = Path(tempfile.mkdtemp(prefix="cutlayer-sweep-"))
    values = ",".join(str(number if key == "seed" else 0.001 * (1 + number)) for number in range(jobs))
    command = [sys.executable, str(ROOT / "main.py"), "-m", *_KEYS, f"{key}={values}", f"rounds={rounds}"]
    command += [f"save_dir={saves}", f"device={options.device}", f"hydra.launcher.n_jobs={at_a_time}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    try:
        counted = subprocess.run(
            [sys.executable, "-m", "benchmarks.counted", *command],
            cwd=ROOT,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        wall, processor = map(float, counted.stdout.split())
        (folder,) = (saves / "multirun").iterdir()
        states = [job for job, _ in Sweep(folder).jobs()]
    except (subprocess.CalledProcessError, ValueError) as error:
        raise RuntimeError("a job failed") from error
    finally:
        shutil.rmtree(saves, ignore_errors=True)
    return Taken(max(job.ended for job in states) - min(job.began for job in states), wall, processor)


def start_cost(options: argparse.Namespace, key: str) -> float:
    """Processor seconds that a sweep of jobs of one round takes more for each job."""
    few, many = (sweep(jobs, 1, 1, options, key).processor for jobs in (2, 2 + options.jobs))
    return (many - few) / options.jobs


def phases(options: argparse.Namespace) -> dict[str, float]:
    """Processor seconds of the parts of a job's run of one round, the second in a process with everything loaded."""
    context = multiprocessing.get_context("fork")
    queue: SimpleQueue[dict[str, float]] = context.SimpleQueue()
    process = context.Process(target=_time_run, args=(queue, options))
    process.start()
    found = queue.get()
    process.join()
    return found


def _time_run(queue: SimpleQueue[dict[str, float]], options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    spent: dict[str, float] = {}
    for owner, name, what in (
        (partition_files, "draw", "picture of the partition"),
        (experiment, "first_picture", "picture of the run"),
        (Federation, "__init__", "data, shares and model"),
        (Federation, "step", "the round"),
        (Results, "start", "configuration and environment"),
    ):
        setattr(owner, name, _counted(getattr(owner, name), what, spent))
    with tempfile.TemporaryDirectory() as saves:
        keys = [*_KEYS, "rounds=1", f"save_dir={saves}", f"device={options.device}"]
        for seed in (0, 1):
            config = load_config([*keys, f"seed={seed}"])
            spent.clear()
            began = time.process_time()
            with claim(config, keys) as folder:
                experiment.run(config, folder)
        spent["other files, checkpoint, table"] = time.process_time() - began - sum(spent.values())
    queue.put(spent)


def _counted(function: Callable[..., Any], what: str, spent: dict[str, float]) -> Callable[..., Any]:
    def counted(*arguments: Any, **more: Any) -> Any:
        began = time.process_time()
        try:
            return function(*arguments, **more)
        finally:
            spent[what] = spent.get(what, 0.0) + time.process_time() - began

    return counted


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure sweeps with one and with two jobs at a time alternately, then what a job's start takes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=10, help="of a sweep (default: 10)")
    parser.add_argument("--rounds", type=int, default=100, help="of each job (default: 100)")
    parser.add_argument("--at-a-time", type=int, default=2, help="default: 2")
    parser.add_argument("--repeats", type=int, default=3, help="sweeps of each side (default: 3)")
    machine_options(parser)
    options = parser.parse_args(arguments)
    show(f"{set_up(options)}; {options.repeats} repeats, median (min .. max)")
    ratios, whole = list[float](), list[float]()
    for repeat in range(options.repeats):
        sides = (1, options.at_a_time) if repeat % 2 else (options.at_a_time, 1)
        taken = {side: sweep(options.jobs, side, options.rounds, options) for side in sides}
        one, several = taken[1], taken[options.at_a_time]
        ratios.append(one.jobs / several.jobs)
        whole.append(one.wall / several.wall)
    show(f"{options.jobs} jobs of {options.rounds} rounds, {options.at_a_time} at a time over one at a time:")
    show(f"  {Spread.of(ratios).show()} times the jobs; whole commands, loading included, {Spread.of(whole).show()}")
    for key, shared in (("seed", "the data of their clients differ"), ("lr", "their clients have the same data")):
        cost = Spread.of([start_cost(options, key) for _ in range(options.repeats)])
        show(f"a job of one round takes {cost.show(unit=' s')} of a processor where {shared}")
    parts = phases(options)
    show(f"of which in its own process {sum(parts.values()):.2f} s, with a picture of its own partition:")
    for what, seconds in sorted(parts.items(), key=lambda each: -each[1]):
        show(f"  {seconds:.3f} s  {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
