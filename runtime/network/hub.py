"""The server's end of the network: a gRPC server on an event loop of its own thread, one stream for each client.

The training loop stands in the main thread: it hands messages over to be sent, and waits for those that it expects.
A stream is read only while a message is expected, so that what a client sends ahead of its turn waits at the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import grpc
from grpc import aio

from runtime.config import ConfigError
from runtime.network.bounds import Limits, WireError, shown
from runtime.network.config import GrpcTransport
from runtime.network.connection import EOF, FAREWELL_S, Connection
from runtime.network.status import Seen
from runtime.network.tls import is_loopback, peer_client, server_credentials
from runtime.network.wire import CHUNK, PIECE_BYTES, Head, Incoming, What, outgoing

log = logging.getLogger(__name__)

SERVICE, METHOD = "cutlayer.Federation", "Join"
T = TypeVar("T")
# What a client may say before it is known, and how long it may take: nothing large, nothing slow.
_GREETING = Limits(message_bytes=0, text_bytes=1 << 16)
_GREETING_S = 20.0
_TURN_S = 1e-4


class RefusedError(Exception):
    """A client that may not take part.

    Args:
        later: it may try again.
    """

    def __init__(self, reason: str, *, later: bool = False) -> None:
        super().__init__(reason)
        self.later = later


def hand_over_quickly() -> None:
    """Let threads take turns within a fraction of a millisecond, where Python's own five are half a message's way.

    A message goes through the hands of several threads, and one that waits for its turn delays it.
    """
    sys.setswitchinterval(_TURN_S)


def channel_options(config: GrpcTransport) -> list[tuple[str, int]]:
    """Options of both ends: pieces go through whole, a silent link is probed, and is cut if it does not answer."""
    milliseconds = max(1, round(1000 * config.keepalive))
    return [
        ("grpc.max_receive_message_length", PIECE_BYTES),
        ("grpc.max_send_message_length", PIECE_BYTES),
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
        ("grpc.http2.ping_timeout_ms", milliseconds),  # else a minute, where only TCP answers, not the process
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", milliseconds // 2),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.enable_http_proxy", 0),
    ]


@dataclass
class Greeting:
    """What the hub asks before it lets a client in: both give a text, or raise RefusedError.

    Attributes:
        welcome: from the client's number and its first text, what it is told.
        admit: from its number and its second text, the limits of its messages.
    """

    welcome: Callable[[int, dict[str, Any]], dict[str, Any]]
    admit: Callable[[int, dict[str, Any]], Limits]
    changed: Callable[[], None] = field(default=lambda: None)
    """Told of anything new in what is known of clients, from any thread."""


class Hub:
    """Listens for clients.

    Attributes:
        port: that it listens on.
        connections: the clients that are there.
        seen: what is known of each client.
        secure: whether links have TLS. note: to be called when something of this changes.
        refused: how many streams were refused, and why the last one was.

    Raises:
        ConfigError: the address cannot be listened on, or needs certificates.
    """

    def __init__(self, config: GrpcTransport, population: int, greeting: Greeting) -> None:
        hand_over_quickly()
        self.config, self.population = config, population
        self.connections: dict[int, Connection] = {}
        self.seen = [Seen() for _ in range(population)]
        self.changed = threading.Condition()
        self.closing = False
        self.port = 0
        self.refused = (0, "")
        self.note = greeting.changed
        self._greeting = greeting
        self.secure = config.certificates is not None
        if not self.secure and not is_loopback(config.host) and not config.insecure:
            expected = "a folder of certificates, which `python certificates.py` makes, or transport.insecure=true"
            raise ConfigError("transport.certificates", None, f"{expected}: {config.host} is open to other machines")
        self._credentials = server_credentials(config.certificates) if config.certificates is not None else None
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()
        try:
            self.submit(self._listen()).result()
        except BaseException:
            self._stop_loop()
            raise

    @property
    def address(self) -> str:
        """HOST:PORT that it listens on."""
        return self._address(self.port)

    def _address(self, port: int) -> str:
        return f"[{self.config.host}]:{port}" if ":" in self.config.host else f"{self.config.host}:{port}"

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call on the loop; nothing happens once it is closed."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *args)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self, reason: str, *, later: bool = False) -> None:
        """Tell the clients why, and stop; once.

        Args:
            later: they are to come again; else the run is over.
        """
        if self.closing:
            return
        self.closing = True
        with contextlib.suppress(Exception):
            self.submit(self._close(reason, later=later)).result(30)
        self._stop_loop()

    # ------------------------------------------------------------------ on the loop

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _stop_loop(self) -> None:
        self.call(self.loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self.loop.close()

    async def _listen(self) -> None:
        # A window that grows with the link would let each client, unasked, fill many MB of the server's memory.
        windows = [("grpc.http2.lookahead_bytes", CHUNK), ("grpc.http2.bdp_probe", 0)]
        self._server = aio.server(options=[*channel_options(self.config), *windows])
        method: Any = cast(Any, grpc).stream_stream_rpc_method_handler(self._join)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: method}),))
        address = self._address(self.config.port)
        try:
            if self._credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise ConfigError("transport.port", address, f"an address of this machine that is free ({error})") from None
        self._farewell: asyncio.Future[dict[str, Any]] = self.loop.create_future()
        await self._server.start()

    async def _close(self, reason: str, *, later: bool) -> None:
        self._farewell.set_result({"error": reason, "later": True} if later else {"reason": reason})
        for connection in self.connections.values():
            connection.dismiss(self._farewell.result())
        await self._server.stop(FAREWELL_S)

    async def _join(self, _: Any, context: Any) -> None:
        """One stream from its beginning to its end."""
        connection = None
        try:
            connection = await self._greeted(context)
            if connection is None:
                await _tell(context, self._farewell.result())
                return
            self._enter(connection)
            if self._farewell.done():
                connection.dismiss(self._farewell.result())
            await connection.run()
        except (RefusedError, WireError, TimeoutError) as error:
            late = isinstance(error, TimeoutError)
            reason = "the greeting took too long" if late else str(error)
            later = late or (isinstance(error, RefusedError) and error.later)
            log.warning("refused %s: %s", context.peer(), reason)
            self.refused = (self.refused[0] + 1, f"{context.peer()}: {reason}")
            self.note()
            await _tell(context, {"error": reason, "later": later})
        finally:
            if connection is not None:
                self._leave(connection)

    async def _greeted(self, context: Any) -> Connection | None:
        """The connection, or None where the hub closes meanwhile."""
        greeting = asyncio.ensure_future(self._greet(context))
        try:
            await asyncio.wait([greeting, self._farewell], return_when=asyncio.FIRST_COMPLETED)
            return greeting.result() if greeting.done() else None
        finally:
            greeting.cancel()

    async def _greet(self, context: Any) -> Connection:
        incoming = Incoming(_GREETING, (What.HELLO,))
        hello = await asyncio.wait_for(_text(context, incoming), _GREETING_S)
        client = hello.get("client")
        if not isinstance(client, int) or isinstance(client, bool) or not 0 <= client < self.population:
            raise RefusedError(f"there is no client {shown(client)}; clients are 0 to {self.population - 1}")
        if self.secure and (known := peer_client(context.auth_context())) != client:
            whose = "no client" if known is None else f"client {known}"
            raise RefusedError(f"client {client} came with the certificate of {whose}")
        welcome = self._greeting.welcome(client, hello)
        for piece in outgoing(Head(What.WELCOME), welcome):
            await context.write(piece)
        # It may have data to load now; a link that breaks meanwhile ends this.
        facts = await asyncio.wait_for(_text(context, incoming), max(_GREETING_S, self.config.timeout))
        limits = self._greeting.admit(client, facts)
        return Connection(self, client, facts, context, limits)

    def _enter(self, connection: Connection) -> None:
        client = connection.client
        with self.changed:
            before = self.connections.get(client)
            if before is not None:
                before.dismiss({"error": "another process has come as this client", "later": False})
            seen = self.seen[client]
            seen.become("idle")
            seen.peer, seen.last, seen.joined = connection.peer, time.time(), seen.joined + 1
            self.connections[client] = connection
            self.changed.notify_all()
        log.info("client %d is here, from %s", client, seen.peer)
        self.note()

    def _leave(self, connection: Connection) -> None:
        client = connection.client
        connection.end()  # pyright: ignore[reportPrivateUsage]
        connection.why = connection.why or "the link was lost"
        with self.changed:
            if self.connections.get(client) is connection:
                del self.connections[client]
                seen = self.seen[client]
                seen.become("absent")
                if not self.closing:
                    seen.fail(connection.why)
                    log.warning("client %d is gone: %s", client, connection.why)
            self.changed.notify_all()
        self.note()


async def _tell(context: Any, why: dict[str, Any]) -> None:
    """Say why there is no more of a stream, if somebody is there to hear it."""
    with contextlib.suppress(Exception):
        for piece in outgoing(Head(What.END), why):
            await context.write(piece)


async def _text(context: Any, incoming: Incoming) -> dict[str, Any]:
    while True:
        data = await context.read()
        if data is EOF:
            raise RefusedError("the client has left")
        received = incoming.feed(data)
        if received is not None:
            return dict(received.body)


def missing(wanted: Iterable[int], there: Collection[int]) -> list[int]:
    """Those wanted that are not there."""
    return [client for client in wanted if client not in there]
