"""What the network is measured against: gRPC alone, one message of a payload's size there and back.

An asynchronous server in a process of its own gives back what it gets, over one stream for each client; nothing is cut,
read or checked. Clients are threads' (sync) or an event loop's (aio).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import time
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import grpc
from grpc import aio

from cutlayer.runtime.ground.allocator import keep_freed_memory
from cutlayer.runtime.network.certificates.tls import client_credentials, server_credentials

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
HOST = "127.0.0.1"
_SERVICE, _METHOD = "echo.Echo", "Echo"
_END: Any = getattr(aio, "EOF")  # noqa: B009  (what a stream's end reads as; the types do not know it)


def serve(port: Connection, certificates: Path | None) -> None:
    """Give back what comes, until the process is ended; sends its port."""
    keep_freed_memory()
    asyncio.run(_serve(port, certificates))


async def _serve(port: Connection, certificates: Path | None) -> None:
    async def echo(_: Any, context: Any) -> None:
        while (data := await context.read()) is not _END:
            await context.write(data)

    server = aio.server(options=UNLIMITED)
    method: Any = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: method}),))
    if certificates is None:
        number = server.add_insecure_port(f"{HOST}:0")
    else:
        number = server.add_secure_port(f"{HOST}:0", server_credentials(certificates))
    await server.start()
    port.send(number)
    await server.wait_for_termination()


class Caller(Protocol):
    """A client of the echo."""

    def seconds(self, data: bytes, times: int) -> list[float]:
        """Send the data and wait until they are back, so many times; what each took."""
        ...


@contextlib.contextmanager
def threaded(port: int, certificates: Path | None) -> Generator[Caller]:
    """A client on gRPC's threads."""
    address = f"{HOST}:{port}"
    if certificates is None:
        channel = grpc.insecure_channel(address, UNLIMITED)
    else:
        channel = grpc.secure_channel(address, client_credentials(certificates, 0), UNLIMITED)
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    call: Any = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")(iter(outbox.get, None))
    try:
        yield _Threaded(outbox, call)
    finally:
        outbox.put(None)
        channel.close()


class _Threaded:
    def __init__(self, outbox: queue.SimpleQueue[bytes | None], call: Any) -> None:
        self._outbox, self._call = outbox, call

    def seconds(self, data: bytes, times: int) -> list[float]:
        found: list[float] = []
        for _ in range(times):
            start = time.perf_counter()
            self._outbox.put(data)
            back = next(self._call)
            found.append(time.perf_counter() - start)
            _compare(len(back), len(data))
        return found


@contextlib.contextmanager
def looping(port: int, certificates: Path | None) -> Generator[Caller]:
    """A client on an event loop, which runs while it is at work."""
    loop = asyncio.new_event_loop()
    try:
        made = loop.run_until_complete(_open(f"{HOST}:{port}", certificates))
        yield _Looping(loop, made[1])
        made[1].cancel()
        loop.run_until_complete(made[0].close())
    finally:
        loop.close()


async def _open(address: str, certificates: Path | None) -> tuple[Any, Any]:
    if certificates is None:
        channel: Any = aio.insecure_channel(address, options=UNLIMITED)
    else:
        channel = aio.secure_channel(address, client_credentials(certificates, 0), options=UNLIMITED)
    return channel, channel.stream_stream(f"/{_SERVICE}/{_METHOD}")()


class _Looping:
    def __init__(self, loop: asyncio.AbstractEventLoop, call: Any) -> None:
        self._loop, self._call = loop, call

    def seconds(self, data: bytes, times: int) -> list[float]:
        return self._loop.run_until_complete(self._seconds(data, times))

    async def _seconds(self, data: bytes, times: int) -> list[float]:
        found: list[float] = []
        for _ in range(times):
            start = time.perf_counter()
            await self._call.write(data)
            back = await self._call.read()
            found.append(time.perf_counter() - start)
            _compare(len(back), len(data))
        return found


def _compare(found: int, wanted: int) -> None:
    if found != wanted:
        raise RuntimeError(f"{found} bytes came back of {wanted}")


CLIENTS: dict[str, Callable[[int, Path | None], contextlib.AbstractContextManager[Caller]]] = {
    "sync": threaded,
    "aio": looping,
}


def call(pipe: Connection, port: int, certificates: Path | None, size: int) -> None:
    """Be both clients: for each order, a name and a number of steps, send the seconds of the steps."""
    keep_freed_memory()
    data = os.urandom(size)  # zeros would be one page of memory, which a processor always has at hand
    with contextlib.ExitStack() as stack:
        callers = {name: stack.enter_context(make(port, certificates)) for name, make in CLIENTS.items()}
        while (order := pipe.recv()) is not None:
            name, times = order
            pipe.send(callers[name].seconds(data, times))
