"""Momentum contrast: the loss, the queue of keys, and the moving averages that the methods here share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutlayer.models.cutting import Crossing
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.devices import moved
from cutlayer.runtime.messages.crossing import detached


def info_nce(query: Tensor, key: Tensor, other: Tensor, temperature: float) -> Tensor:
    """InfoNCE (van den Oord et al. 2018), mean over the batch: the key of the same image against those of others.

    Args:
        query, key: [b, d], of length 1; the key is constant.
        other: cosines [b, K] of the queries with other images' keys.
    """
    same = (query * key).sum(1, keepdim=True)
    logits = torch.cat([same, other], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))


def unit(z: Tensor, like: Tensor) -> Tensor:
    """The rows of z [b, d] divided by their lengths, in the precision of a weight whatever that of z."""
    return F.normalize(z.to(like.dtype), dim=1)


def contrast(
    online: Callable[[Crossing], Tensor],
    average: Callable[[Crossing], Tensor],
    query: Crossing,
    key: Crossing,
    queue: Queue,
    lines: Tensor,
    *,
    temperature: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of momentum contrast over a batch, the keys that the queue is to take, and the line of each.

    Args:
        online, average: the projection [b, d] of a view, by the copy that learns and by its moving average.
        query, key: two views of the same images, or what crosses a cut for them.
        lines: int64 [b], the line of the queue of each image.
        symmetric: the views change places too, and the losses of both directions are added; the keys of what was the
            query come first.
    """

    def one_way(query: Crossing, key: Crossing) -> tuple[Tensor, Tensor]:
        q = unit(online(query), queue.keys)
        with torch.no_grad():
            k = unit(average(key), queue.keys)
        return info_nce(q, k, queue.cosines(q, lines), temperature), k

    loss, keys = one_way(query, key)
    if not symmetric:
        return loss, keys, lines
    other, more = one_way(key, detached(query))
    return loss + other, torch.cat([more, keys]), lines.repeat(2)


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """Move a copy's parameters towards the module's: average = momentum * average + (1 - momentum) * module."""
    for mean, parameter in zip(average.parameters(), module.parameters(), strict=True):
        mean.lerp_(parameter, 1 - momentum)


class Queue:
    """The latest keys, in one line for all clients or in a line for each.

    Attributes:
        keys: [lines, K, d], of length 1; they begin as random ones.
        next: int64 [lines], the place that is overwritten next.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = F.normalize(keys, dim=2)
        self.next = torch.zeros(len(keys), dtype=torch.int64)

    def cosines(self, query: Tensor, lines: Tensor) -> Tensor:
        """Cosines [b, K] of queries [b, d] with the keys in their lines (int64 [b]).

        Without autocast: what distinguishes the images at first are cosines that differ by less than bf16 can say.
        """
        with torch.autocast(query.device.type, enabled=False):
            found = query @ self.keys.flatten(0, 1).T
        if len(self.keys) == 1:
            return found
        rows = torch.arange(len(query), device=query.device)
        return found.view(len(query), len(self.keys), -1)[rows, moved(lines, query.device)]

    def push(self, keys: Tensor, lines: Tensor) -> None:
        """Put keys [b, d] into their lines (int64 [b]), in place of the oldest."""
        size = self.keys.shape[1]
        for line in sorted({int(line) for line in lines}):
            new = keys.index_select(0, moved((lines == line).nonzero()[-size:, 0], keys.device))
            places = (int(self.next[line]) + torch.arange(len(new))) % size
            self.keys[line, moved(places, self.keys.device)] = new.to(self.keys.dtype)
            self.next[line] = (int(self.next[line]) + len(new)) % size

    def move(self, like: Tensor) -> None:
        """Go where a tensor is, in its precision."""
        self.keys = moved(self.keys, like.device).to(like.dtype)

    def state(self) -> dict[str, Tensor]:
        """Everything, as one row."""
        return {"keys": self.keys, "next": self.next}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state`` gave."""
        self.keys, self.next = state["keys"].to(self.keys.device).clone(), state["next"].cpu().clone()


def check_unit(key: str, value: float) -> None:
    """Raises ConfigError for a momentum that is none."""
    if not 0 <= value < 1:
        raise ConfigError(key, value, "a number >= 0 and < 1")


def check_positive(key: str, value: float) -> None:
    """Raises ConfigError for a number that is not above zero."""
    if not 0 < value < float("inf"):
        raise ConfigError(key, value, "a finite number > 0")
