"""Rounds with several workers against those of one process: the same run in both, alternating, to the same bits.

The time is that of ``Federation.step`` without evaluation, as in ``round_time``, or with ``--fine-tuning`` that in
which every client fine-tunes the model and is tested, with what it writes. Each process has one thread.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from benchmarks.measure import Spread, machine_options, set_up, timed
from cutlayer.runtime.after.personalize import Personalized, personalize
from cutlayer.runtime.ground import forking
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.local_clients import LocalClients
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from cutlayer.runtime.workers import processes
from cutlayer.runtime.workers.clients import WorkerClients

CASES = {
    "cnn2": ("model=cnn2", "num_clients=50", "batch_size=10", *("n_train=2500", "channels=1", "height=28", "width=28")),
    "resnet18": ("model=resnet18", "num_clients=10", "batch_size=64", *("n_train=2560", "channels=3")),
    "tiny": ("model=mlp", "num_clients=3", "batch_size=10", *("n_train=60", "channels=1", "height=8", "width=8")),
}


def settings(case: str, algorithm: str, options: argparse.Namespace) -> list[str]:
    """The keys of a run that has no end."""
    own = [key if key.split("=")[0] in _KEYS else f"dataset.options.{key}" for key in CASES[case]]
    machine = [f"device={options.device}", f"precision={options.precision}", f"threads={options.threads}"]
    return [f"algorithm={algorithm}", "dataset=synthetic", *own, *machine, "rounds=1000000", "eval_interval=1000000"]


FINE_TUNING = PersonalizeConfig("full", 1, 0.001)
_KEYS = {"model", "num_clients", "batch_size"}


def compare(case: str, algorithm: str, count: int, options: argparse.Namespace) -> tuple[str, bool]:
    """The ratio of rounds, or of fine-tuning, in the same time, for each engine, and whether all came to the same."""
    keys = settings(case, algorithm, options)
    with ExitStack() as stack:
        sides = {"alone": Federation(load_config(keys), clients=LocalClients)}
        for engine in options.engine:
            of = load_config([*keys, f"workers={count}", f"engine={engine}"])
            sides[engine] = Federation(of, clients=WorkerClients)
            stack.callback(_close, sides[engine])
        device, seconds = sides["alone"].setup.device, list[dict[str, float]]()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found: dict[str, list[Personalized]] = {name: [] for name in sides}

        def work(name: str) -> None:
            if options.fine_tuning:
                found[name].append(personalize(sides[name], FINE_TUNING, folder / name))
            else:
                sides[name].step()

        for side in sides.values():
            side.step()  # workers start, caches settle
        for repeat in range(options.repeats):
            order = [*sides] if repeat % 2 else [*reversed(sides)]
            seconds.append({name: timed(device, partial(work, name))[0].wall for name in order})
        states = [side.server.ctx.dump(*side.server.ctx.shared) for side in sides.values()]
    same = all(_equal(states[0], state) for state in states[1:]) and all(
        each == found["alone"] for each in found.values()
    )
    ratios = {engine: Spread.of([each["alone"] / each[engine] for each in seconds]).show() for engine in options.engine}
    given = ", ".join(f"{ratio} ({engine})" for engine, ratio in ratios.items())
    bits, what = "same bits" if same else "OTHER BITS", "fine-tuning" if options.fine_tuning else "rounds"
    return f"{case} {algorithm}: {count} workers give {given} times the {what} of one process, {bits}", same


def _equal(one: Payload, other: Payload) -> bool:
    return all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


def _close(side: Federation) -> None:
    assert isinstance(side.clients, WorkerClients)
    side.clients.close()


def _bare(case: str, options: argparse.Namespace, ready: Barrier, seconds: Queue[float]) -> None:
    """Rounds of a run of its own, begun when all others are ready; the seconds that they took."""
    torch.set_num_threads(options.threads)
    run = Federation(load_config(settings(case, "fed_avg", options)))
    run.step()
    ready.wait()
    seconds.put(timed(run.setup.device, lambda: [run.step() for _ in range(options.repeats)])[0].wall)


def ceiling(case: str, count: int, options: argparse.Namespace) -> float:
    """How many times the rounds of one run ``count`` runs that have nothing in common give on this machine at once."""
    context, took = forking.server(processes.__name__), dict[int, float]()
    for runs in (1, count):
        ready, seconds = context.Barrier(runs), context.Queue()
        started = [context.Process(target=_bare, args=(case, options, ready, seconds)) for _ in range(runs)]
        for process in started:
            process.start()
        took[runs] = max(seconds.get() for _ in started)
        for process in started:
            process.join()
    return count * took[1] / took[count]


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure the cases that the options name; exit status 1 if the weights of any differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=["cnn2", "resnet18"], help="default: both")
    parser.add_argument("--algorithm", nargs="+", default=["fed_avg"], help="default: fed_avg")
    parser.add_argument("--workers", nargs="+", type=int, default=[2], help="default: 2")
    engines = ("processes", "ray")
    parser.add_argument("--engine", nargs="+", choices=engines, default=["processes"], help="default: processes")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds of each side (default: 7)")
    parser.add_argument("--fine-tuning", action="store_true", help="fine-tuning after a round, in place of rounds")
    parser.add_argument("--ceiling", action="store_true", help="also run as many runs of their own at once")
    machine_options(parser)
    options = parser.parse_args(arguments)
    show(f"{set_up(options)}; {options.repeats} repeats, median (min .. max)")
    agreed = True
    for case in options.case:
        for count in options.workers if options.ceiling else ():
            show(f"{case}: {count} runs at once give {ceiling(case, count, options):.2f} times the rounds of one")
        for algorithm in options.algorithm:
            for count in options.workers:
                line, same = compare(case, algorithm, count, options)
                show(line)
                agreed &= same
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
