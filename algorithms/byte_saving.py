"""Saving bytes: which messages a self-supervised method may leave out, by how far its loss has fallen lately."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutlayer.models.cutting import Crossing
from cutlayer.runtime.messages.crossing import crossed, detached, packed

OFF, NO_GRADIENTS, SILENT = range(3)

FROZEN = "frozen"
"""The field by which a client learns that no gradient will come down, and that its part stays as it is."""


class Step(NamedTuple):
    """The smashed data of one server step: of both views, and the line of the queue of each sample."""

    query: Crossing
    key: Crossing
    lines: Tensor


class ByteSaving:
    """The three states of loss-based saving, and what the server learns from in the last.

    After each interval of rounds the mean loss is compared with that of the interval before. Where it has fallen by
    less than the threshold, the next state saves more: first no gradients go down, so that client parts stay as they
    are and are not sent up either; then nothing crosses, and the server learns from the latest smashed data of the
    state before. Where it has fallen enough, everything is sent again.

    Args:
        threshold: by how much the loss has to fall; None for a state that never changes.
        interval: rounds from one comparison to the next.
        capacity: steps whose smashed data are kept.
    """

    def __init__(self, threshold: float | None, interval: int, capacity: int) -> None:
        self._threshold, self._interval, self._capacity = threshold, interval, capacity
        self.level = OFF
        self._rounds = self._steps = self._next = 0
        self._sum: Tensor | float = 0.0
        self._before: float | None = None
        self._stored: list[Step] = []

    @property
    def frozen(self) -> bool:
        """Whether clients get no gradients, and so keep their parts as they are."""
        return self.level == NO_GRADIENTS

    @property
    def silent(self) -> bool:
        """Whether clients are not asked at all."""
        return self.level == SILENT

    def open_round(self) -> None:
        """Called as a round begins: the state changes where an interval has ended."""
        if self._threshold is None:
            return
        if self._rounds == self._interval and self._steps:
            mean = float(self._sum) / self._steps
            if self._before is not None:
                self.level = min(self.level + 1, SILENT) if self._before - mean < self._threshold else OFF
                if self.level == NO_GRADIENTS:
                    self._stored = []
            self._before, self._sum, self._rounds, self._steps = mean, 0.0, 0, 0
        self._rounds += 1

    def note(self, loss: Tensor, query: Crossing, key: Crossing, lines: Tensor) -> None:
        """Take in a step of the server."""
        if self._threshold is None:
            return
        self._sum = self._sum + loss.detach()
        self._steps += 1
        if self.frozen:
            self._stored.append(Step(detached(query), detached(key), lines))
            del self._stored[: -self._capacity]

    def replayed(self, steps: int) -> Iterator[Step]:
        """While nothing crosses: as many of the kept steps, in order."""
        if not self.silent:
            return
        for _ in range(steps):
            yield self._stored[self._next % len(self._stored)]
            self._next += 1

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {
            "level": self.level,
            "rounds": self._rounds,
            "steps": self._steps,
            "next": self._next,
            "sum": torch.as_tensor(self._sum),
            "before": self._before,
            "stored": [packed(step._asdict()) for step in self._stored],
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what ``state`` gave, on the device."""
        self.level, self._rounds, self._steps = state["level"], state["rounds"], state["steps"]
        self._next, self._before = state["next"], state["before"]
        self._sum = state["sum"].to(device)
        for each in state["stored"]:
            moved = {name: value.to(device) for name, value in each.items() if name != "lines"}
            self._stored.append(Step(crossed(moved, "query"), crossed(moved, "key"), each["lines"]))
