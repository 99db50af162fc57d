"""A server's copies for single clients, computed beside their clients at the workers; see ``CopyPerClient``.

The messages between the two stay at the worker. What they were is said at the end of the client's round, and goes
through the run's schedule, channel and ledger again as messages of the same names, dtypes and shapes without contents.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cutlayer.algorithms.mixins import CopyPerClient
from cutlayer.runtime.messages.boundary import Message, Payload, Reply, Upload, flatten, on_device, owned, unflatten
from cutlayer.runtime.messages.frames import Signature, pieces, signature
from cutlayer.runtime.parties.contexts import Means
from cutlayer.runtime.parties.store import Row, Store
from cutlayer.runtime.rounds.servers import make_server
from cutlayer.runtime.rounds.session import ArrivingChannel, ServerParty, Serving, Workplace
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.workers.talk import Copied, Frame, Served, given, taken

_MESSAGE, _COPY = "message", "copy"


class DrewError(Exception):
    """A copy drew a random number: all copies of a server draw from one stream, in the order of the clients."""


def opening(message: Payload, parts: Mapping[str, Mapping[str, Tensor]]) -> Payload:
    """What opens a client's round with a copy that begins with the states of these parts."""
    states = {name: value for part, state in parts.items() for name, value in flatten(part, state).items()}
    return {**_below(_MESSAGE, message), **_below(_COPY, states)}


def _below(name: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}/{key}": value for key, value in payload.items()}


def _within(name: str, payload: Reply) -> Reply:
    return {key.removeprefix(f"{name}/"): value for key, value in payload.items() if key.startswith(f"{name}/")}


class Lender:
    """The run's server to the schedule: its copies are at the workers, and what they have done is done again in name.

    Attributes:
        store: of the rows that the server keeps for clients. drew: whether a copy drew a random number.
    """

    drew = False

    def __init__(self, server: Serving) -> None:
        assert isinstance(server, ServerParty)
        self._party, self._server = server, cast(Any, server.server)
        self.store: Store = self._server.ctx.store
        self._next: dict[int, Served] = {}

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """The states that copies begin with."""
        return {name: self._server.ctx.part(name).state_dict() for name in self._server.copied}

    def will_serve(self, client: int, served: Served) -> None:
        """What comes next of a client."""
        self._next[client] = served

    def take(self, client: int, copied: Copied, states: Reply, rows: Iterator[Reply]) -> None:
        """Take a copy back, with the rows that the server keeps for its client."""
        self._party.count(copied.seconds)
        self._server.take_back(client, unflatten(on_device(states, self._server.ctx.blueprint.device)))
        taken(self.store, client, copied.rows, rows)

    def down(self, client: int) -> Payload:
        return self._party.down(client)

    def serve(self, kind: str, inbox: Mapping[int, Payload]) -> dict[int, Payload | None]:
        answers: dict[int, Payload | None] = {}
        for client in inbox:
            served = self._next.pop(client)
            for name, dtype, value in served.logged:
                self._server.ctx.log(name, value if dtype is None else torch.tensor(value, dtype=dtype))
            answers[client] = None if served.down is None else without_contents(served.down)
        return answers

    def absorb(self, client: int, upload: Upload) -> None:
        self._party.absorb(client, upload)

    def forget(self, client: int) -> None:
        self._party.forget(client)


def without_contents(of: Signature) -> Reply:
    """A payload of this signature whose tensors take no memory."""
    plain: dict[str | None, bool | int | float] = {"bool": False, "int": 0, "float": 0.0}
    return {
        name: torch.empty(shape, dtype=dtype, device="meta") if kind is None else plain[kind]
        for name, dtype, shape, kind in of
    }


class NamingChannel(ArrivingChannel):
    """What has no contents is handed over as it is."""

    def hand_over(self, payload: Payload) -> Reply:
        real = {key: value for key, value in payload.items() if not (isinstance(value, Tensor) and value.is_meta)}
        return {**payload, **super().hand_over(real)}


class _Logged(Means):
    """Keeps what is logged one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.each: list[tuple[str, Tensor | float]] = []

    def log(self, name: str, value: Tensor | float) -> None:
        self.each.append((name, value.detach() if isinstance(value, Tensor) else float(value)))


class Copies:
    """The copies of a worker, of one client after another."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.store = Store(None, device=setup.device)
        self.server = make_server(setup, self.store)

    def open(self, client: int, round: int, opening: Reply, rows: Mapping[str, Row]) -> tuple[Copy, Reply]:
        """Begin a client's round (from 0): its copy, and the message for the client itself."""
        self.store.replace(client, rows)
        party = ServerParty(self.server, Workplace(self.setup.blueprint, 0))
        party.open_round(round, [client])
        for part, state in unflatten(on_device(_within(_COPY, opening), self.setup.device)).items():
            self.server.ctx.load(part, state)
        return Copy(self, party, client), _within(_MESSAGE, opening)


class Copy:
    """The server's copy for a client in one round."""

    def __init__(self, copies: Copies, party: ServerParty, client: int) -> None:
        self._copies, self._party, self._client = copies, party, client
        self._logged = copies.server.ctx.means = _Logged()
        self._served: deque[tuple[Served, list[tuple[str, Tensor | float]]]] = deque()

    def answer(self, message: Message) -> Reply:
        """What the server answers; nothing where the client waits for no answer."""
        self._logged.each = []
        reply = self._party.serve(message.kind, {self._client: owned(message.fields)})[self._client]
        down = owned(reply or {}) if message.expects_reply else None
        served = Served(
            message.kind,
            message.expects_reply,
            signature(message.fields),
            None if down is None else signature(down),
            [],
        )
        self._served.append((served, self._logged.each))
        return down or {}

    def end(self) -> tuple[Copied, list[Frame]]:
        """What there is to say of it, and frames: its states, then the rows that it keeps.

        Raises:
            DrewError: it gives other bits here.
        """
        copies, client = self._copies, self._client
        if self._party.drew:
            raise DrewError("the server draws random numbers, so that its copies stay with it")
        copies.server.ctx.leave(client)
        assert isinstance(copies.server, CopyPerClient)
        states = {
            key: value
            for part, state in copies.server.give_back(client).items()
            for key, value in flatten(part, state).items()
        }
        rows, kept = given(copies.store.staged(client))
        copies.store.replace(client, {})
        served = [_with_logged(each, values) for each, values in self._served]
        return Copied(served, rows, self._party.seconds), [pieces(states), *kept]


def _with_logged(served: Served, values: Sequence[tuple[str, Tensor | float]]) -> Served:
    """With what was logged as plain numbers, which waits for the device."""
    return served._replace(
        logged=[
            (name, value.dtype, value.item()) if isinstance(value, Tensor) else (name, None, value)
            for name, value in values
        ]
    )
