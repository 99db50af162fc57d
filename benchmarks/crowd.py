"""The server's memory while many clients are connected and take split-learning steps, against a bare echo of as many.

Clients are links in two processes, all there at once; a run's sequential schedule serves them, the first few working
ahead of their turn. The echo gets a message of every client at once and gives it back. Each server is a fresh process.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import echo
from benchmarks.links import BATCH, HOST, KIND, WAIT_S, listening, open_session, processes, smashed
from benchmarks.measure import peak_mb
from cutlayer.runtime.ground import forking
from cutlayer.runtime.ground.allocator import keep_freed_memory
from cutlayer.runtime.messages.boundary import METRICS, MODEL, Payload
from cutlayer.runtime.messages.ledger import Ledger
from cutlayer.runtime.network.client.link import ServerLink
from cutlayer.runtime.network.links import LinkLostError
from cutlayer.runtime.network.wire import What
from cutlayer.runtime.rounds.schedule import sequential
from cutlayer.runtime.rounds.session import ArrivingChannel, ServerParty
from cutlayer.runtime.transport import GrpcTransport

PROCESSES = 2  # of clients


@dataclass(frozen=True)
class Crowd:
    """Clients, MB of a message, steps of each, those that work ahead; ``stray``: each first sends one unasked."""

    clients: int
    mb: float
    steps: int
    ahead: int = GrpcTransport.ahead
    stray: bool = False


class Answers:
    """A server party without a model: the answer to a message is a gradient of its size."""

    def down(self, client: int) -> Payload:
        return {"client/weight": torch.zeros(1000)}

    def serve(self, kind: str, inbox: dict[int, Payload]) -> dict[int, Payload | None]:
        return {client: {"grad": torch.ones_like(cast(Tensor, fields["z"]))} for client, fields in inbox.items()}

    def absorb(self, client: int, upload: Any) -> None: ...


def be_server(pipe: Connection, crowd: Crowd) -> None:
    """Serve a round of the crowd; sends its port, then its peak memory in MB before the clients came and at the end."""
    keep_freed_memory()
    with listening(crowd.clients, None, WAIT_S) as hub:
        before = peak_mb()
        pipe.send(hub.port)
        with hub.changed:
            if not hub.changed.wait_for(lambda: len(hub.connections) == crowd.clients, WAIT_S):
                raise RuntimeError(f"{len(hub.connections)} of {crowd.clients} clients came")
        channel = ArrivingChannel(Ledger(), crowd.ahead, torch.device("cpu"))
        party = cast(ServerParty, Answers())
        report = sequential(list(range(crowd.clients)), lambda client: open_session(hub, client), _lost, party, channel)
        pipe.send((before, peak_mb(), len(report.survivors)))


def _lost(client: int) -> None:
    raise RuntimeError(f"client {client} was lost")


def be_clients(port: int, first: int, crowd: Crowd) -> None:
    """Be every ``PROCESSES``-th client of a crowd, each in a thread."""
    keep_freed_memory()
    payload = smashed(crowd.mb)
    _at_once(lambda client: _take_part(port, client, payload, crowd), range(first, crowd.clients, PROCESSES))


def _at_once(work: Callable[[int], None], clients: range) -> None:
    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _take_part(port: int, client: int, payload: Payload, crowd: Crowd) -> None:
    link = ServerLink(f"{HOST}:{port}", client, GrpcTransport(keepalive=WAIT_S))
    try:
        link.send(What.HELLO, {"client": client})
        link.receive()
        link.send(What.HELLO, {"samples": BATCH})
        if crowd.stray:
            link.send(What.ASK, payload, 0, KIND)
        session = link.receive({What.ROUND}).head.session
        link.receive({What.OPEN})
        for _ in range(crowd.steps):
            link.send(What.ASK, payload, session, KIND)
            link.receive({What.REPLY})
        link.send(What.METRICS, {"samples": BATCH}, session, METRICS)
        link.send(What.REPORT, {"keeps": False, "seconds": 0.0}, session)
        link.send(What.UPLOAD, {"client/weight": torch.zeros(1000)}, session, MODEL)
        with contextlib.suppress(LinkLostError):  # the server has its figure, and ends
            link.receive({What.END})
    finally:
        link.close()


def be_callers(pipe: Connection, port: int, first: int, crowd: Crowd) -> None:
    """Be every ``PROCESSES``-th client of the echo, each in a thread, all sending at once."""
    keep_freed_memory()
    data = bytes(round(crowd.mb * 1e6))

    def call(_: int) -> None:
        with echo.threaded(port, None) as caller:
            caller.seconds(data, crowd.steps)

    _at_once(call, range(first, crowd.clients, PROCESSES))
    pipe.send("done")


def platform_mb(crowd: Crowd) -> float:
    """MB by which the server's peak memory grows with the crowd."""
    with processes() as start:
        ours, theirs = forking.server().Pipe()
        start(be_server, theirs, crowd)
        port = _received(ours)
        for first in range(PROCESSES):
            start(be_clients, port, first, crowd)
        before, peak, finished = _received(ours)
    if finished != crowd.clients:
        raise RuntimeError(f"{finished} of {crowd.clients} clients finished")
    return peak - before


def echo_mb(crowd: Crowd) -> float:
    """The same of a bare echo, whose clients all send at once."""
    with processes() as start:
        ours, theirs = forking.server().Pipe()
        server = start(echo.serve, theirs, None)
        port, before = _received(ours), peak_mb(server)
        for first in range(PROCESSES):
            start(be_callers, theirs, port, first, crowd)
        for _ in range(PROCESSES):
            _received(ours)
        return peak_mb(server) - before


def _received(pipe: Connection) -> Any:
    if not pipe.poll(4 * WAIT_S):
        raise RuntimeError("a process says nothing")
    return pipe.recv()
