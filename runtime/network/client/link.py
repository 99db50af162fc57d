"""A client's end of the network: one stream to the server, used by one thread and served by the process's loop."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections import deque
from collections.abc import Collection, Iterable
from concurrent.futures import CancelledError, Future
from typing import Any

import grpc
from grpc import aio

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.bounds import Limits, WireError
from cutlayer.runtime.network.certificates.tls import client_credentials, is_loopback
from cutlayer.runtime.network.links import (
    EOF,
    METHOD,
    SERVICE,
    GrpcError,
    LinkLostError,
    NetworkLoop,
    channel_options,
)
from cutlayer.runtime.network.wire import PIECE_BYTES, Head, Incoming, Received, What, outgoing
from cutlayer.runtime.transport import GrpcTransport

# Messages that wait to be read: more of them gain nothing and cost memory.
_MESSAGES = 2
# What gRPC says of an address that it cannot connect to, before it says why.
_TRIED = re.compile(r"^failed to connect to all addresses; last error: \w+: ipv[46]:\S+: ")
_ANSWERS = frozenset({What.WELCOME, What.ROUND, What.OPEN, What.REPLY, What.EVALUATE, What.CLOSE, What.END})


class ServerLink:
    """One stream to the server; what is sent leaves in order, what comes is read ahead by a message or two.

    Args:
        address: HOST:PORT of the server.

    Raises:
        ConfigError: the server is on another machine and there are no certificates.
    """

    def __init__(self, address: str, client: int, config: GrpcTransport) -> None:
        credentials: Any = None
        if config.certificates is not None:
            credentials = client_credentials(config.certificates, client)
        elif not config.insecure and not is_loopback(address.rpartition(":")[0].strip("[]")):
            expected = f"a folder of certificates for {address}, or transport.insecure=true"
            raise ConfigError("transport.certificates", None, expected)
        # A pool of its own: else gRPC waits by itself before it tries an address again that has just failed.
        # Large frames cost less time, and the server is taken at its word; it takes only small ones of clients.
        options = [
            *channel_options(config),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.max_frame_size", PIECE_BYTES),
        ]
        self._changed = threading.Condition()
        self._end: Exception | None = None
        self._inbox: deque[Received] = deque()
        self._room = asyncio.Event()  # in the inbox
        self._room.set()
        self._closed = False
        self._incoming = Incoming(Limits(message_bytes=config.message_bytes), _ANSWERS)
        self._loop = NetworkLoop.take()
        try:
            self._loop.submit(self._open(address, credentials, options)).result()
        except BaseException:
            self._loop.release()
            raise
        self._reader: Future[None] = self._loop.submit(self._read())

    def send(self, what: What, body: Any, session: int = 0, kind: str = "") -> None:
        """Send a message; returns when it has left. Once the stream is over nothing is sent."""
        self.send_pieces(outgoing(Head(what, session, kind), body))

    def send_pieces(self, pieces: Iterable[bytes]) -> None:
        """Send the pieces of a message, each made when the one before has left."""
        if self._end is not None:
            return
        with contextlib.suppress(CancelledError):
            self._loop.submit(self._write(pieces)).result()

    def receive(self, whats: Collection[What] = _ANSWERS) -> Received:
        """The next message, one of these.

        Raises:
            LinkLostError: the stream is over; says why.
            WireError: it is another one, or none at all.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self._inbox) or self._end is not None)
            if not self._inbox:
                assert self._end is not None
                raise self._end
            received = self._inbox.popleft()
            full = len(self._inbox) == _MESSAGES - 1
        if full:
            self._loop.call(self._room.set)
        if received.head.what not in whats:
            raise WireError(f"message {received.head.what.name} is not expected")
        return received

    def push_back(self, received: Received) -> None:
        """Make a message the next one again."""
        with self._changed:
            self._inbox.appendleft(received)

    def peek(self) -> What | None:
        """What the next message is, if it is here already.

        Raises:
            LinkLostError, WireError: as ``receive``.
        """
        with self._changed:
            if not self._inbox and self._end is not None:
                raise self._end
            return self._inbox[0].head.what if self._inbox else None

    def finish(self, seconds: float) -> None:
        """Send nothing more; return when the server has ended the stream, as on a last word, or after some seconds."""
        self._loop.submit(self._call.done_writing())
        with self._changed:
            self._changed.wait_for(lambda: self._end is not None, seconds)

    def close(self) -> None:
        """End the stream."""
        if self._closed:
            return
        self._closed = True
        self._loop.submit(self._shut()).result()
        self._reader.result()
        self._loop.release()

    # ------------------------------------------------------------------ on the loop

    async def _open(self, address: str, credentials: Any, options: list[tuple[str, int]]) -> None:
        if credentials is None:
            self._channel: Any = aio.insecure_channel(address, options=options)
        else:
            self._channel = aio.secure_channel(address, credentials, options=options)
        # Bytes go as they are: there is no protobuf.
        self._call: Any = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")()

    async def _shut(self) -> None:
        self._call.cancel()
        self._room.set()
        await self._channel.close()

    async def _write(self, pieces: Iterable[bytes]) -> None:
        with contextlib.suppress(
            GrpcError, grpc.RpcError, asyncio.InvalidStateError
        ):  # it is over; the reader says why
            for piece in pieces:
                await self._call.write(piece)

    async def _read(self) -> None:
        end: Exception = LinkLostError("the server has ended the stream")
        try:
            while (data := await self._call.read()) is not EOF:
                received = self._incoming.feed(data)
                if received is not None:
                    await self._put(received)
        except WireError as error:
            end = error
        except grpc.RpcError as error:
            end = LinkLostError(_reason(error))
        except asyncio.CancelledError:
            end = LinkLostError("the link is closed")
        except Exception as error:
            end = LinkLostError(f"{type(error).__name__}: {error}")
        with self._changed:
            self._end = end
            self._changed.notify_all()
        self._call.cancel()  # what waits to be sent

    async def _put(self, received: Received) -> None:
        with self._changed:
            self._inbox.append(received)
            if len(self._inbox) >= _MESSAGES:
                self._room.clear()
            self._changed.notify_all()
        await self._room.wait()


def _reason(error: Any) -> str:
    """gRPC's reason in one line."""
    details = _TRIED.sub("", " ".join(str(error.details() or "").split()))
    return f"{error.code().name.lower().replace('_', ' ')}: {details[:300]}" if details else str(error.code())
