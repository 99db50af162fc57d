"""Clients of a round computed as one: sessions whose programs run together, once several of them have been opened.

The schedule sees a session for each client, and their messages, as ever. A group forms when the first of its clients is
to speak: of all that have been opened by then, those that take the same steps. Its program runs once, with a
`PerClient` of their tensors, and what it says is taken apart. Where that cannot be (`ApartError`), each client runs by
itself from its beginning, and what it has said already is passed over.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from inspect import isgenerator
from typing import Any, TypeAlias, cast

from cutlayer.algorithms.mixins import CopyPerClient
from cutlayer.runtime.ground import rng
from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Message, OwnPayload, Reply, Upload, owned
from cutlayer.runtime.messages.crossing import packed
from cutlayer.runtime.messages.ledger import Ledger
from cutlayer.runtime.parties.blueprint import BATCH_NORM, state_bytes
from cutlayer.runtime.parties.contexts import Seat
from cutlayer.runtime.parties.per_client import ApartError
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.parties.together import TogetherContext, stacked_seat, taken_apart
from cutlayer.runtime.rounds.schedule import Dropper, RoundLostError, RoundReport, lockstep, sequential
from cutlayer.runtime.rounds.seats import Seats
from cutlayer.runtime.rounds.session import Channel, ServerParty, Serving, Session, Workplace
from cutlayer.runtime.rounds.setup import Setup

log = logging.getLogger(__name__)
# So many times as many as are computed as one wait to be, so that like ones are found, if what opens their rounds takes
# no more memory than this.
_WINDOW, _WINDOW_BYTES = 4, 256 << 20


class TogetherSeats(Seats):
    """Clients of this process, several of which may share a seat.

    Attributes:
        reasons: why some were not computed as one. groups: how often several were.
        copies_apart: the server has a copy of its own for each client, and none depends on another.
        uneven: clients with other batches than others' may be computed with them.
        counting: optimizers of theirs last for the run.
    """

    def __init__(self, setup: Setup, store: Store) -> None:
        super().__init__(setup, store)
        self._free: list[Seat] = []
        self.reasons: list[str] = []
        self.groups = 0
        self.copies_apart = issubclass(setup.algorithm.Server, CopyPerClient)
        parts = setup.blueprint.parts(setup.algorithm.layout.client).values()
        normalised = any(isinstance(module, BATCH_NORM) for part in parts for module in part.modules())
        self.uneven = setup.algorithm.uneven and not normalised
        self.counting = any(setup.blueprint.keeps_optimizer[name] for name in setup.algorithm.layout.client)
        self._fruitless = 0  # rounds of late

    def together(self, clients: Sequence[int], round: int) -> TogetherContext:
        """Clients in a round (from 0), as one, on a seat that they take."""
        variant = self.setup.blueprint.for_client(clients[0])
        seat = next((s for s in self._free if s.clients == len(clients) and s.blueprint is variant), None)
        if seat is None:
            self._free.clear()  # parts of another number of clients would stay in memory
            seat = stacked_seat(variant, self.setup.algorithm.layout.client, len(clients))
        else:
            self._free.remove(seat)
        seat.take(variant)
        return TogetherContext(seat, [self.seated(client, round, seat) for client in clients])

    def release(self, context: TogetherContext) -> None:
        """The seat of these clients is free."""
        if not any(seat is context.seat for seat in self._free):
            self._free.append(context.seat)

    def train_together(
        self, cohort: list[int], round: int, most: int, drop: Dropper, server: Serving, ledger: Ledger
    ) -> RoundReport:
        """One round (from 0) of a cohort, of whom up to ``most`` are computed as one where they can be.

        Clients whose server has a copy for each go on by one message each, as no copy depends on another.
        """
        algorithm, before, copies = self.setup.algorithm, self.seconds, self.copies_apart
        at_once = algorithm.schedule == "sequential" and not copies
        most = 1 if at_once and self._fruitless > 1 else most
        several = TogetherRound(self, round, most, at_once=at_once)
        report = RoundReport()
        for part in windows(cohort, most) if copies else [cohort]:
            ahead = min(len(part), self._window(most)) - 1 if at_once else len(part)
            schedule = sequential if at_once else lockstep
            report.extend(schedule(part, several.open, drop, server, Channel(ledger, ahead)))
        if copies and isinstance(server, ServerParty) and server.drew:
            self.copies_apart = False
            raise RoundLostError("the server draws random numbers, one client's after another's")
        report.seconds = self.seconds - before
        self._note(several)
        return report

    def _window(self, most: int) -> int:
        """How many clients wait to be computed as one."""
        blueprint = self.setup.blueprint
        each = sum(state_bytes(blueprint.initial[name]) for name in self.setup.algorithm.shared)
        return _WINDOW * most if self.uneven and _WINDOW * most * each <= _WINDOW_BYTES else most

    def _note(self, round: TogetherRound) -> None:
        """After two rounds one after the other in which nothing could be computed as one, nothing is tried any more."""
        self.note_reasons(round.reasons)
        self.groups += round.groups
        self._fruitless = self._fruitless + 1 if round.reasons and not round.groups else 0

    def note_reasons(self, reasons: Sequence[str]) -> None:
        """Log each reason once."""
        for reason in reasons:
            if reason not in self.reasons:
                self.reasons.append(reason)
                log.info("clients are computed one by one: %s", reason)


def windows(cohort: Sequence[int], most: int) -> list[list[int]]:
    """A cohort in pieces of so many, in order."""
    return [[*cohort[start : start + most]] for start in range(0, len(cohort), most)]


class TogetherRound:
    """The clients of one round, of which up to ``most`` are computed as one.

    Args:
        at_once: whether a program says all that it has to say before it is answered, as in a sequential round.

    Attributes:
        groups: how many were computed as one. reasons: why others were not.
    """

    def __init__(self, seats: TogetherSeats, round: int, most: int, *, at_once: bool) -> None:
        self.seats, self.round, self.most, self.at_once = seats, round, most, at_once
        self.reasons: list[str] = []
        self.groups = 0
        self._waiting: list[TogetherSession] = []

    def open(self, client: int) -> Session:
        """Begin a client's round."""
        session = TogetherSession(self, client)
        self._waiting.append(session)
        return session

    def gather(self, session: TogetherSession) -> None:
        """Make a group of this client and of others that are waiting."""
        key, steps = self._key(session), len(self.seats.setup.steps(session.client))
        found = [each for each in self._waiting if each is not session and each.told and self._key(each) == key]
        found.sort(key=lambda each: abs(len(self.seats.setup.steps(each.client)) - steps))  # the least is in vain
        found = [session, *found][: self.most]
        group = SharedProgram(self, found)
        for each in found:
            self._waiting.remove(each)
            each.join(group)

    def leave(self, session: TogetherSession) -> None:
        """A session ends before its turn."""
        if session in self._waiting:
            self._waiting.remove(session)

    def _key(self, session: TogetherSession) -> Any:
        """What clients have in common that are computed as one."""
        setup, client = self.seats.setup, session.client
        steps, variant = setup.steps(client), client % len(setup.blueprint.variants)
        alike: Any = tuple(steps)
        if self.seats.uneven:
            # An optimizer or a schedule counts the steps of all in one, which would not be what each has taken.
            counted = self.seats.counting or bool(setup.blueprint.by_step)
            alike = len(steps) if counted or not self.at_once else 0
        return alike, variant, frozenset(session.told[0]), self.seats.rows_of(client)


