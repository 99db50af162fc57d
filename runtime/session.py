"""The two parties at work, and the channel between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from inspect import isgenerator
from typing import Any, Protocol

from algorithms.base import Algorithm, Server
from runtime import rng
from runtime.blueprint import Blueprint
from runtime.boundary import METRICS, MODEL, ClientProgram, Message, Payload, Reply, Upload, owned
from runtime.contexts import ClientContext
from runtime.ledger import Ledger


class Session(Protocol):
    """A client's round, wherever it runs. ``advance`` raises ClientDroppedError when the client is gone."""

    def start(self, down: Reply) -> Message | Upload:
        """Open the round with the server's first message; runs to the client's first message."""
        ...

    def advance(self, reply: Reply) -> Message | Upload:
        """Hand in the reply (empty after a one-way message); runs to the next message, or to the upload."""
        ...

    def close(self) -> None:
        """End the session, finished or not."""
        ...


class Workplace:
    """A party's own random stream, precision and clock, in place while it works."""

    def __init__(self, blueprint: Blueprint, seed: int) -> None:
        self._stream = rng.TorchStream(seed, blueprint.device)
        self._blueprint = blueprint
        self.seconds = 0.0

    @contextmanager
    def working(self) -> Generator[None]:
        """Everything the party computes happens inside."""
        start = time.perf_counter()
        with self._stream, self._blueprint.autocast():
            yield
        self.seconds += time.perf_counter() - start


class LocalSession:
    """A client's round in this process.

    Its seconds are those of its own computing. On a GPU they count the time to enqueue work, not to finish it.
    """

    def __init__(
        self,
        algorithm: type[Algorithm],
        ctx: ClientContext,
        workplace: Workplace,
        on_close: Callable[[float], None],
    ) -> None:
        """``on_close`` is called once, with the seconds that the client computed."""
        self._algorithm = algorithm
        self._ctx = ctx
        self._workplace = workplace
        self._on_close = on_close
        self._program: ClientProgram | None = None

    def start(self, down: Reply) -> Message | Upload:
        with self._workplace.working():
            result = self._algorithm.client(self._ctx, down)
            if isgenerator(result):
                self._program = result
                return self._step(next, self._program)
            return self._upload(result)  # type: ignore[arg-type]

    def advance(self, reply: Reply) -> Message | Upload:
        assert self._program is not None
        with self._workplace.working():
            return self._step(self._program.send, reply)

    def _step(self, move: Any, argument: Reply | ClientProgram) -> Message | Upload:
        try:
            return move(argument)
        except StopIteration as end:
            return self._upload(end.value)

    def _upload(self, fields: Payload | None) -> Upload:
        self._ctx.leave()
        return Upload(fields or {}, self._ctx.samples, self._ctx.means.read())

    def close(self) -> None:
        if self._program is not None:
            self._program.close()
            self._program = None
        self._on_close(self._workplace.seconds)


class Channel:
    """Everything that crosses goes through here: charged to the ledger, and handed over as the receiver's own."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def down(self, client: int, kind: str, payload: Payload) -> Reply:
        """A message of the server to a client."""
        self._ledger.charge("down", kind, client, payload)
        return owned(payload)

    def reply(self, client: int, kind: str, payload: Payload) -> Reply:
        """The server's answer to a question that the client waits for."""
        self._ledger.replied()
        return self.down(client, kind, payload)

    def up(self, client: int, kind: str, payload: Payload) -> Reply:
        """A message of a client to the server."""
        self._ledger.charge("up", kind, client, payload)
        return owned(payload)

    def upload(self, client: int, upload: Upload) -> Upload:
        """The end of a client's round; its metrics are charged apart from training traffic."""
        self._ledger.charge("up", METRICS, client, {"samples": upload.samples, **upload.metrics})
        return Upload(self.up(client, MODEL, upload.fields), upload.samples, dict(upload.metrics))


class ServerParty:
    """The server at work: the algorithm's server with its own random stream, precision and clock."""

    def __init__(self, server: Server, workplace: Workplace) -> None:
        self.server = server
        self._workplace = workplace

    def down(self, client: int) -> Payload:
        with self._workplace.working():
            return self.server.down(client)

    def serve(self, kind: str, inbox: Mapping[int, Payload]) -> dict[int, Payload | None]:
        with self._workplace.working():
            return self.server.serve(kind, inbox)

    def absorb(self, client: int, upload: Upload) -> None:
        with self._workplace.working():
            self.server.absorb(client, upload)

    def open_round(self, cohort: list[int]) -> None:
        with self._workplace.working():
            self.server.open_round(cohort)

    def close_round(self) -> None:
        with self._workplace.working():
            self.server.close_round()

    @property
    def seconds(self) -> float:
        """Time that the server computed in this round."""
        return self._workplace.seconds
