"""The two parties at work, and the channel between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import isgenerator
from typing import Protocol, cast

import torch

from cutlayer.algorithms.base import Algorithm, Server
from cutlayer.runtime.ground import rng
from cutlayer.runtime.messages.boundary import (
    METRICS,
    MODEL,
    ClientProgram,
    Fields,
    Message,
    Payload,
    Reply,
    Upload,
    on_device,
    owned,
)
from cutlayer.runtime.messages.crossing import packed
from cutlayer.runtime.messages.ledger import Ledger
from cutlayer.runtime.parties.blueprint import Blueprint
from cutlayer.runtime.parties.contexts import ClientContext


class Session(Protocol):
    """A client's round, wherever it runs."""

    def send(self, message: Reply) -> None:
        """Hand in the message that opens the round, later the reply to what the client asked; does not wait."""
        ...

    def receive(self) -> Message | Upload:
        """The client's next message, or its upload. After a one-way message it is called again with nothing sent.

        Raises:
            ClientDroppedError: the client is gone.
        """
        ...

    def close(self) -> None:
        """End the session, finished or not."""
        ...


class Workplace:
    """A party's own random stream, precision and clock, in place while it works.

    Args:
        memory: what is said where memory runs out, see ``ground.memory``.

    Attributes:
        stream: of random numbers. seconds: that the party has worked.
    """

    def __init__(
        self, blueprint: Blueprint, seed: int, memory: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.stream = rng.TorchStream(seed, blueprint.device)
        self._blueprint, self._memory = blueprint, memory
        self.seconds = 0.0

    @contextmanager
    def working(self) -> Generator[None]:
        """Everything the party computes happens inside."""
        start = time.perf_counter()
        with self._memory(), self.stream, self._blueprint.autocast():
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
        self._inbox: Reply = {}

    def send(self, message: Reply) -> None:
        self._inbox = message

    def receive(self) -> Message | Upload:
        message: Reply | None = self._inbox
        self._inbox = {}
        with self._workplace.working():
            if self._program is None:
                result = self._algorithm.client(self._ctx, message)
                if not isgenerator(result):
                    return self._upload(cast("Fields | None", result))
                self._program, message = result, None  # what a generator is begun with
            try:
                return self._program.send(cast(Reply, message))
            except StopIteration as end:
                return self._upload(end.value)

    def _upload(self, fields: Fields | None) -> Upload:
        self._ctx.leave()
        return Upload(packed(fields or {}), self._ctx.samples, self._ctx.means)

    def close(self) -> None:
        if self._program is not None:
            self._program.close()
            self._program = None
        self._on_close(self._workplace.seconds)


class Channel:
    """Everything that crosses goes through here: charged to the ledger, and handed over as the receiver's own.

    Args:
        ahead: clients whose round may be open, beyond the one whose turn it is; in one process that gains nothing.
    """

    def __init__(self, ledger: Ledger, ahead: int = 0) -> None:
        self._ledger = ledger
        self.ahead = ahead

    def down(self, client: int, kind: str, payload: Payload) -> Reply:
        """A message of the server to a client."""
        self._ledger.charge("down", kind, client, payload)
        return self.hand_over(payload)

    def reply(self, client: int, kind: str, payload: Payload) -> Reply:
        """The server's answer to a question that the client waits for."""
        self._ledger.count_reply()
        return self.down(client, kind, payload)

    def up(self, client: int, kind: str, payload: Payload) -> Reply:
        """A message of a client to the server."""
        self._ledger.charge("up", kind, client, payload)
        return self.hand_over(payload)

    def hand_over(self, payload: Payload) -> Reply:
        """The payload as its receiver's own."""
        return owned(payload)

    def upload(self, client: int, upload: Upload) -> Upload:
        """The end of a client's round; its metrics are charged apart from training traffic."""
        # Their bytes are those of any numbers: what a GPU still computes is not waited for here.
        self._ledger.charge("up", METRICS, client, {"samples": upload.samples, **dict.fromkeys(upload.metrics, 0.0)})
        return Upload(self.up(client, MODEL, upload.fields), upload.samples, upload.metrics)


class ArrivingChannel(Channel):
    """What comes from another process is the receiver's own without a copy.

    Args:
        device: where the server computes.
    """

    def __init__(self, ledger: Ledger, ahead: int, device: torch.device) -> None:
        super().__init__(ledger, ahead)
        self._device = device

    def hand_over(self, payload: Payload) -> Reply:
        return on_device(payload, self._device)


class Serving(Protocol):
    """The server as a round's schedule sees it; see ``algorithms.base.Server``."""

    def down(self, client: int) -> Payload: ...
    def serve(self, kind: str, inbox: Mapping[int, Payload]) -> dict[int, Payload | None]: ...
    def absorb(self, client: int, upload: Upload) -> None: ...
    def forget(self, client: int) -> None: ...


class ServerParty:
    """The server at work: the algorithm's server with its own random stream, precision and clock."""

    def __init__(self, server: Server, workplace: Workplace) -> None:
        self._server = server
        self._workplace = workplace

    def down(self, client: int) -> Payload:
        with self._workplace.working():
            return packed(self._server.down(client))

    def serve(self, kind: str, inbox: Mapping[int, Payload]) -> dict[int, Payload | None]:
        with self._workplace.working():
            replies = self._server.serve(kind, inbox)
        return {client: None if reply is None else packed(reply) for client, reply in replies.items()}

    def absorb(self, client: int, upload: Upload) -> None:
        with self._workplace.working():
            self._server.absorb(client, upload)
            self._server.ctx.leave(client)

    def forget(self, client: int) -> None:
        self._server.forget(client)
        self._server.ctx.forget(client)

    def open_round(self, round: int, cohort: list[int]) -> None:
        """Begin a round (from 0): its learning rates, and what the algorithm does before any client comes."""
        self._server.ctx.open_round(round)
        with self._workplace.working():
            self._server.open_round(cohort)

    def close_round(self) -> None:
        """End the round: the algorithm averages what it has absorbed."""
        with self._workplace.working():
            self._server.close_round()

    @property
    def seconds(self) -> float:
        """Time that the server computed in this round."""
        return self._workplace.seconds

    @property
    def server(self) -> Server:
        """The algorithm's own."""
        return self._server

    @property
    def drew(self) -> bool:
        """Whether the server drew a random number in this round."""
        return self._workplace.stream.drawn

    def count(self, seconds: float) -> None:
        """Time that the server computed elsewhere is time that it computed."""
        self._workplace.seconds += seconds
