"""A cohort whose clients hold the same weights, computed as one: the same messages, bytes and results, in less time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import Fields, Payload, Value
from cutlayer.runtime.parties.client_data import Drawn, views
from cutlayer.runtime.parties.contexts import ClientContext
from cutlayer.runtime.parties.optim import PartOptimizer

# Samples that go through a client part at a time. On a processor more leave its cache, and are no faster than one.
CHUNK_SAMPLES = 16
_IMAGES = 256  # that are augmented at a time


@dataclass(frozen=True)
class CohortConfig:
    """How a round's clients are computed.

    together: how many that take the same steps are computed as one, each with weights of its own: ``never`` more than
        one, so many, or ``auto``: what is faster, measured once as a run begins.
    """

    together: Literal["auto", "never"] | int = "never"

    def __post_init__(self) -> None:
        if isinstance(self.together, int) and self.together < 2:
            raise ConfigError("together", self.together, "auto, never, or an integer >= 2")


class Asked(NamedTuple):
    """What each client of a cohort sends, and waits for the server's reply to."""

    kind: str
    fields: Mapping[int, Fields]


class Cohort:
    """Clients that have the same weights and take one step each.

    The mean of the weights that plain gradient steps lead to is what one step along the mean of the gradients leads to:
    so one copy of the parts is enough. Each client's samples and their augmentation come from its own streams.

    Args:
        contexts: of the clients, on one seat.
        weights: of each client in the average, unnormalised.
    """

    def __init__(self, contexts: Sequence[ClientContext], weights: Sequence[float], device: torch.device) -> None:
        self._contexts = {context.id: context for context in contexts}
        self._seat = contexts[0]
        total = sum(weights)
        self._shares = {context.id: weight / total for context, weight in zip(contexts, weights, strict=True)}
        self._chunk = CHUNK_SAMPLES if device.type == "cpu" else sum(sum(context.steps) for context in contexts)
        self.sizes = {context.id: sum(context.steps) for context in contexts}
        """Samples in each client's batch."""

    def __iter__(self) -> Iterator[int]:
        return iter(self._contexts)

    def share(self, client: int) -> float:
        """The client's weight in the average; they sum to one."""
        return self._shares[client]

    def load(self, payload: Payload) -> None:
        """Load every part that the payload, the same for all, brings."""
        self._seat.load(payload)

    def part(self, name: str) -> nn.Module:
        """The one copy of a part."""
        return self._seat.part(name)

    def optimizer(self, *names: str) -> PartOptimizer:
        """A fresh optimizer over the parts, as configured for each."""
        return self._seat.optimizer(*names)

    def dump(self, *names: str) -> dict[str, Value]:
        """The parts as the upload of each client."""
        return self._seat.dump(*names)

    def samples(self, client: int) -> int:
        """Number of the client's training samples."""
        return self._contexts[client].samples

    def views(self) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Chunks of clients, and two augmented views of each one's batch, one client's after another's."""
        for clients, drawn in self._grouped(_IMAGES, {client: self._drawn(client) for client in self}):
            one, two = views(self._seat.data.source, drawn)
            start = 0
            for chunk, steps in self._grouped(self._chunk, dict(zip(clients, drawn, strict=True))):
                stop = start + sum(len(step.samples) for step in steps)
                yield chunk, one[start:stop], two[start:stop]
                start = stop

    def _drawn(self, client: int) -> Drawn:
        context = self._contexts[client]
        (step,) = context.drawn(context.steps)
        return step

    def _grouped(self, most: int, steps: Mapping[int, Drawn]) -> Iterator[tuple[list[int], list[Drawn]]]:
        """Groups of clients that have no more than so many samples together, or one client."""
        clients: list[int] = []
        for client in steps:
            if clients and sum(self.sizes[each] for each in (*clients, client)) > most:
                yield clients, [steps[each] for each in clients]
                clients = []
            clients.append(client)
        yield clients, [steps[each] for each in clients]
