"""Clients in this process: where each sits, what data it has, and how its round goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import nn

from cutlayer.algorithms.mixins import ComputesTogether
from cutlayer.models.cutting import is_ghost
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.ledger import Ledger
from cutlayer.runtime.parties.blueprint import BATCH_NORM
from cutlayer.runtime.parties.cohort import Cohort
from cutlayer.runtime.parties.contexts import ClientContext, ClientState, Seat
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.records.history import RoundRecord
from cutlayer.runtime.rounds.evaluator import Evaluator
from cutlayer.runtime.rounds.schedule import SCHEDULES, RoundReport, compute_together
from cutlayer.runtime.rounds.session import Channel, LocalSession, Serving, Session, Workplace
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.rounds.tuner import Tuner
from cutlayer.runtime.scoring.scores import ClientScores, Measured

DROPOUT = nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage]  the base of all of them


class Seats:
    """Clients of one process, opened one after another; a seat, with a set of parts, is used by many.

    Args:
        store: where the clients keep their rows, but for those that are opened with rows of their own.

    Attributes:
        seconds: that the clients have computed.
    """

    def __init__(self, setup: Setup, store: Store) -> None:
        self.setup, self._store = setup, store
        self.seats: list[Seat] = []
        self.seconds: float = 0.0

    def open(self, client: int, round: int, state: ClientState | None = None) -> Session:
        """Begin a client's round (from 0), on a seat that is free."""
        seat, setup = self.seat(), self.setup
        context = self.context(client, round, seat, state)
        seed = rng.derive(setup.config.seed, round=round, client=client, stream="client")

        def leave(seconds: float) -> None:
            seat.taken = False
            self.seconds += seconds

        work = Workplace(setup.blueprint, seed, lambda: setup.memory(f"the round of client {client}"))
        return LocalSession(setup.algorithm, context, work, leave)

    def seat(self) -> Seat:
        """A seat that is free."""
        seat = next((seat for seat in self.seats if not seat.taken), None)
        if seat is None:
            blueprint = self.setup.blueprint
            seat = Seat(blueprint, blueprint.parts(self.setup.algorithm.layout.client))
            self.seats.append(seat)
        return seat

    def context(self, client: int, round: int, seat: Seat, state: ClientState | None = None) -> ClientContext:
        """A client in a round, on a seat that it takes."""
        setup = self.setup
        seat.take(setup.blueprint.for_client(client))
        return ClientContext(
            seat,
            id=client,
            round=round,
            seed=setup.config.seed,
            config=setup.config.algorithm,
            state=state or ClientState(self._store, client),
            data=setup.data(client),
            steps=setup.steps(client),
        )


class LocalClients(Seats):
    """The clients of a federation, all of them in this process; see ``Clients``."""

    may_repeat = False
    here = True

    def can_train(self, client: int) -> bool:
        return self.setup.has_batches(client)

    def gather(self, cohort: list[int], round: int) -> None:
        if self.setup.algorithm.schedule == "lockstep" and not self.compute_together:
            self._check_memory(len(cohort))

    def _check_memory(self, clients: int) -> None:
        setup = self.setup
        needed = clients * setup.blueprint.training_bytes(setup.algorithm.layout.client)
        available = _available_memory(setup.device)
        if needed > available:
            raise ConfigError(
                "frac",
                setup.config.frac,
                f"a cohort that fits in memory: {clients} clients in lockstep need about {needed / 1e9:.1f} GB, "
                f"{available / 1e9:.1f} GB are free",
            )

    def train(
        self, cohort: list[int], round: int, drop: Callable[[int], None], server: Serving, ledger: Ledger
    ) -> RoundReport:
        channel, before = Channel(ledger), self.seconds
        if cohort and self.compute_together:
            report = self._train_together(cohort, round, server, channel)
        else:
            schedule = SCHEDULES[self.setup.algorithm.schedule]
            report = schedule(cohort, lambda client: self.open(client, round), drop, server, channel)
        report.seconds = self.seconds - before
        return report

    def on_counted(self, report: RoundReport) -> None:
        pass  # the store has it

    def on_recorded(self, record: RoundRecord) -> None:
        pass

    def scores(self, evaluator: Evaluator) -> dict[int, ClientScores]:
        return {client: evaluator.of_client(client) for client in range(self.setup.population)}

    def tuned(self, tuner: Tuner, clients: Sequence[int]) -> Iterator[list[Measured]]:
        return map(tuner.scores, clients)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def on_checkpoint(self) -> None:
        pass

    @cached_property
    def compute_together(self) -> bool:
        """Whether one copy of the client's parts stands for those of a whole cohort: see ``Cohort``.

        The method has to say that clients hold equal weights; their step has to be linear in the gradient, as that of
        SGD is, with an optimizer that ends with the round, and no sample may depend on another's, as through BatchNorm,
        or on a random number, as with dropout.
        """
        setup, algorithm = self.setup, self.setup.algorithm
        if not issubclass(algorithm, ComputesTogether):
            return False
        names = algorithm.layout.client
        modules = chain.from_iterable(part.modules() for part in setup.blueprint.parts(names).values())
        return (
            algorithm.computes_together(setup.config.algorithm)
            and setup.config.optimizer_for(names[0]).name == "sgd"
            and not any(setup.blueprint.keeps_optimizer[name] for name in names)
            and not any(_depends(module) for module in modules if not is_ghost(module))
        )

    def _train_together(self, cohort: list[int], round: int, server: Serving, channel: Channel) -> RoundReport:
        """One round of a cohort of equal weights, on one seat."""
        setup, algorithm, seat = self.setup, self.setup.algorithm, self.seat()
        assert issubclass(algorithm, ComputesTogether), "see compute_together"
        contexts = [self.context(client, round, seat) for client in cohort]
        weights = [setup.config.aggregate.weight(context.id, context.samples) for context in contexts]
        seed = rng.derive(setup.config.seed, round=round, stream="cohort's work")
        work = Workplace(setup.blueprint, seed)
        try:
            together = Cohort(contexts, weights, setup.device)
            return compute_together(algorithm.together, together, work, server, channel)
        finally:
            seat.taken = False
            self.seconds += work.seconds


def _depends(module: nn.Module) -> bool:
    """Whether what a module makes of a sample depends on others, or on a random number."""
    return isinstance(module, BATCH_NORM) or (isinstance(module, DROPOUT) and module.p > 0)


def _available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
