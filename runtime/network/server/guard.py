"""What a server lets its peers hold: connections, streams, time, and lines of the log.

gRPC bounds what it can by options of the channel. What it cannot end by itself, a stream whose peer takes nothing of
what it is sent, is ended here with its connection, when its time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from cutlayer.runtime.network.wire import CHUNK_BYTES
from cutlayer.runtime.transport import GrpcTransport

log = logging.getLogger(__name__)

GREETING_S = 20.0
"""Seconds for a handshake, and for each part of a greeting."""
STREAMS_EACH = 4
"""Streams at a time with one client's certificate: the one that works, and those of processes that come after it."""
_SPARE_STREAMS, _SPARE_CONNECTIONS, _SPARE_FILES = 64, 1000, 256
_IDLE_MS = 10_000  # of a connection without a stream
_HEADER_BYTES = 4096  # of a stream; a client of this platform has some hundred
_STRIKES = 20  # pings that come too soon after each other, until a connection is ended
_FILES = "/dev/fd"


def most_streams(population: int) -> int:
    """At a time: of each client one that works and one that comes in its place, and some that greet."""
    return 2 * population + _SPARE_STREAMS


def most_connections(population: int) -> int:
    """At a time."""
    return 2 * population + _SPARE_CONNECTIONS


def server_options(config: GrpcTransport, population: int) -> list[tuple[str, int]]:
    """Options of a server's end that bound what anyone who connects can hold or cause."""
    milliseconds = max(1, round(1000 * config.keepalive))
    return [
        # A window that grows with the link would let each client, unasked, fill many MB of the server's memory.
        ("grpc.http2.lookahead_bytes", CHUNK_BYTES),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_concurrent_streams", 1),  # of a connection
        ("grpc.max_allowed_incoming_connections", most_connections(population)),
        ("grpc.server_handshake_timeout_ms", round(1000 * GREETING_S)),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.http2.max_ping_strikes", _STRIKES),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", min(milliseconds, 1000) // 2),
        ("grpc.max_metadata_size", _HEADER_BYTES),
        ("grpc.absolute_max_metadata_size", _HEADER_BYTES),
        ("grpc.per_message_decompression", 0),  # a MB of zeros, compressed, is a thousand bytes
    ]


def raise_file_limit(population: int) -> None:
    """Let this process have as many open files as there may be connections, if the system allows it."""
    needed = most_connections(population) + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    granted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
    if granted < needed:
        log.warning(
            "this process may have %d open files, %d connections need %d", granted, needed - _SPARE_FILES, needed
        )


# ---------------------------------------------------------------------- streams and their time


@dataclass(eq=False)
class Stream:
    """A stream from its first byte until it has left nothing behind.

    Attributes:
        peer: as gRPC names it. client: that its certificate speaks for; None without one.
        until: when it is ended, on the loop's clock.
    """

    peer: str
    client: int | None
    until: float = math.inf
    late: bool = False

    def wait(self, seconds: float) -> None:
        """What it does now may take so long."""
        self.until = asyncio.get_running_loop().time() + seconds

    def rest(self) -> None:
        """It waits for the server, which may take as long as it likes."""
        self.until = math.inf


class Streams:
    """All streams of a server; used on its loop."""

    def __init__(self) -> None:
        self._all: set[Stream] = set()

    def open(self, context: Any, client: int | None) -> Stream:
        """Count a stream until gRPC has done with it."""
        stream = Stream(str(context.peer()), client)
        self._all.add(stream)

        def done(_: Any) -> None:
            self._all.discard(stream)

        context.add_done_callback(done)
        return stream

    def __len__(self) -> int:
        return len(self._all)

    def of_client(self, client: int) -> int:
        """How many there are with a client's certificate."""
        return sum(stream.client == client for stream in self._all)

    def end_late(self) -> list[Stream]:
        """End those whose time is over, with their connections; those that are so for the first time."""
        now = asyncio.get_running_loop().time()
        late = [stream for stream in self._all if stream.until < now]
        if late:
            hang_up({stream.peer for stream in late})
        first = [stream for stream in late if not stream.late]
        for stream in first:
            stream.late = True
        return first


def hang_up(peers: Collection[str]) -> int:
    """End the TCP connections of peers, named as gRPC does (ipv4:10.0.0.2:40000); how many were found.

    gRPC for Python has no means to end a stream whose peer takes nothing of what it is sent, so that this looks for the
    socket among the process's open files. gRPC then finds the connection ended, as if the peer had gone.
    """
    wanted = {place for peer in peers if (place := _place(peer)) is not None}
    found = 0
    with contextlib.suppress(OSError):
        for name in os.listdir(_FILES):
            with contextlib.suppress(OSError, ValueError):
                found += _hang_up(int(name), wanted)
    return found


def _hang_up(file: int, wanted: Collection[tuple[str, int]]) -> bool:
    if not stat.S_ISSOCK(os.fstat(file).st_mode):
        return False
    with socket.socket(fileno=os.dup(file)) as each:
        if each.family not in (socket.AF_INET, socket.AF_INET6) or _plain(*each.getpeername()[:2]) not in wanted:
            return False
        each.shutdown(socket.SHUT_RDWR)
        return True


def _place(peer: str) -> tuple[str, int] | None:
    kind, _, rest = peer.partition(":")
    host, _, port = unquote(rest).rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdigit():
        return None
    return _plain(host.strip("[]"), int(port))


def _plain(host: str, port: int) -> tuple[str, int]:
    """An address in one spelling: an IPv4 address is itself where a socket of IPv6 has it, too."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address), port


# ---------------------------------------------------------------------- lines of the log


@dataclass
class _Window:
    began: float
    reported: int = 0
    more: int = 0


@dataclass
class Quiet:
    """Lines of the log that peers cause: of each kind no more than ``most`` in ``seconds``; the others are counted."""

    log: logging.Logger
    most: int = 20
    seconds: float = 60.0
    _windows: dict[str, _Window] = field(default_factory=dict[str, _Window])
    _lock: Any = field(default_factory=threading.Lock)

    def __call__(self, kind: str, text: str, *args: object, level: int = logging.WARNING, trace: bool = False) -> bool:
        """Write a line, unless there were too many of its kind; whether it was written.

        Args:
            trace: with where the exception that is handled now comes from.
        """
        with self._lock:
            now = time.monotonic()
            window = self._windows.setdefault(kind, _Window(now))
            if now - window.began > self.seconds and not window.more:
                window = self._windows[kind] = _Window(now)
            if window.reported >= self.most:
                window.more += 1
                return False
            window.reported += 1
        self.log.log(level, text, *args, exc_info=trace)
        return True

    def report_rest(self, *, now: bool = False) -> list[tuple[str, int]]:
        """Write how many lines of each kind were left out, once their time is over or ``now``; kinds and counts."""
        with self._lock:
            clock = time.monotonic()
            over = {kind: each for kind, each in self._windows.items() if now or clock - each.began > self.seconds}
            for kind in over:
                del self._windows[kind]
        rest = [(kind, each.more) for kind, each in over.items() if each.more]
        for kind, count in rest:
            self.log.warning("%s: %d more lines like these were left out", kind, count)
        return rest


class _NoLeaving(logging.Filter):
    """Leaves out what gRPC logs, with a traceback, of a peer that has left while it was sent something."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(("ExecuteBatchError raised", "Failed sending error status"))


_no_leaving = _NoLeaving()


def hush_grpc() -> None:
    """Keep out of the log what gRPC says of peers that leave; the hub reports those that matter."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_no_leaving)
