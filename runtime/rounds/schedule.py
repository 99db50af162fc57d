"""The order in which a cohort's messages are served."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from cutlayer.runtime.messages.boundary import MODEL, ClientDroppedError, Fields, Message, Reply, Upload
from cutlayer.runtime.messages.crossing import packed
from cutlayer.runtime.parties.cohort import Asked, Cohort
from cutlayer.runtime.parties.contexts import read_together
from cutlayer.runtime.rounds.session import Channel, Serving, Session, Workplace


@dataclass
class RoundReport:
    """What came of a round: who finished, who dropped out, and the finishers' metrics (mean weighted by samples).

    ``seconds`` are those that clients computed.
    """

    survivors: list[int] = field(default_factory=list[int])
    dropped: list[int] = field(default_factory=list[int])
    seconds: float = 0.0
    _reported: list[tuple[int, Mapping[str, float]]] = field(default_factory=list[tuple[int, Mapping[str, float]]])

    def add(self, client: int, upload: Upload) -> None:
        """Count a client's upload."""
        self.survivors.append(client)
        self._reported.append((upload.samples, upload.metrics))

    def extend(self, other: RoundReport) -> None:
        """Count what came of other clients' round."""
        self.survivors += other.survivors
        self.dropped += other.dropped
        self._reported += other._reported

    @property
    def metrics(self) -> dict[str, float]:
        """The clients' metrics; what a device still computes is waited for here."""
        sums, weights = dict[str, float](), dict[str, float]()
        found = read_together([metrics for _, metrics in self._reported])
        for (samples, _), metrics in zip(self._reported, found, strict=True):
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + samples * value
                weights[name] = weights.get(name, 0.0) + samples
        return {name: total / weights[name] for name, total in sums.items() if weights[name]}


class RoundLostError(Exception):
    """Too few clients are left for the round to count."""


Opener = Callable[[int], Session]
"""Begins a client's round. Raises ClientDroppedError where the client is gone by now."""
Dropper = Callable[[int], None]


class Schedule(Protocol):
    """Runs one round of a cohort to its end."""

    def __call__(
        self, cohort: list[int], open: Opener, drop: Dropper, server: Serving, channel: Channel
    ) -> RoundReport: ...


def sequential(cohort: list[int], open: Opener, drop: Dropper, server: Serving, channel: Channel) -> RoundReport:
    """One client after another through the whole round; memory of one client, and of those that work ahead."""
    report = RoundReport()
    waiting, opened = iter(cohort), dict[int, Session]()

    def begin(clients: Iterable[int]) -> None:
        for client in clients:
            try:
                opened[client] = open(client)
            except ClientDroppedError:  # before its turn
                _drop(client, drop, server, report)
                continue
            opened[client].send(channel.down(client, MODEL, server.down(client)))

    try:
        begin(islice(waiting, channel.ahead))
        for client in cohort:
            begin(islice(waiting, 1))
            session = opened.get(client)
            if session is None:
                continue
            try:
                event = session.receive()
                while isinstance(event, Message):
                    message = channel.up(client, event.kind, event.fields)
                    reply = server.serve(event.kind, {client: message})[client]
                    if event.expects_reply:
                        session.send(channel.reply(client, event.kind, reply or {}))
                    event = session.receive()
                _finish(client, event, server, channel, report)
            except ClientDroppedError:
                _drop(client, drop, server, report)
            opened.pop(client).close()
    finally:
        for session in opened.values():
            session.close()
    return report


def lockstep(cohort: list[int], open: Opener, drop: Dropper, server: Serving, channel: Channel) -> RoundReport:
    """The whole cohort moves on by one message at a time; the server sees all messages of a kind together."""
    return _Lockstep(cohort, open, drop, server, channel).run()


