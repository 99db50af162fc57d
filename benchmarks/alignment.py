"""Time of FSL-SAGE's alignment against the plain double backward pass, in one process, alternating.

A step moves an auxiliary model's weights down ||d/dz CE(auxiliary(z), y) - target||^2. The plain step differentiates
this number as it is written, as the authors' code does. Both sides take the same steps from the same weights, which
must agree afterwards.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import Seconds, Spread, machine_options, set_up, timed
from cutlayer.algorithms.alignment import alignment_batch
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.parties.optim import make_optimizer
from cutlayer.runtime.rounds.setup import Setup

Data = tuple[Tensor, Tensor, Tensor]
"""Smashed data, labels, and gradients to be met."""


@dataclass(frozen=True)
class Case:
    """A setting: what it is, the keys given to ``main.py``, the samples in the buffer, and its share of ``--steps``."""

    title: str
    keys: tuple[str, ...]
    samples: int
    share: float = 1.0


_CIFAR = ("dataset=synthetic", *(f"dataset.options.{key}" for key in ("channels=3", "height=32", "width=32")))
CASES = {
    "default": Case("the default run, whose auxiliary model is one linear layer, with its buffer full", (), 1000),
    "early": Case("the default run in its first round", (), 32),
    "block": Case(
        "ResNet-18 of a quarter of the width, cut after layer2, and a residual block",
        (*_CIFAR, "model=resnet18", "model.options.width=16", "model.cut=layer2", "model.auxiliary.size=half"),
        200,
        0.1,
    ),
    "paper": Case(
        "the paper's setting, with synthetic images of CIFAR's shape",
        ("experiment=fsl_sage/cifar10_iid", *_CIFAR, "dataset.normalize=imagenet"),
        1000,
        0.02,
    ),
    "layers": Case(
        "the default run with the whole server part, two linear layers", ("model.auxiliary.size=full",), 1000
    ),
    "tiny": Case("tiny: the default run with a buffer of ten", (), 10),
}
TOLERANCE = {"fp32": 1e-2, "bf16": 1e-2, "fp64": 1e-9}


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, z: Tensor, y: Tensor, target: Tensor) -> None:
    """A step of alignment as its equation is written."""
    z = z.detach().requires_grad_()
    estimate = torch.autograd.grad(F.cross_entropy(model(z), y), z, create_graph=True)[0]
    optimizer.zero_grad()
    (estimate - target).square().sum().backward()
    optimizer.step()


def buffered(case: Case, options: argparse.Namespace) -> tuple[Setup, Data]:
    """The setting of a case, and the buffer of one client with the gradients that the server gives."""
    fixed = (f"device={options.device}", f"precision={options.precision}", "algorithm=fsl_sage")
    setup = Setup(load_config([*case.keys, *fixed]))
    parts, info = setup.blueprint.parts(["client", "server"]), setup.dataset.info
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.samples, *info.shape, generator=generator, dtype=setup.blueprint.dtype)
    y = torch.randint(info.classes, (case.samples,), generator=generator).to(setup.device)
    with torch.no_grad():
        z = parts["client"](images.to(setup.device))
    leaf = z.clone().requires_grad_()
    (target,) = torch.autograd.grad(F.cross_entropy(parts["server"](leaf), y), leaf)
    return setup, (z, y, target)


class Operations(TorchDispatchMode):
    """Counts those of torch that are computed inside; a view of a tensor is one too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def compare(case: Case, options: argparse.Namespace) -> tuple[str, bool]:
    """Measure one case; returns the text to print, and whether both sides reached the same weights."""
    setup, data = buffered(case, options)
    (start,) = setup.blueprint.parts(["auxiliary"]).values()
    models = [copy.deepcopy(start) for _ in range(2)]
    config = setup.config.optimizer_for("auxiliary")
    own, other = (make_optimizer(config, model.parameters()) for model in models)
    steps = max(1, round(options.steps * case.share))

    def ours() -> None:
        batch = alignment_batch(models[0], *data)
        for _ in range(steps):
            batch.differentiate()
            own.step()

    def theirs() -> None:
        for _ in range(steps):
            plain_step(models[1], other, *data)

    turns: list[tuple[Seconds, Seconds]] = []
    for index in range(options.repeats + 1):
        seconds = {side: timed(setup.device, side)[0] for side in ((ours, theirs) if index % 2 else (theirs, ours))}
        turns.append((seconds[ours], seconds[theirs]))
    with Operations() as counted:
        alignment_batch(models[0], *data).differentiate()
    del turns[0]  # it lets caches and the allocator settle
    wall = Spread.of([a.wall / b.wall for a, b in turns]).show()
    spent = Spread.of([a.processor / b.processor for a, b in turns]).show()
    took = Spread.of([a.wall / steps for a, _ in turns]).show(1e3, 2, " ms")
    apart = _distance(models[0], models[1], start)
    same = apart < TOLERANCE[options.precision]
    agreed = f"weights {'agree' if same else 'DIFFER'}, apart by {apart:.0e} of their way"
    made = f"{counted.count} operations give its gradient"
    return f"ratio {wall}, of processor time {spent}, a step takes {took}, {made}\n  {agreed}", same


def _distance(one: nn.Module, other: nn.Module, start: nn.Module) -> float:
    """Norm of the difference of two models' weights over the norm of their way."""
    a, b, c = (torch.cat([weight.detach().double().flatten() for weight in model.parameters()])
               for model in (one, other, start))  # fmt: skip
    return float((a - b).norm() / (b - c).norm())


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure the cases that the options name; exit status 1 if the weights of any differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alignment", description=(__doc__ or "").split("\n")[0])
    usual = [name for name in CASES if name not in ("tiny", "paper")]
    parser.add_argument("--case", nargs="+", choices=CASES, default=usual, help=f"default: {' '.join(usual)}")
    parser.add_argument("--steps", type=int, default=50, help="of a side before the other's turn (default: 50)")
    parser.add_argument("--repeats", type=int, default=11, help="turns of each side (default: 11)")
    machine_options(parser)
    options = parser.parse_args(arguments)
    show(f"{set_up(options)}; {options.repeats} repeats, median (min .. max)")
    agreed = True
    for name in options.case:
        line, same = compare(CASES[name], options)
        show(f"{CASES[name].title}, {CASES[name].samples} samples\n  {line}")
        agreed &= same
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
