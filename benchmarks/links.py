"""The platform's own links without a run: a hub that lets everyone in, and clients that do nothing but take steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from cutlayer.datasets import DatasetInfo
from cutlayer.runtime.ground import forking
from cutlayer.runtime.ground.allocator import keep_freed_memory
from cutlayer.runtime.messages.boundary import Payload, Reply
from cutlayer.runtime.messages.bounds import Limits
from cutlayer.runtime.network.check import check_values
from cutlayer.runtime.network.client.link import ServerLink
from cutlayer.runtime.network.server.hub import Greeting, Hub
from cutlayer.runtime.network.server.remote_session import RemoteSession
from cutlayer.runtime.network.wire import What
from cutlayer.runtime.transport import GrpcTransport
from cutlayer.tasks import TASKS

WAIT_S = 120.0
HOST = "127.0.0.1"
CLASSES, BATCH = 10, 100
INFO = DatasetInfo("any", 1, 8, 8, CLASSES, ())
KIND = "smashed"


def smashed(mb: float) -> Reply:
    """A batch's smashed data of so many MB (10^6 bytes), and its labels."""
    return {"z": torch.randn(BATCH, round(mb * 1e6 / 4 / BATCH)), "y": torch.arange(BATCH) % CLASSES}


def take_steps(port: int, client: int, certificates: Path | None, mb: float) -> None:
    """Be a client that asks again as soon as it is answered, until the server ends the run."""
    keep_freed_memory()
    link, payload = ServerLink(f"{HOST}:{port}", client, GrpcTransport(certificates=certificates)), smashed(mb)
    try:
        link.send(What.HELLO, {"client": client})
        link.receive()
        link.send(What.HELLO, {"samples": BATCH})
        while (received := link.receive()).head.what is not What.END:
            if received.head.what in (What.OPEN, What.REPLY):
                link.peek()  # as a client of a run does
                link.send(What.ASK, payload, received.head.session, KIND)
    finally:
        link.close()


@contextlib.contextmanager
def listening(clients: int, certificates: Path | None, keepalive: float = 10.0) -> Generator[Hub]:
    """A hub that lets everyone in."""
    config = GrpcTransport(port=0, certificates=certificates, timeout=WAIT_S, keepalive=keepalive)
    limits = Limits(message_bytes=round(config.max_message_mb * 1e6))
    hub = Hub(config, clients, Greeting(lambda *_: {}, lambda *_: limits))
    try:
        yield hub
    finally:
        hub.close("the benchmark is over")


def check(_: str, fields: Payload) -> None:
    """What a run checks of each message."""
    check_values(fields, lambda y: TASKS["classification"].wrong(y, INFO))


def open_session(hub: Hub, client: int) -> RemoteSession:
    """A round of a client, once it is here."""
    with hub.changed:
        if not hub.changed.wait_for(lambda: client in hub.connections, WAIT_S):
            raise RuntimeError(f"client {client} does not come")
    connection = hub.connections[client]
    return RemoteSession(connection, {}, check, timeout=WAIT_S, until=math.inf, on_close=lambda _: None)


@contextlib.contextmanager
def processes() -> Generator[Callable[..., int]]:
    """Starts processes, and ends them all."""
    context, started = forking.server("benchmarks.crowd"), []

    def start(target: Callable[..., None], *arguments: Any) -> int:
        process = context.Process(target=target, args=arguments, daemon=True)
        process.start()
        started.append(process)
        return process.pid or 0

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.join()
