"""Per-FedAvg: FedAvg for a model that is good after one gradient step on a client's own data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from cutlayer.algorithms import register
from cutlayer.algorithms.fed_avg import FedAvg, copies
from cutlayer.algorithms.mixins import CountsSteps
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.parties.contexts import ClientContext

T = TypeVar("T")


def pairs(items: Iterable[T]) -> Iterator[tuple[T, T]]:
    """Consecutive pairs; a last one without a partner is paired with itself."""
    each = iter(items)
    for first in each:
        yield first, next(each, first)


@register("per_fed_avg")
class PerFedAvg(CountsSteps, FedAvg):
    """Per-FedAvg, first-order (Fallah et al., NeurIPS 2020, algorithm 1 with the FO approximation of section 5).

    A step takes two batches: w' = w - inner_lr * grad(w, batch 1), then the optimizer moves w along grad(w', batch 2).
    The optimizer's learning rate is the paper's beta. A client's last batch, where it has no second, serves as both.
    The loss that is reported is that of w', after the inner step.
    """

    @dataclass(frozen=True)
    class Config:
        """inner_lr: size of the inner gradient step (alpha), > 0."""

        inner_lr: float = 0.01

        def __post_init__(self) -> None:
            if not 0 < self.inner_lr < float("inf"):
                raise ConfigError("inner_lr", self.inner_lr, "a finite number > 0")

    @staticmethod
    def part_steps(config: Any, part: str, steps: int, epochs: int) -> int | None:
        """One for two batches."""
        return -(-steps // 2)

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Local training from the global model; the upload is the trained model."""
        ctx.load(down)
        model, optimizer = ctx.part("model"), ctx.optimizer("model")
        weights = list(model.parameters())
        for (x, y), (x2, y2) in pairs(ctx.batches()):
            start = copies(model)
            gradients = torch.autograd.grad(ctx.loss(model(x), y), weights)
            with torch.no_grad():
                for w, g in zip(weights, gradients, strict=True):
                    w -= ctx.config.inner_lr * g
            loss = ctx.loss(model(x2), y2)
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for w, before, g in zip(weights, start, gradients, strict=True):
                    w.copy_(before)
                    w.grad = g
            optimizer.step()
            ctx.log("loss", loss)
        return ctx.dump("model")
