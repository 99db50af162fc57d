"""One client's stream as the server has it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import CancelledError, Future
from typing import Any, Protocol

from grpc import aio

from cutlayer.runtime.messages.bounds import Limits, WireError
from cutlayer.runtime.network.certificates.passports import Passport
from cutlayer.runtime.network.links import EOF, GrpcError, LinkLostError, NetworkLoop
from cutlayer.runtime.network.server.guard import Stream
from cutlayer.runtime.network.server.status import Doing, Seen
from cutlayer.runtime.network.wire import Head, Incoming, Received, What, outgoing
from cutlayer.runtime.transport import GrpcTransport

FAREWELL_S = 5.0
"""Seconds that a client has to receive the last message."""


class Host(Protocol):
    """What a connection needs of the hub that it belongs to; its members are described there."""

    connections: dict[int, Connection]
    seen: list[Seen]
    changed: threading.Condition
    note: Callable[[], None]
    network: NetworkLoop
    config: GrpcTransport


class Connection:
    """The stream of one client, used by the main thread; what it does happens on the hub's loop."""

    def __init__(
        self,
        hub: Host,
        client: int,
        facts: dict[str, Any],
        context: Any,
        limits: Limits,
        stream: Stream,
        passport: Passport,
    ) -> None:
        self.client, self.facts = client, facts
        self.passport, self.stream = passport, stream
        self.peer = str(context.peer())
        self.session = 0
        self.seen = hub.seen[client]
        self._hub, self._loop, self._context = hub, hub.network, context
        self._incoming = Incoming(limits, ())
        self._outbox: deque[bytes | None] = deque()  # None: the end
        self._asleep, self._more = False, asyncio.Event()  # the task that sends it
        self._next: Future[Received] | None = None
        self.why = ""  # the stream was ended
        self.over: asyncio.Future[None] = hub.network.loop.create_future()

    # ------------------------------------------------------------------ in the main thread

    def send(self, head: Head, body: Any) -> None:
        """Send a message; it is encoded now, piece by piece, and leaves when those before it have left."""
        self.send_pieces(outgoing(head, body))

    def send_pieces(self, pieces: Iterable[bytes]) -> None:
        """Send a message that is encoded already, as one that goes to many."""
        for piece in pieces:
            self.seen.down += len(piece)
            self._put(piece)
        self._hub.note()

    def _put(self, piece: bytes | None) -> None:
        self._outbox.append(piece)
        if self._asleep:  # else it finds the piece, and waking it would cost both threads time
            self._asleep = False
            self._loop.call(self._more.set)

    @property
    def behind(self) -> bool:
        """Whether the client has yet to take some of what it was sent."""
        return bool(self._outbox)

    @property
    def waiting(self) -> What | None:
        """What the client's next message is, if it has been read already."""
        read = self._next
        if read is None or not read.done() or read.cancelled() or read.exception() is not None:
            return None
        return read.result().head.what

    def expect(self, *whats: What) -> None:
        """Begin to read the client's next message, one of these; a read that has begun continues, for one of these."""
        if self._next is None:
            self._next = self._loop.submit(self._read(frozenset(whats)))
        else:
            self._loop.call(setattr, self._incoming, "allowed", frozenset(whats))

    def receive(self, seconds: float) -> Received:
        """The message that is expected.

        Raises:
            LinkLostError: it did not come in time, or cannot come any more.
        """
        assert self._next is not None
        waited, self._next = self._next, None
        try:
            received = waited.result(seconds)
        except TimeoutError:
            self.cut(f"no message in {seconds:.3g} s")
            raise LinkLostError(self.why) from None
        except WireError as error:
            self.reject(error)
            raise LinkLostError(self.why) from None
        except (CancelledError, LinkLostError) as error:
            why = self.why or str(error) or "the link was lost"
            self.cut(why)
            raise LinkLostError(why) from None
        self.seen.last = time.time()
        self.seen.up += received.frame_bytes + received.envelope_bytes
        self._hub.note()
        return received

    def become(self, state: Doing) -> None:
        """Note what the client does now, if it is there."""
        with self._hub.changed:
            if self._hub.connections.get(self.client) is self:
                self.seen.become(state)
        self._hub.note()

    def cut(self, why: str) -> None:
        """End the stream at once."""
        self.why = self.why or why
        self._loop.call(self.end)

    def reject(self, error: WireError) -> None:
        """End the stream of a client that sends what it should not, and report why."""
        self.dismiss({"error": f"the server does not accept what it was sent: {error}", "later": False})

    def dismiss(self, why: dict[str, Any]) -> None:
        """End the stream when all has been sent, and say why: an error, after which it may come later, or a reason.

        Of a client that does not take what it is sent the stream ends after some seconds.
        """
        self.why = self.why or str(why.get("error", why.get("reason")))
        self.send(Head(What.END), why)
        self._put(None)
        self._loop.call(self._loop.loop.call_later, FAREWELL_S, self.end)

    # ------------------------------------------------------------------ on the loop

    def end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)

    async def _read(self, whats: Collection[What]) -> Received:
        self._incoming.allowed = whats
        while True:
            try:
                data = await self._context.read()
            except aio.UsageError:  # the stream has been ended here
                raise LinkLostError(self.why or "the stream is over") from None
            if data is EOF:
                raise LinkLostError("the client has left")
            received = self._incoming.feed(data)
            if received is not None:
                return received

    async def run(self) -> None:
        """Send what is to be sent until the stream is over."""
        writer = asyncio.ensure_future(self._write())
        try:
            await asyncio.wait([writer, self.over], return_when=asyncio.FIRST_COMPLETED)
        finally:
            writer.cancel()
            if self._next is not None:
                self._next.cancel()

    async def _write(self) -> None:
        while True:
            while self._outbox:
                piece = self._outbox.popleft()
                if piece is None:
                    return
                self.stream.wait(self._hub.config.timeout)
                try:
                    await self._context.write(piece)
                except GrpcError:  # the link is lost, or the hub has closed
                    return
                self.stream.rest()
                del piece  # else each client's last piece stays while there is nothing to send
                self.seen.last = time.time()
            self._asleep = True
            if not self._outbox:  # looked at once more: a piece may have come before it was known to sleep
                await self._more.wait()
            self._asleep = False
            self._more.clear()