class _Lockstep:
    def __init__(self, cohort: list[int], open: Opener, drop: Dropper, server: Serving, channel: Channel) -> None:
        self.cohort, self.drop, self.server, self.channel = cohort, drop, server, channel
        self.report = RoundReport()
        self.waiting: dict[int, Message] = {}
        self.sessions: dict[int, Session] = {}
        self.open = open

    def run(self) -> RoundReport:
        try:
            self._move(self.cohort, self._open)
            while self.waiting:
                kind = self.waiting[next(c for c in self.cohort if c in self.waiting)].kind
                self._answer(kind, [c for c in self.cohort if c in self.waiting and self.waiting[c].kind == kind])
        finally:
            for session in self.sessions.values():
                session.close()
        return self.report

    def _open(self, client: int) -> None:
        try:
            self.sessions[client] = self.open(client)
        except ClientDroppedError:
            _drop(client, self.drop, self.server, self.report)
            return
        self.sessions[client].send(self.channel.down(client, MODEL, self.server.down(client)))

    def _answer(self, kind: str, clients: list[int]) -> None:
        inbox = {client: self.channel.up(client, kind, self.waiting.pop(client).fields) for client in clients}
        try:
            replies = self.server.serve(kind, inbox)
        except ClientDroppedError:  # of a client alone
            self._lose(*clients)
            return
        self._move(clients, lambda c: self.sessions[c].send(self.channel.reply(c, kind, replies[c] or {})))

    def _move(self, clients: list[int], send: Callable[[int], None]) -> None:
        """Send to clients, as many ahead as may be, and run each to its next question."""
        coming = iter(clients)
        for client in islice(coming, self.channel.ahead):
            send(client)
        for client in clients:
            for other in islice(coming, 1):
                send(other)
            if client in self.sessions:
                self._receive(client)

    def _receive(self, client: int) -> None:
        """Run a client to its next question; its one-way messages on the way are served as they come."""
        session = self.sessions[client]
        try:
            event = session.receive()
            while isinstance(event, Message) and not event.expects_reply:
                self.server.serve(event.kind, {client: self.channel.up(client, event.kind, event.fields)})
                event = session.receive()
            if isinstance(event, Message):
                self.waiting[client] = event
                return
            _finish(client, event, self.server, self.channel, self.report)
        except ClientDroppedError:
            self._lose(client)
            return
        self.sessions.pop(client).close()

    def _lose(self, client: int) -> None:
        _drop(client, self.drop, self.server, self.report)
        self.sessions.pop(client).close()


def _finish(client: int, upload: Upload, server: Serving, channel: Channel, report: RoundReport) -> None:
    received = channel.upload(client, upload)
    server.absorb(client, received)
    report.add(client, received)


def _drop(client: int, drop: Dropper, server: Serving, report: RoundReport) -> None:
    """Discard what the client staged; server steps already taken on its messages remain."""
    drop(client)
    server.forget(client)
    report.dropped.append(client)


SCHEDULES: dict[str, Schedule] = {"sequential": sequential, "lockstep": lockstep}


def compute_together(
    program: Any, cohort: Cohort, workplace: Workplace, server: Serving, channel: Channel
) -> RoundReport:
    """One round of the cohort by its program; every message is charged and handed over as that of its client."""
    report = RoundReport()
    opened = {client: channel.down(client, MODEL, server.down(client)) for client in cohort}
    with workplace.working():
        running: Generator[Asked, dict[int, Reply], Fields] = program(cohort, next(iter(opened.values())))
    answers: dict[int, Reply] | None = None
    while True:
        try:
            with workplace.working():
                asked = next(running) if answers is None else running.send(answers)
        except StopIteration as end:
            fields: Fields = end.value
            break
        inbox = {client: channel.up(client, asked.kind, packed(fields)) for client, fields in asked.fields.items()}
        replies = server.serve(asked.kind, inbox)
        answers = {client: channel.reply(client, asked.kind, reply or {}) for client, reply in replies.items()}
    for client in cohort:
        upload = channel.upload(client, Upload(packed(fields), cohort.samples(client)))
        server.absorb(client, upload)
        report.add(client, upload)
    return report
