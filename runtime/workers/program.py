"""What a worker does: it opens clients' rounds and runs each to its next question, in the order in which it is told."""

from __future__ import annotations

import contextlib
import pickle
import traceback
from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, cast

from cutlayer.runtime.messages.boundary import Message, Reply, on_device
from cutlayer.runtime.messages.frames import pieces
from cutlayer.runtime.parties.contexts import ClientState
from cutlayer.runtime.parties.store import Row, Store
from cutlayer.runtime.rounds.evaluator import ApartTests
from cutlayer.runtime.rounds.seats import Seats
from cutlayer.runtime.rounds.session import Session
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.rounds.tuner import Tuner
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from cutlayer.runtime.scoring.scores import Measured
from cutlayer.runtime.workers.beside import Copies, Copy
from cutlayer.runtime.workers.talk import (
    Close,
    Ended,
    Failed,
    Frame,
    Hold,
    Open,
    Resume,
    Said,
    Scored,
    Test,
    Word,
    given,
)

Answers: TypeAlias = Generator[tuple[Word, Sequence[Frame]]]
"""Words with their frames, each as soon as it is known."""


class _Round(NamedTuple):
    client: int
    store: Store
    session: Session
    copy: Copy | None


class _Desk:
    """What a worker has once it has read the run's setup."""

    def __init__(self, setup: Setup) -> None:
        self.device = setup.device
        self.seats = Seats(setup, Store(None))
        self.tested = Store(None, device=setup.device)
        self.tests = ApartTests(setup, self.tested)
        self._setup = setup
        self._tuner: Tuner | None = None

    @cached_property
    def copies(self) -> Copies:
        """Of the server, for clients whose copy is here."""
        return Copies(self._setup)

    def tuned(self, client: int, config: PersonalizeConfig) -> list[Measured]:
        """What fine-tuning finds of a client, with the parts that are held."""
        if self._tuner is None or self._tuner.config != config:
            self._tuner = Tuner(self._setup, self.tests.evaluator, config)
        return self._tuner.scores(client)


class Program:
    """A worker, however it is reached.

    Args:
        load: reads the run's setup, at the first word; what is wrong there is said in answer to that.
    """

    def __init__(self, load: Callable[[], Setup]) -> None:
        self._load = load
        self._rounds: dict[int, _Round] = {}

    @cached_property
    def _desk(self) -> _Desk:
        return _Desk(self._load())

    def hear(self, head: Any, payloads: list[Reply]) -> Answers:
        """Do what is said, and give what comes of it."""
        try:
            if isinstance(head, Open):
                yield from self._open(head, payloads)
            elif isinstance(head, Resume) and head.session in self._rounds:
                yield from self._move_on(head.session, payloads[0])
            elif isinstance(head, Hold):
                self._desk.tests.hold(payloads[0])
            elif isinstance(head, Test):
                yield self._test(head, payloads), ()
            elif isinstance(head, Close):
                self._close(head.session)
        except Exception as error:
            if isinstance(head, Hold):
                raise  # tests that follow would be of other parts: this worker ends
            self._close(head.session)
            yield Failed(head.session, _sendable(error)), ()

    def _open(self, head: Open, payloads: list[Reply]) -> Answers:
        opening, *rows = payloads
        own, copy = rows[: len(head.rows)], None
        if head.copy is not None:
            kept = _rows(head.copy, rows[len(head.rows) :])
            copy, opening = self._desk.copies.open(head.client, head.round, opening, kept)
        store = Store(None, device=self._desk.device)
        store.replace(head.client, _rows(head.rows, own))
        session = self._desk.seats.open(head.client, head.round, ClientState(store, head.client))
        self._rounds[head.session] = _Round(head.client, store, session, copy)
        yield from self._move_on(head.session, opening)

    def _move_on(self, number: int, message: Reply) -> Answers:
        (client, store, session, copy), seats = self._rounds[number], self._desk.seats
        before = seats.seconds
        session.send(on_device(message, self._desk.device))
        while isinstance(event := session.receive(), Message):
            if copy is not None:
                session.send(copy.answer(event))
                continue
            yield Said(number, event.kind, event.expects_reply), [pieces(event.fields)]
            if event.expects_reply:
                return
        self._close(number)
        rows, kept = given(store.staged(client))
        copied, states = (None, []) if copy is None else copy.end()
        ended = Ended(number, event.samples, dict(event.metrics), seats.seconds - before, rows, copied)
        yield ended, [pieces(event.fields), *kept, *states]

    def _test(self, head: Test, payloads: list[Reply]) -> Scored:
        desk = self._desk
        desk.tested.replace(head.client, _rows(head.rows, payloads))
        scores = desk.tests.of_client(head.client) if head.tuning is None else desk.tuned(head.client, head.tuning)
        desk.tested.replace(head.client, {})
        return Scored(head.session, scores)

    def _close(self, number: int) -> None:
        if number in self._rounds:
            self._rounds.pop(number).session.close()


def _rows(names: Sequence[str], rows: Sequence[Reply]) -> dict[str, Row]:
    """The rows that came with a message, which are of tensors alone."""
    return {name: cast(Row, row) for name, row in zip(names, rows, strict=True)}


def _sendable(error: Exception) -> Exception:
    """The error itself if it survives pickling, with where it arose in this process."""
    where = traceback.format_exc()
    with contextlib.suppress(Exception):
        found = pickle.loads(pickle.dumps(error))
        if type(found) is type(error) and str(found) == str(error):
            error.add_note(f"in a worker:\n{where}")
            return error
    return RuntimeError(f"{type(error).__name__}: {error}\nin a worker:\n{where}")
