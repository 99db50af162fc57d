"""The same network without any rights: all hosts are this machine, and each client reaches the server by a relay.

A relay can be cut: it takes no more and gives nothing on, and neither end is told, as with a cable that was pulled.
What was on the way comes out once it is healed, as TCP sends again what was lost. It counts what it carries.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from tests.network.programs import Program, Traffic, bound_to_test
from tests.network.shaping import Conditions, Line

_CHUNK = 8192
_QUEUE = 64
_RESEND_S = 0.2
"""What TCP waits at least before it sends again what was lost."""


class Loopback:
    """Use as a context manager."""

    form = "loopback"
    listen = "127.0.0.1"

    def __init__(self, folder: Path, clients: int = 3, seed: int = 0) -> None:
        self.programs: list[Program] = []
        self.port = _free_port()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        links = [Relay(self._loop, self.port, seed + client) for client in range(clients)]
        self.server = LoopbackHost(self, "server", _Together(links))
        self.clients = [LoopbackHost(self, f"client-{client}", link) for client, link in enumerate(links)]
        self._relays = links

    def dial(self, client: int) -> tuple[str, int]:
        return self.listen, self._relays[client].port

    def __enter__(self) -> Loopback:
        self._thread.start()
        for relay in self._relays:
            relay.wait(relay.open())
        return self

    def __exit__(self, *_: object) -> None:
        for program in self.programs:
            program.end()
        for relay in self._relays:
            relay.wait(relay.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class LoopbackHost:
    """This machine, with the link that this host would have."""

    def __init__(self, network: Loopback, name: str, link: Relay | _Together) -> None:
        self.name, self.link, self._network = name, link, network

    def start(self, command: Sequence[str], log: Path, **environment: str) -> Program:
        program = Program([*bound_to_test(), *command], log, self.name, nested=False, **environment)
        self._network.programs.append(program)
        return program


class Relay:
    """Listens on a port of its own and carries every connection to the server's, in a thread beside the test."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server_port: int, seed: int) -> None:
        self._loop, self._server_port = loop, server_port
        self._up = asyncio.Event()
        self._up.set()
        # Sent by the client, received by it.
        self._lines = (Line(2 * seed), Line(2 * seed + 1))
        self._carried = [0, 0]
        self._tasks: set[asyncio.Task[None]] = set()

    def wait(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done in the relay's thread."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0, limit=_CHUNK)
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # in which the loop closes what was aborted

    def cut(self) -> None:
        self.wait(self._set(False))

    def heal(self) -> None:
        self.wait(self._set(True))

    async def _set(self, up: bool) -> None:
        (self._up.set if up else self._up.clear)()

    def shape(self, **conditions: float) -> None:
        self.wait(self._shape(Conditions(**conditions)))

    async def _shape(self, conditions: Conditions) -> None:
        for line in self._lines:
            line.conditions = conditions

    def traffic(self) -> Traffic:
        return Traffic(*self._carried)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = [writer]
        try:
            await self._up.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._server_port, limit=_CHUNK)
            writers.append(far_writer)
            async with asyncio.TaskGroup() as group:
                for of, (source, sink) in enumerate(((reader, far_writer), (far_reader, writer))):
                    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUE)
                    group.create_task(self._take(source, waiting, self._lines[of]))
                    group.create_task(self._give(waiting, sink, of))
        except* OSError:
            # One end is gone: the other is told, if the word comes through.
            await self._up.wait()
        finally:
            for each in writers:
                each.transport.abort()
            self._tasks.discard(task)

    async def _take(
        self, reader: asyncio.StreamReader, waiting: asyncio.Queue[tuple[float, bytes]], line: Line
    ) -> None:
        chunk = b"some"
        while chunk:
            chunk = await reader.read(_CHUNK)
            now = time.monotonic()
            while (due := line.due(len(chunk), now)) is None:
                now += _RESEND_S
            await waiting.put((due, chunk))

    async def _give(self, waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, of: int) -> None:
        while True:
            due, chunk = await waiting.get()
            while (left := due - time.monotonic()) > 0:
                await asyncio.sleep(left)
            await self._up.wait()
            if not chunk:
                writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()
            self._carried[of] += len(chunk)


class _Together:
    """The server's link: all that its clients have."""

    def __init__(self, links: list[Relay]) -> None:
        self._links = links

    def cut(self) -> None:
        for link in self._links:
            link.cut()

    def heal(self) -> None:
        for link in self._links:
            link.heal()

    def shape(self, **conditions: float) -> None:
        for link in self._links:
            link.shape(**conditions)

    def traffic(self) -> Traffic:
        counted = [link.traffic() for link in self._links]
        return Traffic(sum(each.received_bytes for each in counted), sum(each.sent_bytes for each in counted))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
