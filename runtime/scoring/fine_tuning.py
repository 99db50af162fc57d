"""How a client makes a trained model its own: by a few epochs of training on its own data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.parties.optim import PartOptimizer
from cutlayer.tasks import Loss

TunedPart = Literal["body", "head", "full"]
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PersonalizeConfig:
    """The protocol of personalisation: every client fine-tunes the trained model on its own data and tests it.

    Attributes:
        part: what is fine-tuned: the body, the head (the classifier), or both (full); None leaves it out.
        epochs: passes over a client's data after which it is tested, 0 for before any; a single number n is [0, n].
        lr: learning rate, constant; the rest of the optimizer is the run's.
        start: the model that it begins with: that of the last round, or of the round with the best test accuracy, whose
            choice by test data makes what is found of it too high.
        loss: what clients minimise: the model's cross-entropy, or the loss by which the method trained it.
    """

    part: TunedPart | None = None
    epochs: int | tuple[int, ...] = 5
    lr: float = 0.001
    start: Literal["final", "best"] = "final"
    loss: Literal["cross_entropy", "method"] = "cross_entropy"

    def __post_init__(self) -> None:
        given = (self.epochs,) if isinstance(self.epochs, int) else self.epochs
        if not given or min(given) < 0:
            raise ConfigError("epochs", self.epochs, "an integer >= 0, or a list of such, e.g. [0,1,5]")
        if not 0 < self.lr < float("inf"):
            raise ConfigError("lr", self.lr, "a finite number > 0")

    @property
    def tested_after(self) -> tuple[int, ...]:
        """The numbers of epochs after which clients are tested, ascending."""
        return tuple(sorted({0, self.epochs} if isinstance(self.epochs, int) else set(self.epochs)))

    @property
    def setting(self) -> str:
        """A name that distinguishes this setting from others, fit for a folder."""
        other = f",start={self.start}" * (self.start != "final") + f",loss={self.loss}" * (self.loss != "cross_entropy")
        return f"part={self.part},lr={self.lr:g},epochs={'-'.join(map(str, self.tested_after))}{other}"


def fine_tune(
    body: nn.Module,
    head: nn.Module,
    part: TunedPart,
    optimizer: PartOptimizer,
    epoch: Callable[[], Batches],
    *,
    keep_statistics: bool,
    criterion: Loss,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[int]:
    """Train a part of the model; yields the number of epochs done: 0, 1, 2, and so on for ever.

    The other part does not change, its running statistics included. Between epochs the caller may put the modules into
    any mode.

    Args:
        body, head: images -> features -> logits [b, classes]; left in training mode.
        optimizer: over the parameters of ``part``.
        epoch: gives the batches of one more epoch, x and y.
        keep_statistics: whether a body that is not trained normalises by its running statistics; otherwise
            by the batch's own.
        criterion: the loss of the model's output and the targets. loss: of a batch x and y, in its place.
    """
    trains_body, trains_head = part != "head", part != "body"

    def usual(x: Tensor, y: Tensor) -> Tensor:
        with torch.set_grad_enabled(trains_body):
            z = body(x)
        return criterion(head(z), y)

    done = 0
    while True:
        yield done
        body.train(trains_body or not keep_statistics)
        head.train(trains_head)
        for x, y in epoch():
            optimizer.update(loss(x, y) if loss is not None else usual(x, y))
        done += 1
