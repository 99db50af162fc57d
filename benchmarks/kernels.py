"""Time of a bare loop's steps with other kernels than torch's default ones, in one process, alternating.

Each way computes the same training steps of a model: with channels_last, in bf16, with an optimizer that steps all
parameters at once. Ratios are of processor time to that of the plain loop beside it, in float32.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.measure import Spread, machine_options, set_up
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.setup import Setup


@dataclass(frozen=True)
class Case:
    """A network, its batch of images [batch, channels, side, side], and its steps in a turn."""

    model: str
    batch: int
    channels: int
    side: int
    steps: int


CASES = {
    "cnn2": Case("cnn2", 10, 1, 28, 20),
    "digits": Case("cnn2", 32, 1, 8, 40),
    "resnet18": Case("resnet18", 128, 3, 32, 1),
    "tiny": Case("cnn2", 2, 1, 8, 1),
}


@dataclass(frozen=True)
class Way:
    """How steps are computed: an optimizer of torch by name with its options, the order in memory, the precision."""

    optimizer: str = "SGD"
    options: tuple[tuple[str, float | bool], ...] = ()
    memory_format: torch.memory_format = torch.preserve_format
    bf16: bool = False


_MOMENTUM = (("momentum", 0.9), ("weight_decay", 5e-4))
_FUSED = ("fused", True)
PLAIN = Way()
WAYS: Mapping[str, tuple[Way, Way]] = {
    "channels last": (Way(memory_format=torch.channels_last), PLAIN),
    "fused Adam": (Way("Adam", (_FUSED,)), Way("Adam")),
    "fused SGD, momentum, decay": (Way(options=(*_MOMENTUM, _FUSED)), Way(options=_MOMENTUM)),
    "fused SGD": (Way(options=(_FUSED,)), PLAIN),
    "bf16": (Way(bf16=True), PLAIN),
}
"""By name, a way and the plain one that it is compared with."""


def stepping(model: nn.Module, case: Case, way: Way) -> Callable[[], None]:
    """A turn of steps of a copy of the model."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, case.channels, case.side, case.side, generator=generator)
    y = torch.randint(10, (case.batch,), generator=generator)
    own: Any = copy.deepcopy(model)
    if way.memory_format != torch.preserve_format:
        x, own = x.contiguous(memory_format=way.memory_format), own.to(memory_format=way.memory_format)
    optimizer = getattr(torch.optim, way.optimizer)(own.parameters(), lr=1e-3, **dict(way.options))

    def turn() -> None:
        for _ in range(case.steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=way.bf16):
                loss = F.cross_entropy(own(x), y)
            loss.backward()
            optimizer.step()

    return turn


def compare(model: nn.Module, case: Case, ways: tuple[Way, Way], repeats: int) -> Spread:
    """Processor time of a way over that of the plain one, turn by turn."""
    turns = [stepping(model, case, way) for way in ways]
    found: list[tuple[float, float]] = []
    for index in range(repeats + 1):
        seconds = [0.0, 0.0]
        for side in (0, 1) if index % 2 else (1, 0):
            begun = time.process_time()
            turns[side]()
            seconds[side] = time.process_time() - begun
        found.append((seconds[0], seconds[1]))
    return Spread.of([one / other for one, other in found[1:] if other])


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure the ways that the options name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n")[0])
    usual = [name for name in CASES if name != "tiny"]
    parser.add_argument("--case", nargs="+", choices=CASES, default=usual, help=f"default: {' '.join(usual)}")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=[*WAYS], help="default: all")
    parser.add_argument("--repeats", type=int, default=9, help="measured turns of each side (default: 9)")
    machine_options(parser)
    options = parser.parse_args(arguments)
    show(f"{set_up(options)}; {options.repeats} repeats, processor time over the plain loop's, median (min .. max)")
    for name in options.case:
        case = CASES[name]
        keys = {"n_train": 20, "n_test": 10, "channels": case.channels, "height": case.side, "width": case.side}
        shape = [f"dataset.options.{key}={value}" for key, value in keys.items()]
        setup = Setup(load_config([f"model={case.model}", "algorithm=fed_avg", "dataset=synthetic", *shape]))
        (model,) = setup.blueprint.parts(["model"]).values()
        show(f"{case.model}, batch {case.batch}, {case.channels}x{case.side}x{case.side}")
        for way in options.way:
            show(f"  {way:<27} {compare(model, case, WAYS[way], options.repeats).show()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
