"""Clients on other machines: who is there, their rounds, and what the server knows of what they keep."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import MODEL, ClientDroppedError, Payload, flatten
from cutlayer.runtime.messages.bounds import Limits, WireError, shown
from cutlayer.runtime.messages.ledger import Ledger
from cutlayer.runtime.network.agreement import (
    PROTOCOL,
    compare_data,
    data_facts,
    fingerprint,
    peer_text,
    shared,
    version,
)
from cutlayer.runtime.network.check import check_values
from cutlayer.runtime.network.links import LinkLostError
from cutlayer.runtime.network.server.audit import Audit
from cutlayer.runtime.network.server.connection import Connection
from cutlayer.runtime.network.server.guarded import GuardedServer
from cutlayer.runtime.network.server.hub import ClientRefusedError, Greeting, Hub, missing
from cutlayer.runtime.network.server.rehearsal import rehearse
from cutlayer.runtime.network.server.remote_session import A_STEP, MOST_MESSAGES, RemoteSession
from cutlayer.runtime.network.wire import Head, What, outgoing
from cutlayer.runtime.parties.blueprint import Parts
from cutlayer.runtime.records.history import RoundRecord
from cutlayer.runtime.rounds.evaluator import VALIDATION, Evaluator
from cutlayer.runtime.rounds.schedule import SCHEDULES, RoundLostError, RoundReport
from cutlayer.runtime.rounds.session import ArrivingChannel, Serving
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.rounds.tuner import Tuner
from cutlayer.runtime.scoring.scores import ClientScores, Measured
from cutlayer.runtime.transport import GrpcTransport
from cutlayer.tasks import Score

log = logging.getLogger(__name__)

_NAMED = 20  # clients in a line of the log
_WORST = 1e39  # of a loss: more than any float32
_VALUES = 4096  # of evaluations of one client's test
_LONGEST_PAUSE_S = 37.0  # of a client that tries again, and a little more


class RemoteClients:
    """The clients of a federation, on machines of their own; see ``Clients``.

    Args:
        run: name of the run. folder: of the run, for who joined and left; None writes nothing.

    Attributes:
        hub: where they connect, once they may.
        record: the last round that is over. accuracy: of the last test.
        attempt: of the round that comes, from 1; 0 before it begins. repeats: rounds that were begun again.
        waiting: whom the server waits for, "" for nobody, and since when (seconds since 1970).
        watch: called when any of this changes, from any thread; cheap.
    """

    may_repeat = True
    here = False

    def __init__(self, setup: Setup, run: str, folder: Path | None = None) -> None:
        assert isinstance(setup.config.transport, GrpcTransport)
        self._setup, self._config = setup, setup.config.transport
        self._run, self._folder = run, folder
        self._shared = shared(setup.config)
        self._divided = setup.config.dataset.divided
        self._last: dict[int, int] = {}  # the last round of each client that counted, if it keeps a state
        self._durable: dict[int, int] = {}  # the same, at the last checkpoint
        self._round = 0  # that comes
        self._reports: dict[int, dict[str, Any]] = {}
        self._facts: dict[int, dict[str, Any]] = {}
        self._names: dict[int, set[str]] = {}  # of each client's metrics: a column of the results for each
        self._new = True
        self.record: RoundRecord | None = None
        self.accuracy: float | None = None
        self.attempt = self.repeats = 0
        self.waiting = ("", 0.0)
        self.watch: Callable[[], None] = lambda: None

    def listen(self, round: int) -> None:
        """Let clients join, before the round (from 0) that comes.

        Raises:
            ConfigError: the address cannot be listened on, or needs certificates.
        """
        self._round, setup = round, self._setup
        self._data = data_facts(setup.dataset, divided=self._divided, base=setup.config.model.base)
        self._expected = rehearse(setup.config, setup.dataset)
        greeting = Greeting(self._welcome, self._admit, lambda: self.watch(), Audit(self._folder))
        self.hub = Hub(self._config, setup.population, greeting)

    # ------------------------------------------------------------------ letting clients in (on the hub's thread)

    def _welcome(self, client: int, hello: dict[str, Any]) -> dict[str, Any]:
        if hello.get("protocol") != PROTOCOL or hello.get("version") != version():
            theirs = peer_text(hello.get("version"))
            raise ClientRefusedError(f"the client runs version {theirs} of the platform, the server {version()}")
        return {"config": self._shared, "run": self._run, "round": self._round, "rounds": self._setup.config.rounds}

    def _admit(self, client: int, facts: dict[str, Any]) -> Limits:
        setup = self._setup
        if facts.get("config") != fingerprint(self._shared):
            raise ClientRefusedError("the client has another configuration than the server")
        data = facts.get("data")
        differs = compare_data(self._data, cast(dict[str, Any], data) if isinstance(data, dict) else {})
        samples = facts.get("samples")
        if differs is not None:
            raise ClientRefusedError(differs)
        if type(samples) is not int or not 0 <= samples < 2**48 or type(facts.get("trains")) is not bool:
            raise ClientRefusedError("the client does not say how many samples it has")
        if self._divided and samples != int(setup.partition.sizes[client]):
            raise ClientRefusedError(f"the client has {samples} samples; its share is {setup.partition.sizes[client]}")
        self._facts[client] = facts
        return replace(self._expected.limits, message_bytes=self._config.message_bytes)

    # ------------------------------------------------------------------ rounds

    def can_train(self, client: int) -> bool:
        if self._divided:
            return self._setup.has_batches(client)
        return client not in self._facts or bool(self._facts[client]["trains"])

    def gather(self, cohort: list[int], round: int) -> None:
        self._round, setup = round, self._setup
        needed = self._needed(cohort)
        self._wait(cohort, needed, f"for round {round + 1}")
        if self._new:
            self._new = False
            self._wait(cohort, len(cohort), "beyond the quorum", seconds=self._config.gather)
        known = setup.population if self._divided else len(self._facts)
        if known == setup.population and not any(map(self.can_train, range(known))):
            reason = "fewer, or dataset.drop_last=auto: every client has reported that it has no batch to train on"
            raise ConfigError("batch_size", setup.config.batch_size, reason)

    def _needed(self, cohort: list[int]) -> int:
        return math.ceil(self._config.quorum * len(cohort) - 1e-9)

    def _wait(self, cohort: list[int], needed: int, what: str, seconds: float | None = None) -> None:
        until = math.inf if seconds is None else time.monotonic() + seconds
        reported: list[int] = []
        began = time.time()
        with self.hub.changed:
            while len(absent := missing(cohort, self.hub.connections)) > len(cohort) - needed:
                left = until - time.monotonic()
                if left <= 0:
                    break
                if absent != reported:
                    self.waiting = (f"{what}: {_absent(absent, len(cohort))}", began)
                    log.info("waiting %s", self.waiting[0])
                    self.watch()
                    reported = absent
                self.hub.changed.wait(None if left == math.inf else left)
        self.waiting = ("", 0.0)
        self.watch()

    def disconnect_all(self, *, everyone: bool = False) -> None:
        """Wait a little for clients that are away: they come again, and have to learn that the run is over.

        One that was lost some seconds ago comes again within fewer, by the way in which its pauses grow, and any other
        within the longest of them, if it can.

        Args:
            everyone: also for those that have not joined this process: the run was over before it began.
        """
        away = {
            client: time.time() - seen.failed
            for client, seen in enumerate(self.hub.seen)
            if client not in self.hub.connections and (seen.joined or everyone)
        }
        if away:
            seconds = min(_LONGEST_PAUSE_S, 1 + max(away.values()))
            self._wait(sorted(away), len(away), "to say that the run is over", seconds=seconds)

    def train(
        self, cohort: list[int], round: int, drop: Callable[[int], None], server: Serving, ledger: Ledger
    ) -> RoundReport:
        algorithm = self._setup.algorithm
        self.repeats += self.attempt > 0
        self.attempt += 1
        lost: list[int] = []
        there = [client for client in cohort if client in self.hub.connections]
        until = math.inf if self._config.deadline is None else time.monotonic() + self._config.deadline

        def lose(client: int) -> None:
            drop(client)
            lost.append(client)
            if len(cohort) - len(lost) < self._needed(cohort):
                raise RoundLostError(f"lost client {', '.join(map(str, lost))} of {len(cohort)}")

        absent = missing(cohort, there)
        for client in absent:
            lose(client)
            server.forget(client)
        ahead = len(cohort) if algorithm.schedule == "lockstep" else 0 if algorithm.in_turn else self._config.ahead
        self._reports.clear()
        channel, guarded = ArrivingChannel(ledger, ahead, self._setup.device), GuardedServer(server, self._blame)
        report = SCHEDULES[algorithm.schedule](there, lambda client: self._open(client, until), lose, guarded, channel)
        report.dropped += absent
        report.seconds = sum(_seconds(self._reports.get(client, {})) for client in report.survivors)
        return report

    def _open(self, client: int, until: float) -> RemoteSession:
        connection = self.hub.connections.get(client)
        if connection is None:
            raise ClientDroppedError

        def close(report: dict[str, Any] | None) -> None:
            if report is not None:
                self._reports[client] = report

        return RemoteSession(
            connection,
            self._order(client),
            self._check,
            timeout=self._config.timeout,
            until=until,
            on_close=close,
            names=self._names.setdefault(client, set()),
            most=MOST_MESSAGES + A_STEP * self._steps(client),
        )

    def _steps(self, client: int) -> int:
        """Of a client in a round; where only the client knows its data, by what it has reported about them."""
        if self._divided:
            return len(self._setup.steps(client))
        config = self._setup.config
        return config.local_epochs * math.ceil(self._facts[client]["samples"] / config.batch_size)

    def _order(self, client: int) -> dict[str, Any]:
        """What a client has to know before a round: which state of its own to restore."""
        return {
            "round": self._round,
            "last": self._last.get(client),
            "needed": self._durable.get(client),
        }

    def _check(self, kind: str, fields: Payload) -> None:
        handled = any(hasattr(self._setup.algorithm.Server, f"on_{kind}{end}") for end in ("", "_cohort"))
        if kind != MODEL and (not handled or kind.endswith("_cohort")):
            raise WireError(f"message of kind {kind!r}, which this method does not have")
        self._expected.check(kind, fields)
        check_values(fields, lambda y: self._setup.blueprint.task.wrong(y, self._setup.dataset.info))

    def _blame(self, client: int, reason: str) -> None:
        """Disconnect a client whose message the server could not use, for the exception that is handled now."""
        self.hub.quiet(f"fault of client {client}", "client %d is lost: %s", client, reason, trace=True)
        connection = self.hub.connections.get(client)
        if connection is not None:
            connection.dismiss({"error": reason, "later": False})

    def on_recorded(self, record: RoundRecord) -> None:
        self.record, self.accuracy = record, self.accuracy if record.test_acc is None else record.test_acc
        self.watch()

    def on_counted(self, report: RoundReport) -> None:
        self.attempt = 0
        for client in report.survivors:
            if self._reports.get(client, {}).get("keeps") is True:
                self._last[client] = self._round
            else:
                self._last.pop(client, None)
        self._round += 1

    # ------------------------------------------------------------------ evaluation

    def tuned(self, tuner: Tuner, clients: Sequence[int]) -> Iterator[list[Measured]]:
        raise NotImplementedError("refused before the run begins, see Elsewhere.check")

    def scores(self, evaluator: Evaluator) -> dict[int, ClientScores]:
        setup = self._setup
        everyone = list(range(setup.population))
        if self._divided and not setup.personal and not setup.algorithm.paths:
            return {client: evaluator.of_client(client) for client in everyone}
        needed, found = self._needed(everyone), dict[int, ClientScores]()
        while True:
            there = [client for client in missing(everyone, found) if client in self.hub.connections]
            found |= self._ask(there, evaluator.learnt.held)
            if len(found) >= needed:
                return dict(sorted(found.items()))
            self._wait(missing(everyone, found), needed - len(found), "for the test")

    def _ask(self, clients: list[int], held: Parts) -> dict[int, ClientScores]:
        """What the test asks of each of these clients, with the server's parts; without those lost meanwhile."""
        there = {client: self.hub.connections.get(client) for client in clients}
        asked = {client: connection for client, connection in there.items() if connection is not None}
        self._send_test(asked, held)
        found: dict[int, ClientScores] = {}
        for client, connection in asked.items():
            try:
                found[client] = self._answer(connection)
            except (LinkLostError, WireError) as error:
                log.warning("client %d is lost in the test: %s", client, error)
                connection.cut(str(error))
        return found

    def _send_test(self, asked: Mapping[int, Connection], held: Parts) -> None:
        setup, parts = self._setup, dict[str, Any]()
        names = {*setup.algorithm.layout.whole, *chain.from_iterable(setup.algorithm.paths.values())}
        for name in sorted(names & held.keys() - ({*setup.personal} - {*setup.algorithm.partly})):
            parts |= flatten(name, held[name].state_dict())
        # One number, and so the same bytes for all: in memory they are once, however many clients there are.
        session = 1 + max((connection.session for connection in asked.values()), default=0)
        pieces = list(outgoing(Head(What.EVALUATE, session), parts))
        for client, connection in asked.items():
            connection.session = session
            connection.send(Head(What.ROUND, session), self._order(client))
            connection.send_pieces(pieces)
            connection.become("testing")

    def _answer(self, connection: Connection) -> ClientScores:
        while True:
            connection.expect(What.EVALUATED, What.TELL, What.ASK, What.METRICS, What.REPORT, What.UPLOAD, What.FAILED)
            received = connection.receive(self._config.timeout)
            if received.head.session == connection.session:
                break
        if received.head.what is not What.EVALUATED:
            raise WireError(f"message {received.head.what.name} in the test")
        connection.become("idle")
        return self._scores_of(cast(dict[str, Any], received.body))

    def _scores_of(self, body: dict[str, Any]) -> ClientScores:
        """What a client reports of its test."""
        known = {VALIDATION, "client_acc", "local_acc"}
        known |= {f"{name}_{of}acc" for name in self._setup.algorithm.paths for of in ("", "local_")}
        scores = ClientScores()
        for name, each in body.items():
            if name not in known:
                raise WireError(f"scores of {shown(name)}, which is not tested")
            scores[name] = self._score_of(each)
        return scores

    def _score_of(self, reported: object) -> Measured:
        each = cast(list[Any], reported) if isinstance(reported, list) else []
        one = torch.ones(1)
        own = self._setup.blueprint.task.figures(Score(one, one, one, one))  # the task's, such as perplexity
        asked = (*self._setup.config.evaluations, *own)
        more = 4 if asked else 3
        if [type(value) for value in each] not in ([int, float, float], [int, float, float, dict][:more]):
            raise WireError("scores that are no numbers")
        score = Measured(*each)
        if not (0 < score.samples < 2**48 and 0 <= score.accuracy <= 1 and abs(score.loss) <= _WORST):
            raise WireError("scores that cannot be")
        for name, value in score.values.items():
            if name.partition("/")[0] not in asked or len(score.values) > _VALUES:
                raise WireError(f"an evaluation {shown(name)}, which is not asked for")
            if type(value) is not float or not abs(value) <= _WORST:
                raise WireError("evaluations that are no numbers")
        return score

    # ------------------------------------------------------------------ checkpoints and the end

    def state_dict(self) -> dict[str, Any]:
        return {"last": {str(client): round for client, round in self._last.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = {int(client): int(round) for client, round in state.get("last", {}).items()}
        self._durable = dict(self._last)

    def on_checkpoint(self) -> None:
        self._durable = dict(self._last)


def _seconds(reported: Mapping[str, Any]) -> float:
    """What a client reports of the time that it computed, if that can be."""
    seconds = reported.get("seconds")
    return seconds if isinstance(seconds, int | float) and 0 <= seconds < 1e9 else 0.0


def _absent(absent: list[int], of: int) -> str:
    names = ", ".join(map(str, sorted(absent)[:_NAMED])) + (", ..." if len(absent) > _NAMED else "")
    return f"{of - len(absent)} of {of} clients are here, not yet {names}"
