"""What both ends of a stream between server and client have in common."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, ClassVar, TypeVar

from grpc import aio

from cutlayer.runtime.network.wire import PIECE_BYTES
from cutlayer.runtime.transport import GrpcTransport

SERVICE, METHOD = "cutlayer.Federation", "Join"
_REST_S = 5.0  # of what is still at work when nobody uses the loop any more

T = TypeVar("T")
GrpcError: type[Exception] = getattr(aio, "BaseError")  # noqa: B009  (as below)
EOF: Any = getattr(aio, "EOF")  # noqa: B009  (what a stream's end reads as; the types do not know it)


class LinkLostError(Exception):
    """A peer is gone, or its next message has not come in time."""


class NetworkLoop:
    """The event loop of this process's streams, in a thread of its own that is there while somebody uses it.

    There is one for all of them: gRPC wakes every loop of a process for each event of any.
    """

    _lock: ClassVar = threading.Lock()
    _current: ClassVar[NetworkLoop | None] = None

    def __init__(self) -> None:
        self._users = 0
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls) -> NetworkLoop:
        """The loop, to be released once."""
        with cls._lock:
            current = cls._current = cls._current or cls()
            current._users += 1
            return current

    def release(self) -> None:
        """Use it no longer."""
        cls = type(self)
        with cls._lock:
            self._users -= 1
            if self._users:
                return
            cls._current = None
        self.call(self.loop.stop)
        self._thread.join(2 * _REST_S)
        if not self._thread.is_alive():
            self.loop.close()

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call on the loop; nothing happens once it is closed."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *args)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        rest = asyncio.all_tasks(self.loop)  # such as what gRPC still does for streams that have ended
        for task in rest:
            task.cancel()
        if rest:
            self.loop.run_until_complete(asyncio.wait(rest, timeout=_REST_S))


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
