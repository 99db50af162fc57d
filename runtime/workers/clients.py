"""Clients at the workers of a run: where each one's round is computed, and how it comes to the schedule."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from cutlayer.algorithms.mixins import CopyPerClient
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import MODEL, flatten
from cutlayer.runtime.messages.frames import pieces
from cutlayer.runtime.messages.ledger import Ledger
from cutlayer.runtime.parties.store import Row, Store
from cutlayer.runtime.rounds.evaluator import Evaluator
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.learnt import Learnt
from cutlayer.runtime.rounds.local_clients import LocalClients
from cutlayer.runtime.rounds.schedule import SCHEDULES, RoundReport
from cutlayer.runtime.rounds.session import ArrivingChannel, Serving
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.rounds.tuner import Tuner
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from cutlayer.runtime.scoring.scores import ClientScores, Measured
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.workers.beside import Lender, NamingChannel
from cutlayer.runtime.workers.pool import Inbox, Pool, Worker
from cutlayer.runtime.workers.processes import Processes, preload
from cutlayer.runtime.workers.session import AtWork, MemoryTold, SessionWithCopy, WorkerSession
from cutlayer.runtime.workers.talk import Engine, Failed, Frame, Hold, Test


def _engine(setup: Setup) -> Engine:
    if setup.config.engine == "ray":
        from cutlayer.runtime.workers.actors import Actors  # late: it needs an extra

        return Actors(setup)
    return Processes(setup)


class AtWorkers:
    """Clients of a run at ``workers`` of its engine; see ``ClientsPlace``.

    Args:
        everyone: all clients are at work, not those of a round, as where a finished run is fine-tuned.
    """

    def __init__(self, config: RunConfig, *, everyone: bool = False) -> None:
        self._everyone = everyone
        if config.engine == "processes":
            preload()

    def clients(self, setup: Setup, store: Store) -> WorkerClients:
        """The clients of the run's federation.

        Raises:
            ConfigError: more workers than clients at work.
        """
        self._clients = WorkerClients(setup, store, everyone=self._everyone)
        return self._clients

    def check(self, setup: Setup) -> None:
        """All that is measured after training can be: fine-tuning at the workers, the rest in the run's own process."""

    @property
    def processes(self) -> int:
        """The workers."""
        return self._clients.count

    @contextlib.contextmanager
    def connected(self, federation: Federation, accuracy: float | None) -> Generator[None]:
        """Workers are there within the block, from the first round on."""
        try:
            yield
        finally:
            self._clients.close()


