"""The server's end of the network: a gRPC server on an event loop of its own thread, one stream for each client.

The training loop stands in the main thread: it hands messages over to be sent, and waits for those that it expects.
A stream is read only while a message is expected, so that what a client sends ahead of its turn waits at the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import grpc
from grpc import aio

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.bounds import Limits, WireError, shown
from cutlayer.runtime.network.certificates.passports import Passport, Trust, passport
from cutlayer.runtime.network.certificates.tls import is_loopback, server_credentials
from cutlayer.runtime.network.links import EOF, METHOD, SERVICE, GrpcError, NetworkLoop, channel_options
from cutlayer.runtime.network.server import guard
from cutlayer.runtime.network.server.audit import Audit
from cutlayer.runtime.network.server.connection import FAREWELL_S, Connection
from cutlayer.runtime.network.server.status import Seen
from cutlayer.runtime.network.wire import Head, Incoming, What, outgoing
from cutlayer.runtime.transport import GrpcTransport

log = logging.getLogger(__name__)

T = TypeVar("T")
# What a client may say before it is known, and how long it may take: nothing large, nothing slow.
_GREETING = Limits(message_bytes=0, text_bytes=1 << 16)
_GREETING_S = guard.GREETING_S
_CARE_S = 1.0  # from one look at what has been there for too long to the next


class ClientRefusedError(Exception):
    """A client that may not take part.

    Args:
        later: it may try again.
    """

    def __init__(self, reason: str, *, later: bool = False) -> None:
        super().__init__(reason)
        self.later = later


@dataclass
class Greeting:
    """What the hub asks before it lets a client in: both give a text, or raise RefusedError.

    Attributes:
        welcome: from the client's number and its first text, what the server sends it.
        admit: from its number and its second text, the limits of its messages.
    """

    welcome: Callable[[int, dict[str, Any]], dict[str, Any]]
    admit: Callable[[int, dict[str, Any]], Limits]
    changed: Callable[[], None] = field(default=lambda: None)
    """Called with anything new in what is known of clients, from any thread."""
    audit: Audit = field(default_factory=lambda: Audit(None))
    """Called for each client that joins, is refused or leaves."""


class Hub:
    """Listens for clients.

    Attributes:
        port: that it listens on.
        connections: the clients that are there.
        seen: what is known of each client.
        secure: whether links have TLS. note: to be called when something of this changes.
        refused: how many streams were refused, and why the last one was.
        quiet: writes lines of the log that clients cause.

    Raises:
        ConfigError: the address cannot be listened on, or needs certificates.
    """

    def __init__(self, config: GrpcTransport, population: int, greeting: Greeting) -> None:
        self.config, self.population = config, population
        self.connections: dict[int, Connection] = {}
        self.seen = [Seen() for _ in range(population)]
        self.changed = threading.Condition()
        self.closing = False
        self.port = 0
        self.refused = (0, "")
        self.note = greeting.changed
        self.quiet = guard.Quiet(log)
        self._greeting, self._audit = greeting, greeting.audit
        self._streams = guard.Streams()
        self.secure = config.certificates is not None
        if not self.secure and not is_loopback(config.host) and not config.insecure:
            expected = "a folder of certificates, which `python certificates.py` makes, or transport.insecure=true"
            raise ConfigError("transport.certificates", None, f"{expected}: {config.host} is open to other machines")
        self._credentials = server_credentials(config.certificates) if config.certificates is not None else None
        self._trust = Trust(config.certificates) if config.certificates is not None else None
        guard.hush_grpc()
        guard.raise_file_limit(population)
        self.network = NetworkLoop.take()
        try:
            self.network.submit(self._listen()).result()
        except BaseException:
            self.network.release()
            raise
        self._audit.write("listening", address=self.address, clients=population, tls=self.secure)

    @property
    def address(self) -> str:
        """HOST:PORT that it listens on."""
        return self._address(self.port)

    def _address(self, port: int) -> str:
        return f"[{self.config.host}]:{port}" if ":" in self.config.host else f"{self.config.host}:{port}"

    def close(self, reason: str, *, later: bool = False) -> None:
        """Tell the clients why, and stop; once.

        Args:
            later: they are to come again; else the run is over.
        """
        if self.closing:
            return
        self.closing = True
        with contextlib.suppress(Exception):
            self.network.submit(self._close(reason, later=later)).result(30)
        self.network.release()
        self._report_rest(now=True)
        self._audit.write("closed", why=reason)

    # ------------------------------------------------------------------ on the loop

    async def _listen(self) -> None:
        options = [*channel_options(self.config), *guard.server_options(self.config, self.population)]
        most = guard.most_streams(self.population)
        self._server = aio.server(options=list(dict(options).items()), maximum_concurrent_rpcs=most)
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
        self._farewell: asyncio.Future[dict[str, Any]] = self.network.loop.create_future()
        await self._server.start()
        self._care = asyncio.ensure_future(self._take_care())

    async def _take_care(self) -> None:
        """End what has been there for too long: streams whose time is over, sessions whose certificate is not taken."""
        while True:
            await asyncio.sleep(_CARE_S)
            for stream in self._streams.end_late():
                self.quiet("late", "cut %s: it does not take what it is sent", stream.peer)
            if self._trust is not None:
                self._trust.refresh()
                for connection in list(self.connections.values()):
                    why, later = self._trust.objection(connection.passport)
                    if why and not connection.why:
                        connection.dismiss({"error": why, "later": later})
            self._report_rest()

    def _report_rest(self, *, now: bool = False) -> None:
        for kind, count in self.quiet.report_rest(now=now):
            self._audit.write("left out", kind=kind, count=count)

    async def _close(self, reason: str, *, later: bool) -> None:
        self._care.cancel()
        self._farewell.set_result({"error": reason, "later": True} if later else {"reason": reason})
        for connection in self.connections.values():
            connection.dismiss(self._farewell.result())
        await self._server.stop(FAREWELL_S)

    async def _join(self, _: Any, context: Any) -> None:
        """One stream from its beginning to its end."""
        connection, shown = None, passport(context.auth_context()) if self.secure else Passport(None)
        stream = self._streams.open(context, shown.client)
        try:
            connection = await self._greeted(context, stream, shown)
            if connection is None:
                await _send(context, self._farewell.result())
                return
            self._enter(connection)
            if self._farewell.done():
                connection.dismiss(self._farewell.result())
            await connection.run()
        except GrpcError:  # what was to be sent finds nobody
            self._refuse(stream, shown, "the client has left")
        except (ClientRefusedError, WireError, TimeoutError) as error:
            late = isinstance(error, TimeoutError)
            reason = "the greeting took too long" if late else str(error)
            later = late or (isinstance(error, ClientRefusedError) and error.later)
            await self._turn_away(context, stream, shown, reason, later=later)
        except Exception as error:  # a fault of this program is that client's trouble alone
            self.quiet("fault", "the greeting of %s cannot be served", stream.peer, trace=True)
            reason = f"the server cannot serve the greeting: {type(error).__name__}"
            await self._turn_away(context, stream, shown, reason, later=False)
        finally:
            stream.wait(FAREWELL_S)
            if connection is not None:
                self._leave(connection)

    async def _turn_away(self, context: Any, stream: guard.Stream, shown: Passport, why: str, *, later: bool) -> None:
        self._refuse(stream, shown, why)
        stream.wait(FAREWELL_S)
        await _send(context, {"error": why, "later": later})

    def _refuse(self, stream: guard.Stream, shown: Passport, reason: str) -> None:
        self.refused = (self.refused[0] + 1, f"{stream.peer}: {reason}")
        if self.quiet("refused", "refused %s: %s", stream.peer, reason):
            self._audit.write("refused", client=shown.client, peer=stream.peer, serial=shown.serial, why=reason)
        self.note()

    async def _greeted(self, context: Any, stream: guard.Stream, shown: Passport) -> Connection | None:
        """The connection, or None where the hub closes meanwhile."""
        writing = asyncio.Lock()
        greeting = asyncio.ensure_future(_outcome(self._greet(context, stream, shown, writing)))
        try:
            await asyncio.wait([greeting, self._farewell], return_when=asyncio.FIRST_COMPLETED)
            if not greeting.done():
                await writing.acquire()  # a stream takes nothing else while a piece of it is being written
            came = greeting.result() if greeting.done() else None
        finally:
            greeting.cancel()
        if isinstance(came, Exception):
            raise came
        return came

    async def _greet(self, context: Any, stream: guard.Stream, shown: Passport, writing: asyncio.Lock) -> Connection:
        incoming = Incoming(_GREETING, (What.HELLO,))
        stream.wait(_GREETING_S + FAREWELL_S)
        if shown.client is not None and self._streams.of_client(shown.client) > guard.STREAMS_EACH:
            raise ClientRefusedError(
                f"more than {guard.STREAMS_EACH} streams of client {shown.client} at a time", later=True
            )
        hello = await asyncio.wait_for(_text(context, incoming), _GREETING_S)
        client = self._identify(hello, shown)
        welcome = self._greeting.welcome(client, hello)
        stream.wait(_GREETING_S + FAREWELL_S)
        for piece in outgoing(Head(What.WELCOME), welcome):
            async with writing:
                await context.write(piece)
        # It may have data to load now; a link that breaks meanwhile ends this.
        patience = max(_GREETING_S, self.config.timeout)
        stream.wait(patience + FAREWELL_S)
        facts = await asyncio.wait_for(_text(context, incoming), patience)
        limits = self._greeting.admit(client, facts)
        stream.rest()
        return Connection(self, client, facts, context, limits, stream, shown)

    def _identify(self, hello: dict[str, Any], passport: Passport) -> int:
        """The client that says hello, if it is the one that it says."""
        client = hello.get("client")
        if not isinstance(client, int) or isinstance(client, bool) or not 0 <= client < self.population:
            raise ClientRefusedError(f"there is no client {shown(client)}; clients are 0 to {self.population - 1}")
        if self._trust is not None:
            if passport.client != client:
                whose = "no client" if passport.client is None else f"client {passport.client}"
                raise ClientRefusedError(f"client {client} came with the certificate of {whose}")
            self._trust.refresh()
            why, later = self._trust.objection(passport)
            if why:
                raise ClientRefusedError(why, later=later)
        return client

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
        if self.quiet(f"client {client}", "client %d is here, from %s", client, seen.peer, level=logging.INFO):
            self._audit.write("joined", client=client, peer=seen.peer, serial=connection.passport.serial)
        self.note()

    def _leave(self, connection: Connection) -> None:
        client = connection.client
        connection.end()  # pyright: ignore[reportPrivateUsage]
        silent = connection.stream.late
        connection.why = connection.why or ("it did not take what it was sent" if silent else "the link was lost")
        reported = True
        with self.changed:
            if self.connections.get(client) is connection:
                del self.connections[client]
                seen = self.seen[client]
                seen.become("absent")
                if not self.closing:
                    seen.fail(connection.why)
                    reported = self.quiet(f"client {client}", "client %d is gone: %s", client, connection.why)
            self.changed.notify_all()
        if reported:
            self._audit.write("left", client=client, peer=connection.peer, why=connection.why)
        self.note()


async def _outcome(work: Coroutine[Any, Any, T]) -> T | Exception:
    """What came of work; an error is given, as one that a task keeps is logged where nobody asks for it."""
    try:
        return await work
    except Exception as error:
        return error


async def _send(context: Any, why: dict[str, Any]) -> None:
    """Say why there is no more of a stream, if somebody is there to hear it."""
    with contextlib.suppress(Exception):
        for piece in outgoing(Head(What.END), why):
            await context.write(piece)


async def _text(context: Any, incoming: Incoming) -> dict[str, Any]:
    while True:
        data = await context.read()
        if data is EOF:
            raise ClientRefusedError("the client has left")
        received = incoming.feed(data)
        if received is not None:
            return dict(received.body)


def missing(wanted: Iterable[int], there: Collection[int]) -> list[int]:
    """Those wanted that are not there."""
    return [client for client in wanted if client not in there]