class TogetherSession:
    """A client's round as one of a group."""

    def __init__(self, round: TogetherRound, client: int) -> None:
        self.client = client
        self.told: list[Reply] = []  # the message that opens the round, and the replies
        self.events: deque[Message | Upload] = deque()
        self._round = round
        self._group: SharedProgram | None = None
        self._alone: Session | None = None
        self._said = 0

    def send(self, message: Reply) -> None:
        if self._alone is not None:
            self._alone.send(message)
        else:
            self.told.append(message)

    def receive(self) -> Message | Upload:
        if self._group is None:
            self._round.gather(self)
        assert self._group is not None
        if not self.events and not self._group.apart:
            self._group.go_on()
        if self._group.apart:
            return self._by_itself().receive()
        self._said += 1
        return self.events.popleft()

    def join(self, group: SharedProgram) -> None:
        """Be one of a group."""
        self._group = group

    def _by_itself(self) -> Session:
        """The client's own program, brought to where it has been heard."""
        if self._alone is None:
            self._alone = self._round.seats.open(self.client, self._round.round)
            replies = iter(self.told)
            self._alone.send(next(replies))
            for _ in range(self._said):
                event = self._alone.receive()
                if isinstance(event, Message) and event.expects_reply:
                    self._alone.send(next(replies))
            self.told.clear()
        return self._alone

    def close(self) -> None:
        self._round.leave(self)
        if self._group is not None:
            self._group.close()
        if self._alone is not None:
            self._alone.close()


