"""The clients of a federation: where each sits, what data it has, and how its round is begun."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from datasets import batch_sizes
from models.cutting import is_ghost
from runtime import rng
from runtime.blueprint import BATCH_NORM
from runtime.client_data import ClientData
from runtime.cohort import Cohort
from runtime.contexts import ClientContext, ClientState, Seat
from runtime.schedule import RoundReport, compute_together
from runtime.session import Channel, LocalSession, ServerParty, Workplace

if TYPE_CHECKING:
    from runtime.federation import Federation

DROPOUT = nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage]  the base of all of them


class Clients:
    """Opens clients' rounds; a seat, with a set of parts, is used by one client after another."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self.seats: list[Seat] = []

    def data(self, client: int) -> ClientData:
        """A client's training data."""
        config = self._federation.config
        return ClientData(
            self._federation.dataset.train,
            self._federation.partition.indices(client),
            seed=config.seed,
            client=client,
            batch_size=config.batch_size,
            local_epochs=config.local_epochs,
            config=config.dataset,
        )

    def steps(self, client: int) -> list[int]:
        """Samples in each batch of a round of the client."""
        federation, config = self._federation, self._federation.config
        samples = int(federation.partition.sizes[client])
        sizes = config.local_epochs * batch_sizes(samples, config.batch_size, config.dataset.drop_last)
        return federation.algorithm.steps(config.algorithm, client, federation.population, sizes)

    def epoch(self, client: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over a client's training data; no batch where the client has none to train on."""
        return self.data(client).batches(generator, 1) if self._federation.can_train(client) else iter(())

    def open(self, client: int) -> LocalSession:
        """Begin a client's round, on a seat that is free."""
        seat = self._seat()
        context = self._context(client, seat)
        federation = self._federation
        seed = rng.derive(federation.config.seed, round=federation.round, client=client, stream="client")

        def leave(seconds: float) -> None:
            seat.taken = False
            federation.seconds["client"] += seconds

        return LocalSession(federation.algorithm, context, Workplace(federation.blueprint, seed), leave)

    @cached_property
    def compute_together(self) -> bool:
        """Whether one copy of the client's parts stands for those of a whole cohort: see ``Cohort``.

        The method has to say that clients hold equal weights; their step has to be linear in the gradient, as that of
        SGD is, and no sample may depend on another's, as through BatchNorm, or on a random number, as with dropout.
        """
        federation = self._federation
        names = federation.algorithm.layout.client
        modules = chain.from_iterable(part.modules() for part in federation.blueprint.parts(names).values())
        return (
            federation.algorithm.computes_together(federation.config.algorithm)
            and federation.config.optimizer_for(names[0]).name == "sgd"
            and not any(_depends(module) for module in modules if not is_ghost(module))
        )

    def train_together(self, cohort: list[int], server: ServerParty, channel: Channel) -> RoundReport:
        """One round of a cohort of equal weights, on one seat."""
        federation, seat = self._federation, self._seat()
        contexts = [self._context(client, seat) for client in cohort]
        weights = [federation.server.ctx.weight(context.id, context.samples) for context in contexts]
        seed = rng.derive(federation.config.seed, round=federation.round, stream="cohort's work")
        work = Workplace(federation.blueprint, seed)
        try:
            together = Cohort(contexts, weights, federation.device)
            return compute_together(federation.algorithm.together, together, work, server, channel)
        finally:
            seat.taken = False
            federation.seconds["client"] += work.seconds

    def _seat(self) -> Seat:
        seat = next((seat for seat in self.seats if not seat.taken), None)
        if seat is None:
            blueprint = self._federation.blueprint
            seat = Seat(blueprint, blueprint.parts(self._federation.algorithm.layout.client))
            self.seats.append(seat)
        return seat

    def _context(self, client: int, seat: Seat) -> ClientContext:
        federation = self._federation
        seat.take(federation.blueprint.for_client(client))
        return ClientContext(
            seat,
            id=client,
            round=federation.round,
            seed=federation.config.seed,
            config=federation.config.algorithm,
            state=ClientState(federation.stores["clients"], client),
            data=self.data(client),
            steps=self.steps(client),
        )


def _depends(module: nn.Module) -> bool:
    """Whether what a module makes of a sample depends on others, or on a random number."""
    return isinstance(module, BATCH_NORM) or (isinstance(module, DROPOUT) and module.p > 0)
