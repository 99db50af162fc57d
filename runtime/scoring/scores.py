"""Accuracy and loss on test data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NotRequired, TypeAlias, TypedDict, Unpack

import torch
from torch import Tensor, nn

from cutlayer.datasets import Source
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.devices import moved, queued
from cutlayer.runtime.parties.blueprint import BATCH_NORM, Blueprint
from cutlayer.runtime.records.history import ClientRow
from cutlayer.tasks import Score

_FILLING_VALUES = 1 << 23  # of images; 2,730 of 3x32x32
Forward = Callable[[Tensor], Tensor]


class Measured(NamedTuple):
    """Samples that were tested, mean accuracy and loss on them, and what evaluations found, by metric."""

    samples: int
    accuracy: float
    loss: float
    values: dict[str, float] = {}  # noqa: RUF012  (never changed)

    def to_json(self) -> list[Any]:
        """As a client sends it; what evaluations found only if there are some."""
        return [*self] if self.values else [*self[:3]]


ClientScores: TypeAlias = dict[str, Measured]
"""What was found of one client, by metric."""


class Evaluation(NamedTuple):
    """What a round's test found: accuracy and loss, further metrics, and the lines of ``client_accuracy.csv``."""

    accuracy: float
    loss: float
    metrics: dict[str, float]
    clients: list[ClientRow]


@contextmanager
def evaluating(modules: Sequence[nn.Module], *, batch_statistics: Sequence[bool]) -> Generator[Forward]:
    """The modules, composed, in evaluation mode.

    Where ``batch_statistics`` is true, normalisation uses each batch's own statistics, as its running ones are
    not shared (``aggregate.buffers``); nothing is written to them.
    """
    norms: list[tuple[Any, Tensor | None, Tensor | None]] = []
    modes = [module.training for module in modules]
    for module, own in zip(modules, batch_statistics, strict=True):
        module.eval()
        norm: Any
        for norm in module.modules() if own else ():
            if isinstance(norm, BATCH_NORM):
                norms.append((norm, norm.running_mean, norm.running_var))
                norm.running_mean = norm.running_var = None

    def forward(x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
        return x

    try:
        yield forward
    finally:
        for norm, mean, variance in norms:
            norm.running_mean, norm.running_var = mean, variance
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


class How(TypedDict):
    """How a source is gone through.

    Attributes:
        batch_statistics: per module, see ``evaluating``.
        samples: int64 [k], k >= 1, indices into the source; what is found is in this order. None takes all.
    """

    batch_size: int
    batch_statistics: NotRequired[Sequence[bool] | None]
    samples: NotRequired[Tensor | None]


def evaluate(
    modules: Sequence[nn.Module],
    source: Source,
    blueprint: Blueprint,
    **how: Unpack[How],
) -> Score:
    """Test the composed modules on a whole source, or on some of it.

    Args:
        modules: applied one after the other; the last gives what the blueprint's task tests.
    """
    losses, counts = gather(blueprint.task.each, modules, source, blueprint, **how)
    right, asked, *predicted = counts.cpu().unbind(1)
    return Score(losses.double().cpu(), right, asked, tested_labels(source, how.get("samples")), *predicted)


def tested_labels(source: Source, samples: Tensor | None) -> Tensor:
    """The labels of a source, or of some of its samples: int64 [n], on the CPU."""
    return source.labels if samples is None else source.labels[samples]


@torch.no_grad()
def gather(
    take: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    modules: Sequence[nn.Module],
    source: Source,
    blueprint: Blueprint,
    *,
    batch_size: int,
    batch_statistics: Sequence[bool] | None = None,
    samples: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Two tensors [n, ...] of what the composed modules give for a source, or for some of it, in the samples' order.

    Args:
        take: from the modules' output for a batch (float32, float64 under ``precision=fp64``) and the targets
            [b, ...] to two tensors [b, ...].
        batch_size, batch_statistics, samples: see ``How``.
    """
    own = batch_statistics or [False] * len(modules)
    samples = torch.arange(len(source)) if samples is None else samples
    if queued(blueprint.device) and not any(own):
        with contextlib.suppress(torch.OutOfMemoryError):  # of a model with much larger maps than images
            return _gathered(take, modules, source, blueprint, larger(batch_size, source), own, samples)
    return _gathered(take, modules, source, blueprint, batch_size, own, samples)


def larger(batch_size: int, source: Source) -> int:
    """Samples in a batch on a device that smaller ones do not fill, where no sample's result depends on others."""
    return max(batch_size, _FILLING_VALUES // math.prod(source.shape))


def _gathered(
    take: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    modules: Sequence[nn.Module],
    source: Source,
    blueprint: Blueprint,
    batch_size: int,
    own: Sequence[bool],
    samples: Tensor,
) -> tuple[Tensor, Tensor]:
    first: list[Tensor] = []
    second: list[Tensor] = []
    with evaluating(modules, batch_statistics=own) as forward, blueprint.autocast():
        order = _order(len(samples), mixed=any(own))
        # Batches of nearly equal size: a remainder of a few samples would have poor statistics of its own.
        even = math.ceil(len(order) / math.ceil(len(order) / batch_size))
        for x, y in source.batches(samples[order], batch_size=even):
            output = forward(x).float() if blueprint.dtype == torch.float32 else forward(x)
            for found, taken in zip((first, second), take(output, y), strict=True):
                found.append(taken)
    one, other = torch.cat(first), torch.cat(second)
    if not any(own):
        return one, other
    back = moved(order.argsort(), one.device)
    return one[back], other[back]


def _order(samples: int, *, mixed: bool) -> Tensor:
    """The order in which samples are tested; mixed where a sample's neighbours in its batch have a say in the outcome.

    Test sets are often sorted by class, and a batch of one class has statistics of its own.
    """
    if not mixed:
        return torch.arange(samples)
    return torch.randperm(samples, generator=rng.torch_generator(0, stream="test order"))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and worst decile (mean of the lowest tenth, at least one) of per-client values."""
    tensor = torch.tensor(values, dtype=torch.float64)
    worst = tensor.sort().values[: max(1, len(tensor) // 10)]
    return {"mean": float(tensor.mean()), "std": float(tensor.std(correction=0)), "worst_decile": float(worst.mean())}


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


def mean_values(found: Sequence[Measured]) -> dict[str, float]:
    """The means of what evaluations found, each over the clients that it was found of."""
    names = dict.fromkeys(name for each in found for name in each.values)
    return {name: mean([each.values[name] for each in found if name in each.values]) for name in names}


def spread_over_clients(rows: Sequence[ClientRow]) -> dict[str, float]:
    """``spread`` of the accuracies of each metric, as metrics."""
    values: dict[str, list[float]] = {}
    for metric, _, _, accuracy in rows:
        values.setdefault(metric, []).append(accuracy)
    return {f"{name}/{key}": value for name, each in values.items() for key, value in spread(each).items()}