Spoken: TypeAlias = list[Message | Upload | None]
"""What each of several clients says; None of those that the step is none of."""


def _is_told(said: Spoken) -> bool:
    """Whether no reply to it is waited for, and more is to come."""
    return any(isinstance(event, Message) and not event.expects_reply for event in said)


class SharedProgram:
    """Clients that are computed as one.

    Attributes:
        apart: that is over: each runs by itself.
    """

    def __init__(self, round: TogetherRound, sessions: Sequence[TogetherSession]) -> None:
        self.apart = len(sessions) == 1
        self._round, self._sessions, self._open = round, sessions, len(sessions)
        self._clients = [session.client for session in sessions]
        self._heard = 0  # messages to each client that the program has had
        self._said_before = False
        self._program: ClientProgram | None = None
        setup = round.seats.setup
        names = ", ".join(map(str, self._clients[:3])) + (", ..." if len(sessions) > 3 else "")
        seed = rng.derive(setup.config.seed, round=round.round, client=self._clients[0], stream="together")
        self._work = Workplace(setup.blueprint, seed, lambda: setup.memory(f"the round of clients {names}"))
        self._ctx: TogetherContext | None = None

    def go_on(self) -> None:
        """Run the program to its next question, or to its end; what it says is each client's to say."""
        said: list[Spoken] = []
        try:
            said.append(self._next(self._told()))
            while _is_told(said[-1]):
                said.append(self._next({}))
            if self._round.at_once and any(isinstance(event, Message) for event in said[-1]):
                raise ApartError("the program waits for an answer that depends on the clients before")
        except ApartError as error:
            self._fall_apart(str(error))
            return
        self._heard += 1
        self._round.groups += not self._said_before
        self._said_before = True
        for event in said:
            for session, own in zip(self._sessions, event, strict=True):
                if own is not None:
                    session.events.append(own)

    def _told(self) -> Reply:
        """What all of them have been told last."""
        return self._context().join([session.told[self._heard] for session in self._sessions])

    def _next(self, message: Reply) -> Spoken:
        """Each client's next message, or upload."""
        with self._work.working():
            event = self._advance(message)
        if self._work.stream.drawn:
            raise ApartError("the program draws random numbers")
        return event

    def _advance(self, message: Reply) -> Spoken:
        ctx = self._context()
        answer: Reply | None = message
        if self._program is None:
            result = self._round.seats.setup.algorithm.client(ctx, message)
            if not isgenerator(result):
                return self._uploads(ctx, cast("Fields | None", result))
            self._program, answer = result, None  # what a generator is begun with
        try:
            said = self._program.send(cast(Reply, answer))
        except StopIteration as end:
            return self._uploads(ctx, end.value)
        # A copy: what is told now is heard once the program has gone on.
        each = ctx.divide(owned(said.fields))
        return [None if own is None else Message(said.kind, OwnPayload(own), said.expects_reply) for own in each]

    def _uploads(self, ctx: TogetherContext, fields: Fields | None) -> Spoken:
        each, metrics = taken_apart(owned(packed(fields or {})), len(self._clients)), ctx.metrics()
        ctx.leave()
        self._end()
        uploads = zip(each, ctx.members, metrics, strict=True)
        return [Upload(OwnPayload(own), member.samples, found) for own, member, found in uploads]

    def _context(self) -> TogetherContext:
        if self._ctx is None:
            self._ctx = self._round.seats.together(self._clients, self._round.round)
        return self._ctx

    def _fall_apart(self, reason: str) -> None:
        self.apart = True
        self._round.reasons.append(reason)
        self._end()

    def _end(self) -> None:
        """Let go of the program and of the seat."""
        if self._program is not None:
            self._program.close()
            self._program = None
        if self._ctx is not None:
            self._round.seats.release(self._ctx)
            self._ctx = None

    def close(self) -> None:
        """One of the sessions is over; with the last one the group is."""
        self._open -= 1
        if not self._open:
            self._end()
            self._round.seats.seconds += self._work.seconds
