"""The workers of a run, as its own process has them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeAlias

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import Payload, Reply
from cutlayer.runtime.messages.codec import encode
from cutlayer.runtime.workers.talk import Close, Failed, Frame, Hold, Said, Talk, Word, WorkerLink

log = logging.getLogger(__name__)

# Deaths in one round, for each worker, after which a run gives up: the same client may be what each of them dies of.
_MOST_DEATHS = 3

Inbox: TypeAlias = "SimpleQueue[Talk | None]"
"""What comes for a session; None says that its worker is gone."""


class Worker:
    """A worker, and a thread that takes what it says.

    Attributes:
        open: rounds of clients that are open there.
    """

    def __init__(self, link: WorkerLink) -> None:
        self.link = link
        self.open = 0
        self._lock = threading.Lock()
        self._inboxes: dict[int, Inbox] = {}
        self._clients: dict[int, int] = {}
        self._asked: list[int] = []  # sessions that have to answer, in the order in which they do
        self._gone = False
        self._thread = threading.Thread(target=self._listen, name="worker", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        failed: Exception | None = None
        try:
            while True:
                self._hand_on(*self.link.hear())
        except (EOFError, OSError):
            pass
        except Exception as error:  # such as memory that runs out here
            failed = error
        with self._lock:
            self._gone = True
            for session, inbox in self._inboxes.items():
                inbox.put(None if failed is None else (Failed(session, failed), []))

    def _hand_on(self, head: Any, payloads: list[Reply]) -> None:
        with self._lock:
            inbox = self._inboxes.get(head.session)
            if head.session in self._asked and not (isinstance(head, Said) and not head.expects_reply):
                self._asked.remove(head.session)
        if inbox is not None:  # else of a round that was given up
            inbox.put((head, payloads))

    def take(self, session: int, client: int, inbox: Inbox) -> None:
        """Put what comes for a session, of a client, there."""
        with self._lock:
            self._inboxes[session], self._clients[session] = inbox, client
            self.open += 1
            if self._gone:
                inbox.put(None)

    def leave(self, session: int) -> None:
        """Nobody waits for the session any longer."""
        with self._lock:
            if self._inboxes.pop(session, None) is not None:
                self.open -= 1
                if not self._gone:  # else it may be what the worker died of
                    del self._clients[session]
                    self._asked = [each for each in self._asked if each != session]

    @property
    def client(self) -> int | None:
        """The client that it computes, or was computing when it ended; None if there is none."""
        with self._lock:
            return self._clients.get(self._asked[0]) if self._asked else None

    def say(self, head: Word, frames: Sequence[Frame] = (), common: bytes | None = None) -> None:
        """Send, see ``WorkerLink``; where the worker is gone, its sessions hear of it."""
        if not isinstance(head, Hold | Close):
            with self._lock:
                self._asked.append(head.session)
        with contextlib.suppress(OSError):
            self.link.say(head, frames, common)

    @property
    def lives(self) -> bool:
        """Whether it is there, as far as is known."""
        return not self._gone

    def stop(self) -> None:
        """End it, whatever it does: it keeps nothing."""
        self.link.kill()
        self._thread.join()  # which hears that it is gone
        self.link.close()


class Pool:
    """So many workers; one that dies has another in its place.

    Args:
        begin: starts the worker with that number.
    """

    def __init__(self, count: int, begin: Callable[[int], WorkerLink]) -> None:
        self._begin, self._count = begin, count
        self._workers: list[Worker] = []
        self._numbers = itertools.count(1)
        self._deaths = 0
        self._common = b""

    def number(self) -> int:
        """A number for a session that no other has."""
        return next(self._numbers)

    def common(self, payload: Payload) -> bytes:
        """The frame of a payload that many sessions have: the same object where it is equal to the one before."""
        frame = encode(payload)
        if frame != self._common:
            self._common = frame
        return self._common

    def idlest(self) -> Worker:
        """The worker with the fewest open rounds, see ``all``."""
        return min(self.all(), key=lambda worker: worker.open)

    def all(self) -> list[Worker]:
        """All workers; starts those that are not there.

        Raises:
            ConfigError: they die, again and again.
        """
        for number in range(self._count):
            if number == len(self._workers):
                self._workers.append(Worker(self._begin(number)))
            elif not self._workers[number].lives:
                self._replace(number)
        return [*self._workers]

    def _replace(self, number: int) -> None:
        dead = self._workers[number]
        dead.stop()
        self._deaths += 1
        how = dead.link.end
        if dead.link.hopeless:
            raise ConfigError("workers", self._count, f"workers that live: one cannot start, {how}")
        if dead.client is not None:
            how += f" with client {dead.client}"
        if self._deaths > _MOST_DEATHS * self._count:
            wanted = "fewer, or a smaller batch_size" if dead.link.starved else "workers that live"
            reason = f"{wanted}: {self._deaths} died in one round, the last {how}"
            raise ConfigError("workers", self._count, reason)
        log.warning("worker %d is gone (%s); another takes its place, its clients begin their round again", number, how)
        self._workers[number] = Worker(self._begin(number))

    def living(self) -> list[int]:
        """The process numbers of the workers that are there."""
        return [worker.link.pid for worker in self._workers if worker.lives and worker.link.pid is not None]

    def on_round(self) -> None:
        """A round is over, all of its clients have ended."""
        self._deaths = 0

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()
