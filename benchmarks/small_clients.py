"""Rounds whose small clients are computed as one (``cohort.together``) against one after another, alternating.

The same run in both, from the same seed; the time is that of ``Federation.step`` without evaluation. After the first
round weights agree to rounding, of the size of that round's change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.measure import Spread, machine_options, set_up, timed
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.local_clients import LocalClients

MODELS = {
    "cnn2": ("model=cnn2",),
    "cnn4-8": ("model=cnn4", "model.options.width=8"),
    "mlp": ("model=mlp",),
}


def federation(model: str, algorithm: str, together: int | str, options: argparse.Namespace) -> Federation:
    """A run that has no end."""
    images = [f"dataset.options.{key}" for key in ("channels=3", "height=32", "width=32")]
    return Federation(
        load_config(
            [
                *(f"algorithm={algorithm}", *MODELS[model], "dataset=synthetic", *images),
                *(f"dataset.options.n_train={options.clients * options.images}", f"num_clients={options.clients}"),
                *(f"batch_size={options.batch}", f"device={options.device}", f"precision={options.precision}"),
                *("optimizer=sgd", "lr=0.05", f"cohort.together={together}", "rounds=1000000", "eval_interval=1000000"),
                *options.set,
            ]
        )
    )


def compare(model: str, algorithm: str, together: int | str, options: argparse.Namespace) -> tuple[str, bool]:
    """The ratio of rounds in the same time, and whether weights agree."""
    sides = {each: federation(model, algorithm, each, options) for each in ("never", together)}
    start = _flat(sides["never"])
    ratios: list[float] = []
    gap = 0.0
    for repeat in range(options.repeats + 1):
        order = [*sides] if repeat % 2 else [*reversed(sides)]
        taken = {each: timed(sides[each].setup.device, sides[each].step)[0].wall for each in order}
        ratios.append(taken["never"] / taken[together])
        if not repeat:
            one, other = (_flat(side) for side in sides.values())
            gap = float((one - other).norm() / (one - start).norm())
    clients = sides[together].clients
    assert isinstance(clients, LocalClients)
    why = f", one by one as {clients.reasons[0]}" if clients.reasons else ""
    line = f"{model}, {algorithm}, {together} together: {Spread.of(ratios[1:]).show()} times the rounds"
    return f"{line}, apart by {gap:.0e} of the first round's change{why}", gap < 1e-2


def _flat(side: Federation) -> torch.Tensor:
    states = (part.state_dict() for part in side.server.ctx.parts.values())
    return torch.cat([tensor.double().flatten() for state in states for tensor in state.values()])


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure; exit status 1 if weights differ."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small_clients", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[*MODELS], help="default: all")
    parser.add_argument("--algorithm", nargs="+", default=["fed_avg"], help="default: fed_avg")
    parser.add_argument("--together", nargs="+", default=["8", "16"], help="clients as one, or auto (default: 8 16)")
    parser.add_argument("--clients", type=int, default=50, help="default: 50")
    parser.add_argument("--images", type=int, default=50, help="of each client (default: 50)")
    parser.add_argument("--batch", type=int, default=10, help="default: 10")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds of each side (default: 5)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more keys of both")
    machine_options(parser)
    options = parser.parse_args(arguments)
    show(f"{set_up(options)}; {options.repeats} repeats, median (min .. max)")
    show(f"{options.clients} clients of {options.images} images 3x32x32, batch {options.batch}, SGD")
    agreed = True
    for model in options.model:
        for algorithm in options.algorithm:
            for together in options.together:
                line, same = compare(model, algorithm, together, options)
                show(f"  {line}")
                agreed &= same
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
