"""Clients in this process: where each sits, what data it has, and how its round goes."""

from __future__ import annotations

import logging
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
from cutlayer.runtime.parties.blueprint import BATCH_NORM, DROPOUT
from cutlayer.runtime.parties.cohort import Cohort
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.records.history import RoundRecord
from cutlayer.runtime.rounds.choosing import choose
from cutlayer.runtime.rounds.evaluator import Evaluator
from cutlayer.runtime.rounds.schedule import SCHEDULES, RoundReport, compute_together
from cutlayer.runtime.rounds.servers import make_server
from cutlayer.runtime.rounds.session import Channel, ServerParty, Serving, Workplace
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.rounds.together import TogetherSeats
from cutlayer.runtime.rounds.tuner import Tuner
from cutlayer.runtime.scoring.scores import ClientScores, Measured

log = logging.getLogger(__name__)

# Memory of a client that is computed with others, at a guess, in that of its parts while they train.
_ACTIVATIONS = 4


class LocalClients(TogetherSeats):
    """The clients of a federation, all of them in this process; see ``Clients``."""

    here = True

    def __init__(self, setup: Setup, store: Store) -> None:
        super().__init__(setup, store)
        self._chosen: int | None = None  # with cohort.together=auto

    @property
    def may_repeat(self) -> bool:
        return self.setup.config.cohort.together != "never" and self.copies_apart

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
        before, most = self.seconds, 0 if cohort and self.compute_together else self._most(len(cohort))
        if not most:
            report = self._train_equal(cohort, round, server, Channel(ledger))
        elif most > 1:
            report = self.train_together(cohort, round, most, drop, server, ledger)
        else:
            schedule = SCHEDULES[self.setup.algorithm.schedule]
            report = schedule(cohort, lambda client: self.open(client, round), drop, server, Channel(ledger))
        report.seconds = self.seconds - before
        return report

    def _most(self, cohort: int) -> int:
        """How many clients are computed as one."""
        asked = self.setup.config.cohort.together
        if asked == "never" or self.setup.algorithm.in_turn or cohort < 2:
            return 1
        if self.setup.config.precision == "bf16":
            self.note_reasons(["torch.vmap computes convolutions without autocast (precision=bf16)"])
            return 1
        if asked != "auto":
            return asked
        if self._chosen is None:
            each = self.setup.blueprint.training_bytes(self.setup.algorithm.layout.client)
            room = _available_memory(self.setup.device) // max(1, _ACTIVATIONS * each)
            self._chosen, gain = choose(self.setup, cohort, room, TrialSide)
            told = f"{self._chosen} at a time" if self._chosen > 1 else "never"
            log.info("cohort.together=auto: %s (%.2f times as fast as one by one)", told, gain)
        return self._chosen

    def on_counted(self, report: RoundReport) -> None:
        pass  # the store has it

    def on_recorded(self, record: RoundRecord) -> None:
        pass

    def scores(self, evaluator: Evaluator) -> dict[int, ClientScores]:
        return {client: evaluator.of_client(client) for client in range(self.setup.population)}

    def tuned(self, tuner: Tuner, clients: Sequence[int]) -> Iterator[list[Measured]]:
        return map(tuner.scores, clients)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._chosen is None else {"together": self._chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._chosen = state.get("together")

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

    def _train_equal(self, cohort: list[int], round: int, server: Serving, channel: Channel) -> RoundReport:
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


class TrialSide:
    """Clients and a server as they begin, and rounds of theirs that are none of a run; see ``choosing``."""

    def __init__(self, setup: Setup) -> None:
        self._stores = [Store(None, name, device=setup.device) for name in ("clients", "server")]
        self._clients, self._server = LocalClients(setup, self._stores[0]), make_server(setup, self._stores[1])

    @property
    def groups(self) -> int:
        """How often several clients were computed as one so far."""
        return self._clients.groups

    def play(self, cohort: list[int], round: int) -> RoundReport:
        """One round (from 0)."""
        setup = self._clients.setup
        work = Workplace(setup.blueprint, rng.derive(setup.config.seed, round=round, stream="trial"))
        server = ServerParty(self._server, work)
        server.open_round(min(round, setup.config.rounds - 1), cohort)
        report = self._clients.train(cohort, round, lambda _: None, server, Ledger())
        server.close_round()
        for store in self._stores:
            store.commit()
        return report


def _depends(module: nn.Module) -> bool:
    """Whether what a module makes of a sample depends on others, or on a random number."""
    return isinstance(module, BATCH_NORM) or (isinstance(module, DROPOUT) and module.p > 0)


def _available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
