"""Share of a round's wall time that evaluation on the test set takes, when every round is evaluated.

Training and evaluation are timed one after the other on the same model; on a GPU each waits for the device, so that
work enqueued by one is not charged to the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.measure import Spread, machine_options, set_up, timed
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation


@dataclass(frozen=True)
class Case:
    """A setting: what it is, and the keys given to ``main.py``. ``rounds`` are measured if the options say nothing."""

    title: str
    keys: tuple[str, ...]
    rounds: int


CASES = {
    "digits": Case("the default run (digits): 1,437 training and 360 test images of 1x8x8", (), 20),
    "mnist": Case(
        "the default run on data of MNIST's size: 60,000 training and 10,000 test images of 1x28x28",
        ("dataset=synthetic", "dataset.options.n_train=60000", "dataset.options.n_test=10000"),
        1,
    ),
    "tiny": Case(
        "tiny: fed_avg, mlp, 100 training and 20 test images",
        (
            "algorithm=fed_avg",
            "dataset=synthetic",
            "dataset.options.n_train=100",
            "dataset.options.n_test=20",
            "num_clients=2",
        ),
        2,
    ),
}


def measure(case: Case, options: argparse.Namespace) -> str:
    """The line of one case: seconds of training and of evaluation per round, and the share of the latter."""
    keys = (*case.keys, f"device={options.device}", f"precision={options.precision}")
    federation = Federation(load_config([*keys, "rounds=1000000", "eval_interval=1000000"]))
    federation.evaluate()  # lets caches and the allocator settle
    training: list[float] = []
    evaluating: list[float] = []
    for _ in range(options.rounds or case.rounds):
        training.append(timed(federation.setup.device, federation.step)[0].wall)
        evaluating.append(timed(federation.setup.device, federation.evaluate)[0].wall)
    # Rounds differ in work (an alignment every tenth): the share is that of all rounds together.
    share = sum(evaluating) / (sum(training) + sum(evaluating))
    times = (Spread.of(seconds).show(1e3, 1, " ms") for seconds in (training, evaluating))
    return (
        f"{federation.setup.config.algorithm_name}, {federation.setup.config.model.name}: "
        + "training {}  evaluation {}  ratio {:.1%} of a round".format(*times, share)
    )


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure the cases that the options name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=["digits", "mnist"], help="default: digits mnist")
    parser.add_argument("--rounds", type=int, help="measured rounds (default: 20 of digits, 1 of mnist)")
    machine_options(parser)
    options = parser.parse_args(arguments)
    show(f"{set_up(options)}; median (min .. max) of the rounds")
    for name in options.case:
        show(f"{CASES[name].title}\n  {measure(CASES[name], options)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
