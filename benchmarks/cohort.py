"""Time of a round of 100 clients of whom a tenth takes part against a round of 10 clients who all do.

Both in one process, alternating; every client has as many images. The messages of a round must have the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from benchmarks.measure import Spread, machine_options, set_up, timed
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation

ALGORITHMS = ("fed_avg", "fed_babu", "fed_per", "fed_rep", "lg_fed_avg", "per_fed_avg", "ditto", "mhmd")


def federation(algorithm: str, clients: int, options: argparse.Namespace) -> Federation:
    """A federation of ``clients`` clients, of whom ``--cohort`` take part in each round."""
    return Federation(
        load_config(
            [
                f"algorithm={algorithm}",
                f"model={options.model}",
                "dataset=synthetic",
                "dataset.options.channels=3",
                "dataset.options.height=16",
                "dataset.options.width=16",
                f"dataset.options.n_train={clients * options.images}",
                f"num_clients={clients}",
                f"frac={options.cohort / clients}",
                f"batch_size={options.batch}",
                f"precision={options.precision}",
                f"device={options.device}",
                "rounds=1000000",
                "eval_interval=1000000",
            ]
        )
    )


def compare(algorithm: str, options: argparse.Namespace) -> tuple[str, bool]:
    """The line of one algorithm, and whether both federations sent as many bytes in every round."""
    many, few = (federation(algorithm, clients, options) for clients in (options.clients, options.cohort))
    ratios: list[float] = []
    same = True
    for index in range(options.repeats + 1):
        first, second = (many, few) if index % 2 else (few, many)
        (one, a), (other, b) = timed(first.setup.device, first.step), timed(second.setup.device, second.step)
        same &= a[0].comm_load == b[0].comm_load
        ratios.append(one.wall / other.wall if first is many else other.wall / one.wall)
    ratio = Spread.of(ratios[1:])  # the first lets caches and the allocator settle
    return f"  {algorithm:<11} ratio {ratio.show(digits=3)}, bytes {'equal' if same else 'DIFFER'}", same


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure the algorithms that the options name; exit status 1 if the bytes of any differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cohort", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--algorithm", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help="default: all")
    parser.add_argument("--model", default="cnn4", help="default: cnn4")
    parser.add_argument("--clients", type=int, default=100, help="the larger population (default: 100)")
    parser.add_argument("--cohort", type=int, default=10, help="clients in a round (default: 10)")
    parser.add_argument("--images", type=int, default=100, help="training images 3x16x16 of a client (default: 100)")
    parser.add_argument("--batch", type=int, default=50, help="default: 50")
    parser.add_argument("--repeats", type=int, default=11, help="measured rounds of each side (default: 11)")
    machine_options(parser)
    options = parser.parse_args(arguments)
    show(f"{set_up(options)}; {options.repeats} repeats, median (min .. max)")
    show(f"{options.clients} clients of whom {options.cohort} take part, over {options.cohort} clients")
    equal = True
    for algorithm in options.algorithm:
        line, same = compare(algorithm, options)
        show(line)
        equal &= same
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
