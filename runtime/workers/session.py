"""A client's round at a worker, as the run's schedule sees it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias

from cutlayer.runtime.messages.boundary import Message, Payload, Reply, Upload
from cutlayer.runtime.messages.frames import pieces
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.rounds.schedule import RoundLostError
from cutlayer.runtime.workers.beside import DrewError, Lender, opening, without_contents
from cutlayer.runtime.workers.pool import Inbox, Pool, Worker
from cutlayer.runtime.workers.talk import Close, Ended, Failed, Frame, Open, Resume, Said, Served, given, taken

MemoryTold: TypeAlias = Callable[[str], contextlib.AbstractContextManager[None]]
"""What is said where memory runs out in a client's work, see ``Setup.memory``."""


class AtWork(NamedTuple):
    """What the clients of a round have in common.

    Attributes:
        store: of the clients' rows. round: from 0. on_ended: called with the seconds that a client computed.
        memory: as ``Setup.memory``.
    """

    pool: Pool
    store: Store
    round: int
    on_ended: Callable[[float], None]
    memory: MemoryTold


class WorkerSession:
    """A client's round at a worker.

    Where the worker dies, the client begins again at another: what it has said until then is passed over, as it says
    the same again. Once it was answered, the whole round begins again instead.
    """

    def __init__(self, at: AtWork, client: int) -> None:
        self._at, self._client = at, client
        self._opening: bytes | None = None
        self._answered = False
        self._heard = self._repeated = 0
        self._number = 0
        self._worker: Worker | None = None
        self._inbox: Inbox = SimpleQueue()

    def send(self, message: Reply) -> None:
        if self._opening is None:
            # Of its own: the server goes on, and it may be sent once more.
            self._opening = self._at.pool.common(self._opens(message))
            self._start()
        else:
            assert self._worker is not None
            self._answered = True
            self._worker.say(Resume(self._number), [pieces(message)])

    def _start(self) -> None:
        assert self._opening is not None
        self._number, self._inbox = self._at.pool.number(), SimpleQueue()
        self._worker = self._at.pool.idlest()
        self._worker.take(self._number, self._client, self._inbox)
        self._worker.say(*self._open(), self._opening)

    def _opens(self, message: Reply) -> Payload:
        return message

    def _open(self) -> tuple[Open, list[Frame]]:
        rows, kept = given(self._at.store.rows(self._client))
        return Open(self._number, self._client, self._at.round, tuple(rows), None), kept

    def receive(self) -> Message | Upload:
        while True:
            came = self._inbox.get()
            if came is None:
                self._again()
                continue
            head, payloads = came
            if isinstance(head, Failed):
                self._leave()
                with self._at.memory(f"the round of client {self._client}"):
                    raise head.error
            if isinstance(head, Ended):
                self._leave()
                return self._ended(head, iter(payloads))
            assert isinstance(head, Said)
            if self._repeated:
                self._repeated -= 1
                continue
            self._heard += 1
            return Message(head.kind, payloads[0], head.expects_reply)

    def _again(self) -> None:
        self._leave()
        if self._answered:
            raise RoundLostError(f"a worker is gone, with client {self._client} in its round")
        self._repeated = self._heard
        self._start()

    def _ended(self, head: Ended, payloads: Iterator[Reply]) -> Upload:
        fields = next(payloads)
        taken(self._at.store, self._client, head.rows, payloads)
        self._at.on_ended(head.seconds)
        return Upload(fields, head.samples, head.metrics)

    def _leave(self) -> None:
        if self._worker is not None:
            self._worker.leave(self._number)

    def close(self) -> None:
        if self._worker is not None and self._worker.lives:
            self._worker.say(Close(self._number))
        self._leave()


class SessionWithCopy(WorkerSession):
    """A client's round at a worker, with the server's copy for it; what passed between them is told afterwards."""

    def __init__(self, at: AtWork, client: int, lender: Lender) -> None:
        super().__init__(at, client)
        self._lender = lender
        self._served: deque[Served] = deque()
        self._upload: Upload | None = None

    def _opens(self, message: Reply) -> Payload:
        return opening(message, self._lender.parts())

    def _open(self) -> tuple[Open, list[Frame]]:
        head, kept = super()._open()
        rows, theirs = given(self._lender.store.rows(self._client))
        return head._replace(copy=tuple(rows)), [*kept, *theirs]

    def send(self, message: Reply) -> None:
        if self._upload is None:  # else what the copy has answered
            super().send(message)

    def receive(self) -> Message | Upload:
        if self._upload is None:
            try:
                ended = super().receive()
            except DrewError as error:
                self._lender.drew = True
                raise RoundLostError(str(error)) from error
            assert isinstance(ended, Upload)
            self._upload = ended
        if not self._served:
            return self._upload
        served = self._served.popleft()
        self._lender.will_serve(self._client, served)
        return Message(served.kind, without_contents(served.up), served.expects_reply)

    def _ended(self, head: Ended, payloads: Iterator[Reply]) -> Upload:
        upload = super()._ended(head, payloads)
        assert head.copied is not None
        self._served.extend(head.copied.served)
        self._lender.take(self._client, head.copied, next(payloads), payloads)
        return upload
