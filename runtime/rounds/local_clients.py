"""The clients of a federation: where each sits, what data it has, and how its round goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cutlayer.algorithms.mixins import ComputesTogether, OwnSteps
from cutlayer.datasets import batch_sizes
from cutlayer.models.cutting import is_ghost
from cutlayer.runtime.evaluation.scores import ClientScores
from cutlayer.runtime.ground import rng
from cutlayer.runtime.messages.ledger import Ledger
from cutlayer.runtime.parties.blueprint import BATCH_NORM
from cutlayer.runtime.parties.client_data import ClientData
from cutlayer.runtime.parties.cohort import Cohort
from cutlayer.runtime.parties.contexts import ClientContext, ClientState, Seat
from cutlayer.runtime.rounds.schedule import SCHEDULES, RoundReport, compute_together
from cutlayer.runtime.rounds.session import Channel, LocalSession, ServerParty, Workplace

if TYPE_CHECKING:
    from cutlayer.runtime.records.history import RoundRecord
    from cutlayer.runtime.rounds.federation import Federation
    from cutlayer.runtime.rounds.setup import Setup

DROPOUT = nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage]  the base of all of them


class Seats:
    """Clients of one process, opened one after another; a seat, with a set of parts, is used by many."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.seats: list[Seat] = []

    def data(self, client: int) -> ClientData:
        """A client's training data."""
        config = self._setup.config
        return ClientData(
            self._setup.dataset.train,
            self._setup.partition.indices(client),
            seed=config.seed,
            client=client,
            batch_size=config.batch_size,
            local_epochs=config.local_epochs,
            config=config.dataset,
        )

    def steps(self, client: int) -> list[int]:
        """Samples in each batch of a round of the client."""
        setup, config = self._setup, self._setup.config
        samples = int(setup.partition.sizes[client])
        sizes = config.local_epochs * batch_sizes(samples, config.batch_size, config.dataset.drop_last)
        if issubclass(setup.algorithm, OwnSteps):
            return setup.algorithm.steps(config.algorithm, client, setup.population, sizes)
        return [*sizes]

    def open(self, client: int) -> LocalSession:
        """Begin a client's round, on a seat that is free."""
        seat, setup = self._seat(), self._setup
        context = self._context(client, seat)
        seed = rng.derive(setup.config.seed, round=setup.round, client=client, stream="client")

        def leave(seconds: float) -> None:
            seat.taken = False
            setup.seconds["client"] += seconds

        return LocalSession(setup.algorithm, context, Workplace(setup.blueprint, seed), leave)

    def _seat(self) -> Seat:
        seat = next((seat for seat in self.seats if not seat.taken), None)
        if seat is None:
            blueprint = self._setup.blueprint
            seat = Seat(blueprint, blueprint.parts(self._setup.algorithm.layout.client))
            self.seats.append(seat)
        return seat

    def _context(self, client: int, seat: Seat) -> ClientContext:
        setup = self._setup
        seat.take(setup.blueprint.for_client(client))
        return ClientContext(
            seat,
            id=client,
            round=setup.round,
            seed=setup.config.seed,
            config=setup.config.algorithm,
            state=ClientState(setup.stores["clients"], client),
            data=self.data(client),
            steps=self.steps(client),
        )


class Clients(Seats):
    """The clients of a federation, all of them in this process.

    Those on other machines are a subclass; what it needs beyond this is here with nothing to do.

    Attributes:
        may_repeat: a round may be given up, and begun again.
        here: they compute in this process.
        taken_up: what the checkpoint that the run goes on from says of clients elsewhere.
    """

    may_repeat = False
    here = True

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        self._federation = federation
        self.taken_up: dict[str, Any] = {}

    def epoch(self, client: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over a client's training data; no batch where the client has none to train on."""
        return self.data(client).batches(generator, 1) if self._federation.can_train(client) else iter(())

    def can_train(self, client: int) -> bool:
        """Whether a client has a batch that can be trained on."""
        return self._federation.has_batches(client)

    def gather(self, cohort: list[int]) -> None:
        """Return when enough of the cohort are there to begin a round."""

    def train(self, cohort: list[int], drop: Callable[[int], None], server: ServerParty, ledger: Ledger) -> RoundReport:
        """One round of a cohort.

        Args:
            drop: told of each client that is lost.

        Raises:
            RoundLostError: too few are left; the round has to be begun again.
        """
        channel = Channel(ledger)
        if cohort and self.compute_together:
            return self.train_together(cohort, server, channel)
        return SCHEDULES[self._federation.algorithm.schedule](cohort, self.open, drop, server, channel)

    def counted(self, report: RoundReport) -> None:
        """A round is over: what its survivors staged counts."""

    def recorded(self, record: RoundRecord) -> None:
        """A round has been tested, if it was time to, and its figures are complete."""

    def scores(self) -> dict[int, ClientScores]:
        """What the round's test asks of each client."""
        federation = self._federation
        return {client: federation.evaluator.of_client(client) for client in range(federation.population)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to say of clients elsewhere."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint."""
        self.taken_up = dict(state)

    def checkpointed(self) -> None:
        """A checkpoint is in place: nothing from before it will be asked for again."""

    @cached_property
    def compute_together(self) -> bool:
        """Whether one copy of the client's parts stands for those of a whole cohort: see ``Cohort``.

        The method has to say that clients hold equal weights; their step has to be linear in the gradient, as that of
        SGD is, and no sample may depend on another's, as through BatchNorm, or on a random number, as with dropout.
        """
        federation, algorithm = self._federation, self._federation.algorithm
        if not issubclass(algorithm, ComputesTogether):
            return False
        names = algorithm.layout.client
        modules = chain.from_iterable(part.modules() for part in federation.blueprint.parts(names).values())
        return (
            algorithm.computes_together(federation.config.algorithm)
            and federation.config.optimizer_for(names[0]).name == "sgd"
            and not any(_depends(module) for module in modules if not is_ghost(module))
        )

    def train_together(self, cohort: list[int], server: ServerParty, channel: Channel) -> RoundReport:
        """One round of a cohort of equal weights, on one seat."""
        federation, algorithm, seat = self._federation, self._federation.algorithm, self._seat()
        assert issubclass(algorithm, ComputesTogether), "see compute_together"
        contexts = [self._context(client, seat) for client in cohort]
        weights = [federation.server.ctx.weight(context.id, context.samples) for context in contexts]
        seed = rng.derive(federation.config.seed, round=federation.round, stream="cohort's work")
        work = Workplace(federation.blueprint, seed)
        try:
            together = Cohort(contexts, weights, federation.device)
            return compute_together(algorithm.together, together, work, server, channel)
        finally:
            seat.taken = False
            federation.seconds["client"] += work.seconds


def _depends(module: nn.Module) -> bool:
    """Whether what a module makes of a sample depends on others, or on a random number."""
    return isinstance(module, BATCH_NORM) or (isinstance(module, DROPOUT) and module.p > 0)