class WorkerClients(LocalClients):
    """The clients of a federation at workers; what they keep, and what is tested, is in the run's own process.

    A client may be at any worker: it is the same wherever it runs, its rows go with it, and its messages are served in
    the order of the cohort. What is gained is what clients compute between two messages that they wait for.

    Attributes:
        count: the number of workers. pool: these.
    """

    def __init__(self, setup: Setup, store: Store, *, everyone: bool = False) -> None:
        super().__init__(setup, store)
        self._engine = _engine(setup)
        self.count = workers(setup, self._engine, everyone=everyone)
        self.pool = Pool(self.count, lambda number: self._engine.begin(number, self.count))
        self._beside = issubclass(setup.algorithm.Server, CopyPerClient)

    @property
    def may_repeat(self) -> bool:
        """Where the server answers within a round, a round with a worker that dies is repeated from its start."""
        arrows = self.setup.algorithm.traffic
        answers = any(flow.direction == "down" and flow.kind != MODEL for flow in arrows)
        return answers or not arrows

    def train(
        self, cohort: list[int], round: int, drop: Callable[[int], None], server: Serving, ledger: Ledger
    ) -> RoundReport:
        if cohort and self.compute_together:
            return super().train(cohort, round, drop, server, ledger)
        algorithm, before = self.setup.algorithm, self.seconds
        lockstep = algorithm.schedule == "lockstep"
        ahead = len(cohort) if lockstep else 0 if algorithm.in_turn else 2 * self.count
        channel = ArrivingChannel(ledger, ahead, self.setup.device)
        lender = Lender(server) if self._beside else None
        if lender is not None:
            server, channel = lender, NamingChannel(ledger, ahead, self.setup.device)

        try:
            report = SCHEDULES[algorithm.schedule](
                cohort, lambda client: self._begin(client, round, lender), drop, server, channel
            )
        finally:
            self._beside = lender is not None and not lender.drew
        report.seconds = self.seconds - before
        self.pool.on_round()
        return report

    def _begin(self, client: int, round: int, lender: Lender | None) -> WorkerSession:
        at = AtWork(self.pool, self._store, round, self._on_ended, self.setup.memory)
        return WorkerSession(at, client) if lender is None else SessionWithCopy(at, client, lender)

    def _on_ended(self, seconds: float) -> None:
        self.seconds += seconds

    def scores(self, evaluator: Evaluator) -> dict[int, ClientScores]:
        """At the workers where clients have models of their own; else a model is tested once, for all."""
        algorithm = self.setup.algorithm
        if not (self.setup.personal or algorithm.paths):
            return super().scores(evaluator)
        everyone = range(self.setup.population)
        held = {name: part.state_dict() for name, part in evaluator.learnt.held.items()}
        return dict(zip(everyone, self._tested(everyone, evaluator.learnt, held), strict=True))

    def tuned(self, tuner: Tuner, clients: Sequence[int]) -> Iterator[list[Measured]]:
        yield from self._tested(clients, tuner.learnt, tuner.held, tuner.config)
        self.pool.on_round()

    def _tested(
        self,
        clients: Iterable[int],
        learnt: Learnt,
        held: Mapping[str, Mapping[str, Tensor]],
        tuning: PersonalizeConfig | None = None,
    ) -> Iterator[Any]:
        """What tests of clients at workers find, in the clients' order.

        Args:
            learnt: has the parts that clients keep. held: the states of the server's parts.
        """
        algorithm, holders = self.setup.algorithm, _Holders(self.pool, held)
        named = dict.fromkeys(chain(algorithm.layout.whole, *algorithm.paths.values()))
        own = [name for name in named if learnt.is_own(name)]
        begun: deque[_BegunTest] = deque()
        for client in clients:
            rows = {name: row for name in own if (row := learnt.own(client, name)) is not None}
            begun.append(_BegunTest(holders, client, rows, tuning, self.setup.memory))
            if len(begun) > 2 * self.count:
                yield begun.popleft().end()
        while begun:
            yield begun.popleft().end()

    def close(self) -> None:
        """End the workers."""
        self.pool.close()
        self._engine.close()


class _Holders:
    """Workers that are given the server's parts before the first test there."""

    def __init__(self, pool: Pool, held: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._pool, self._given = pool, set[Worker]()
        self._parts = pool.common(
            {key: each for name, state in held.items() for key, each in flatten(name, state).items()}
        )

    def begin(self, test: Test, rows: Sequence[Frame], inbox: Inbox) -> tuple[Worker, int]:
        """Begin a test; where, and as which session."""
        worker, number = self._pool.idlest(), self._pool.number()
        if worker not in self._given:
            self._given.add(worker)
            worker.say(Hold(number), common=self._parts)
        worker.take(number, test.client, inbox)
        worker.say(test._replace(session=number), rows)
        return worker, number


class _BegunTest:
    """A client's test at a worker; where that dies, at another."""

    def __init__(
        self,
        holders: _Holders,
        client: int,
        rows: Mapping[str, Row],
        tuning: PersonalizeConfig | None,
        memory: MemoryTold,
    ) -> None:
        self._holders, self._rows, self._memory = holders, [pieces(row) for row in rows.values()], memory
        self._test = Test(0, client, tuple(rows), tuning)
        self._begin()

    def _begin(self) -> None:
        self._inbox: Inbox = SimpleQueue()
        self._worker, self._number = self._holders.begin(self._test, self._rows, self._inbox)

    def end(self) -> Any:
        """What it finds."""
        while True:
            came = self._inbox.get()
            self._worker.leave(self._number)
            if came is None:
                self._begin()
                continue
            head, _ = came
            if isinstance(head, Failed):
                with self._memory(f"the test of client {self._test.client}"):
                    raise head.error
            return head.scores


def workers(setup: Setup, engine: Engine, *, everyone: bool) -> int:
    """How many workers there are: as configured, or one for each core or GPU, as far as there are clients at work.

    Raises:
        ConfigError: more than these.
    """
    count = setup.config.workers
    clients, who = (setup.population, "run") if everyone else (len(setup.cohort(0)), "round")
    if count == "auto":
        return min(clients, engine.most)
    if count > clients:
        raise ConfigError("workers", count, f"at most {clients}, the clients of a {who}")
    return count
