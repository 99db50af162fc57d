"""The workers of a run, as its own process has them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, TypeAlias

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.memory import NO_MEMORY, killed_for_memory
from cutlayer.runtime.messages.boundary import Payload, Reply
from cutlayer.runtime.workers.talk import Close, Failed, Hold, Said, Talk, Word, hear, say

log = logging.getLogger(__name__)

_KILLED = -signal.SIGKILL
# Deaths in one round, for each worker, after which a run gives up: the same client may be what each of them dies of.
_MOST_DEATHS = 3

Inbox: TypeAlias = "SimpleQueue[Talk | None]"
"""What comes for a session; None says that its worker is gone."""


class Worker:
    """A process, and a thread that takes what it says.

    Attributes:
        open: rounds of clients that are open there.
    """

    def __init__(self, begin: Callable[[Connection], BaseProcess]) -> None:
        self._connection, theirs = Pipe()
        self.process = begin(theirs)
        self.process.start()
        theirs.close()
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
                self._hand_on(*hear(self._connection))
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
            return self._clients[self._asked[0]] if self._asked else None

    def say(self, head: Word, payloads: Sequence[Payload] = ()) -> None:
        """Send; where the worker is gone, its sessions hear of it."""
        if not isinstance(head, Hold | Close):
            with self._lock:
                self._asked.append(head.session)
        with contextlib.suppress(OSError):
            say(self._connection, head, payloads)

    @property
    def lives(self) -> bool:
        """Whether the process is there, as far as is known."""
        return not self._gone

    def stop(self) -> None:
        """End the process, whatever it does: it keeps nothing."""
        self.process.kill()
        self.process.join()
        self._thread.join()  # which hears that it is gone
        self._connection.close()


class Pool:
    """So many workers; one that dies has another in its place.

    Args:
        begin: makes the process of the worker with that number, given its end of the connection.
    """

    def __init__(self, count: int, begin: Callable[[Connection, int], BaseProcess]) -> None:
        self._begin, self._count = begin, count
        self._workers: list[Worker] = []
        self._numbers = itertools.count(1)
        self._deaths = 0
        self._killed = killed_for_memory()

    def number(self) -> int:
        """A number for a session that no other has."""
        return next(self._numbers)

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
                self._workers.append(self._start(number))
            elif not self._workers[number].lives:
                self._replace(number)
        return [*self._workers]

    def _start(self, number: int) -> Worker:
        def begin(connection: Connection) -> BaseProcess:
            return self._begin(connection, number)

        return Worker(begin)

    def _replace(self, number: int) -> None:
        dead = self._workers[number]
        dead.stop()
        self._deaths += 1
        memory, how = self._how(dead.process.exitcode or 0)
        if dead.client is not None:
            how += f" with client {dead.client}"
        if self._deaths > _MOST_DEATHS * self._count:
            wanted = "fewer, or a smaller batch_size" if memory else "workers that live"
            reason = f"{wanted}: {self._deaths} died in one round, the last {how}"
            raise ConfigError("workers", self._count, reason)
        log.warning("worker %d is gone (%s); another takes its place, its clients begin their round again", number, how)
        self._workers[number] = self._start(number)

    def _how(self, status: int) -> tuple[bool, str]:
        """Whether a worker may have died for want of memory, by its exit status, and how it died in words."""
        before, self._killed = self._killed, killed_for_memory()
        if status == NO_MEMORY:
            return True, "as its memory ran out"
        if status == _KILLED and before is not None and self._killed is not None:
            killed = self._killed > before
            return killed, "killed by the system, as memory ran out," if killed else "killed by signal 9"
        if status == _KILLED:
            return True, "killed by signal 9, as the system does where memory runs out,"
        return False, f"killed by signal {-status}" if status < 0 else f"exit status {status}"

    def living(self) -> list[int]:
        """The process numbers of the workers that are there."""
        return [worker.process.pid for worker in self._workers if worker.lives and worker.process.pid is not None]

    def on_round(self) -> None:
        """A round is over, all of its clients have ended."""
        self._deaths = 0

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()
