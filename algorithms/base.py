"""The contract of an algorithm: a client program, a server, and the messages that pass between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Payload, Upload, unflatten
from cutlayer.runtime.messages.crossing import crossed, gradients, require_gradients, tensor
from cutlayer.runtime.parties.aggregate import Average
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext, ServerContext
from cutlayer.runtime.parties.optim import PartOptimizer


@dataclass(frozen=True)
class NoConfig:
    """The configuration of an algorithm without keys of its own."""


@dataclass(frozen=True)
class Flow:
    """One arrow of a method's pseudocode: what crosses, in which direction, and how often.

    Nothing is sent by it: the bytes that it says beforehand are compared with those that the channel counts.
    """

    direction: Literal["up", "down"]
    """``up`` is from a client to the server, ``down`` the other way."""

    kind: str
    """The kind of the message: ``model`` opens and ends a client's round, others are the method's own."""

    fields: tuple[str, ...]
    """What is in it.

    The name of a part is its whole state, ``smashed`` the cut layer's output for a batch, ``body_output`` that of the
    server part between two cuts, ``labels`` one int64 for each sample. Of other names the method gives the size
    (`OwnSizes`).
    """

    per: Literal["round", "batch"] = "round"
    """Whether it crosses once in a client's round, or with each batch."""

    every: str | None = None
    """The key of the method's configuration with q, where it crosses in every q-th local step only."""

    rounds: str | None = None
    """The key of the method's configuration with l, where it crosses in one of l rounds only."""

    when: Literal["start", "join"] = "start"
    """Which of these l rounds: the first, or the first one after it in which the client takes part (``join``)."""

    first: bool = False
    """With ``start``: in the client's very first round too."""

    def interval(self, config: Any) -> int:
        """Local steps from one crossing to the next."""
        return int(getattr(config, self.every)) if self.every else 1

    def crosses(self, config: Any, round: int, *, before: int | None) -> bool:
        """Whether anything crosses in this round (from 0), given the client's round before it (None: it is new)."""
        if not self.rounds:
            return True
        length = int(getattr(config, self.rounds))
        if self.when == "join":
            return before is None or -(-before // length) != -(-round // length)
        return round % length == 0 or (self.first and before is None)


class Server:
    """The server of an algorithm: answers messages, and averages what travels.

    A method's own server adds a handler for each kind of message. ``on_<kind>(client, message)`` returns the reply's
    fields, or None where the client waits for none. In a lockstep schedule ``on_<kind>_cohort(inbox)`` gets the
    messages of all clients, by client, and returns a reply for each.

    In a round the engine calls, in this order: ``open_round``; for each client ``down``, the handlers and ``absorb``,
    or ``forget`` where it dropped out; ``close_round``.
    """

    gathers: ClassVar[bool] = False
    """It takes the batches of a whole cohort as one, so that a client's may be of a single sample."""

    def __init__(self, ctx: ServerContext) -> None:
        self.ctx = ctx
        self._averages: dict[str, Average] = {}

    def open_round(self, cohort: Sequence[int]) -> None:
        """Prepare for a round: forget what was averaged before.

        Args:
            cohort: its clients, in the order in which they are served.
        """
        self._averages = {}

    def down(self, client: int) -> Fields:
        """The message that opens a client's round."""
        return self.ctx.dump(*self.ctx.shared)

    def serve(self, kind: str, inbox: Mapping[int, Payload]) -> dict[int, Fields | None]:
        """Answer the messages of one kind, of one client or of several, by client.

        Raises:
            ValueError: there is no handler for this kind.
        """
        together = getattr(self, f"on_{kind}_cohort", None)
        if together is not None:
            return dict(together(inbox))
        handler = getattr(self, f"on_{kind}", None)
        if handler is None:
            raise ValueError(f"{type(self).__qualname__} has no handler for messages of kind {kind!r}")
        return {client: handler(client, message) for client, message in inbox.items()}

    def absorb(self, client: int, upload: Upload) -> None:
        """Add the upload that ends a client's round to the averages, with the client's weight."""
        self.average(unflatten(upload.fields), self.ctx.weight(client, upload.samples))

    def average(self, states: Mapping[str, Mapping[str, Tensor]], weight: float) -> None:
        """Add states, by part, to the averages that the round's end loads.

        Args:
            weight: of these states, unnormalised.
        """
        for name, state in states.items():
            self._averages.setdefault(name, Average()).add(state, weight)

    def forget(self, client: int) -> None:
        """Release what is held for a client that dropped out."""

    def close_round(self) -> None:
        """Load the averages into the parts, once the last client has ended; of no survivors there is none."""
        for name, average in self._averages.items():
            if name in self.ctx.parts and len(average):
                self.ctx.load(name, average.result())
        self._averages = {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round depends on, beyond the rows in the store."""
        return self.ctx.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.ctx.load_state_dict(state)


class SplitServer(Server):
    """A server that holds the model's upper part and trains it on the smashed data of every client."""

    def on_smashed(self, client: int, message: Payload) -> Fields | None:
        """One optimizer step on (z, y); replies with the gradient of z, mean over the batch."""
        return self.train(self.ctx.part("server"), self.ctx.optimizer("server"), message)

    def train(self, model: nn.Module, optimizer: PartOptimizer, message: Payload) -> Fields:
        """One step of a server model on (z, y); gives the gradient of z."""
        z = require_gradients(crossed(message, "z"))
        loss = self.ctx.loss(model(z), tensor(message, "y"))
        optimizer.update(loss)
        self.ctx.log("loss", loss)
        return {"grad": gradients(z)}


class Algorithm:
    """An algorithm: both parties' programs, and the facts that the engine needs to run them.

    What only a few methods have is in `algorithms/mixins.py`.
    """

    name: ClassVar[str] = ""
    """What the registry calls it: ``algorithm=<name>``."""

    revision: ClassVar[int] = 0
    """Goes up by one when the same configuration comes to mean another run: one begun before is not continued then."""

    Config: ClassVar[type[Any]] = NoConfig
    """A frozen dataclass, the schema of the method's own keys ``algorithm.<key>``."""

    layout: ClassVar[Layout]
    """The parts that each party holds."""

    Server: ClassVar[type[Server]] = Server
    """The server's program."""

    shared: ClassVar[tuple[str, ...]] = ()
    """The parts that travel down and up each round."""

    unread: ClassVar[tuple[str, ...]] = ()
    """Keys outside of its own section that the method does not read, so that they make no other run.

    Of this method alone: one that is based on it may read more.
    """

    personal: ClassVar[tuple[str, ...]] = ()
    """Parts of the model that each client has for itself, kept in its state under the part's name.

    Where there are any, a round's test is of each client's own model.
    """

    partly: ClassVar[tuple[str, ...]] = ()
    """Those of the personal parts of which a client keeps only some tensors; the others are the server's."""

    keeps_optimizer: ClassVar[tuple[str, ...]] = ()
    """Parts whose optimizer's state outlives the round, at each client and at each client's copy at the server.

    ``optimizer.keep`` says otherwise for any part. A server's own optimizer, of a part that it trains for all clients,
    lives for the whole run anyway.
    """

    traffic: ClassVar[tuple[Flow, ...]] = ()
    """The arrows of the method, from which its bytes follow in closed form."""

    schedule: ClassVar[Literal["sequential", "lockstep"]] = "sequential"
    """``sequential`` runs one client after another through the round, ``lockstep`` all of them by one message each."""

    in_turn: ClassVar[bool] = False
    """A client starts from what the one before it in the round has left, so that none can begin ahead of its turn."""

    uneven: ClassVar[bool] = False
    """Clients whose batches differ in number and size can be computed as one.

    For that a client's program takes one step for each batch and does not count them, and its losses leave out samples
    that are labelled -100, as ``ctx.loss`` does. A method that is based on one says it for itself.
    """

    tasks: ClassVar[tuple[str, ...] | None] = None
    """The tasks that the method is defined for; None: any, as it asks ``ctx.loss`` alone."""

    pooled: ClassVar[bool] = False
    """One client holds all the data."""

    evaluates_features: ClassVar[bool] = False
    """The model gives features [b, d] in the place of logits, and is tested by a kNN on them."""

    paths: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Further ways through the parts, by name, each tested with every client's own parts.

    The metrics are ``<name>_acc`` and, on the client's share of the test set, ``<name>_local_acc``.
    """

    def __init_subclass__(cls) -> None:
        cls.unread = cls.__dict__.get("unread", ())
        cls.uneven = cls.__dict__.get("uneven", False)

    @classmethod
    def arrows(cls, config: Any, round: int, *, before: int | None) -> tuple[Flow, ...]:
        """The arrows along which something crosses in a client's round (from 0).

        Args:
            before: the client's round before this one; None if this is its first.
        """
        return tuple(flow for flow in cls.traffic if flow.crosses(config, round, before=before))

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram | Fields:
        """The client's part of a round: a generator that yields messages and returns its upload.

        A client that sends nothing before its upload may be a plain function.

        Args:
            down: what the server's ``down`` gave for this client.
        """
        raise NotImplementedError
