"""What a worker does: it opens clients' rounds and runs each to its next question, in the order in which it is told."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple, cast

import torch

from cutlayer.runtime.ground.forking import SENT_TO_ALL
from cutlayer.runtime.ground.memory import be_first_to_go, ending_without_memory
from cutlayer.runtime.ground.process import prepare_process
from cutlayer.runtime.messages.boundary import Message, Reply, on_device
from cutlayer.runtime.parties.contexts import ClientState
from cutlayer.runtime.parties.store import Row, Store
from cutlayer.runtime.rounds.evaluator import ApartTests
from cutlayer.runtime.rounds.local_clients import Seats
from cutlayer.runtime.rounds.session import Session
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.rounds.tuner import Tuner
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from cutlayer.runtime.workers.shared import Shared
from cutlayer.runtime.workers.talk import (
    Close,
    Ended,
    Failed,
    Hold,
    Open,
    Resume,
    Said,
    Scored,
    Talk,
    Test,
    given,
    hear,
    say,
)


def be_worker(connection: Connection, shared: Shared, threads: int, device: str | None) -> None:
    """Be a worker until the other end of the connection is closed.

    Args:
        shared: holds the run's ``Setup``. threads: to compute with. device: the worker's GPU.
    """
    for number in SENT_TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    logging.disable()  # the run's own process has said what there is to say
    be_first_to_go()
    with ending_without_memory():
        _work(connection, shared, threads, device)


def _work(connection: Connection, shared: Shared, threads: int, device: str | None) -> None:
    place = torch.device(device or "cpu")
    prepare_process(place)  # before anything is on a GPU
    setup: Setup = shared.load(place)
    torch.set_num_threads(threads)
    inbox: SimpleQueue[Talk] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    worker = _Worker(setup, connection)
    while True:
        worker.hear(*inbox.get())


def _listen(connection: Connection, inbox: SimpleQueue[Talk]) -> None:
    try:
        with ending_without_memory():
            while True:
                inbox.put(hear(connection))
    except (EOFError, OSError):
        os._exit(0)  # whatever it computes: nobody waits for it


class _Round(NamedTuple):
    client: int
    store: Store
    session: Session


class _Worker:
    def __init__(self, setup: Setup, connection: Connection) -> None:
        self._setup, self._device, self._connection = setup, setup.device, connection
        self._seats = Seats(setup, Store(None))
        self._rounds: dict[int, _Round] = {}
        self._tested = Store(None, device=setup.device)
        self._tests = ApartTests(setup, self._tested)
        self._tuners: dict[PersonalizeConfig, Tuner] = {}

    def hear(self, head: Any, payloads: list[Reply]) -> None:
        """Do what is said, and say what came of it."""
        try:
            if isinstance(head, Open):
                with self._setup.memory(f"the round of client {head.client}"):
                    self._open(head, payloads)
            elif isinstance(head, Resume) and head.session in self._rounds:
                with self._setup.memory(f"the round of client {self._rounds[head.session].client}"):
                    self._move_on(head.session, payloads[0])
            elif isinstance(head, Hold):
                self._tests.hold(payloads[0])
            elif isinstance(head, Test):
                with self._setup.memory(f"the test of client {head.client}"):
                    self._test(head, payloads)
            elif isinstance(head, Close):
                self._close(head.session)
        except Exception as error:
            if isinstance(head, Hold):
                raise  # tests that follow would be of other parts: this worker ends
            self._close(head.session)
            say(self._connection, Failed(head.session, _sendable(error)))

    def _open(self, head: Open, payloads: list[Reply]) -> None:
        opening, *rows = payloads
        store = Store(None, device=self._device)
        store.replace(head.client, _rows(head.rows, rows))
        session = self._seats.open(head.client, head.round, ClientState(store, head.client))
        self._rounds[head.session] = _Round(head.client, store, session)
        self._move_on(head.session, opening)

    def _move_on(self, number: int, message: Reply) -> None:
        session = self._rounds[number].session
        before = self._seats.seconds
        session.send(on_device(message, self._device))
        while isinstance(event := session.receive(), Message):
            say(self._connection, Said(number, event.kind, event.expects_reply), [event.fields])
            if event.expects_reply:
                return
        client, store, _ = self._rounds[number]
        self._close(number)
        rows, kept = given(store.staged(client))
        ended = Ended(number, event.samples, dict(event.metrics), self._seats.seconds - before, rows)
        say(self._connection, ended, [event.fields, *kept])

    def _test(self, head: Test, payloads: list[Reply]) -> None:
        self._tested.replace(head.client, _rows(head.rows, payloads))
        tuning = head.tuning
        scores = self._tests.of_client(head.client) if tuning is None else self._tuner(tuning).scores(head.client)
        self._tested.replace(head.client, {})
        say(self._connection, Scored(head.session, scores))

    def _tuner(self, config: PersonalizeConfig) -> Tuner:
        if self._tuners.keys() != {config}:
            self._tuners = {config: Tuner(self._setup, self._tests.evaluator, config)}
        return self._tuners[config]

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
