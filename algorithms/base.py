"""The contract of an algorithm: a client program, a server, and the messages that pass between them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Payload, Reply, Upload, unflatten
from cutlayer.runtime.messages.crossing import crossed, gradients, require_gradients, tensor
from cutlayer.runtime.parties.aggregate import Average
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext, ServerContext
from cutlayer.runtime.parties.optim import OptimizerConfig, PartOptimizer

if TYPE_CHECKING:
    from cutlayer.runtime.parties.cohort import Asked, Cohort

cross_entropy = F.cross_entropy
"""Mean cross-entropy over a batch: logits [b, classes], labels int64 [b]."""


@dataclass(frozen=True)
class NoConfig:
    """The configuration of an algorithm without keys of its own."""


@dataclass(frozen=True)
class Flow:
    """One arrow of a method's pseudocode: what crosses, in which direction, and how often.

    Each entry of ``fields`` is the name of a part (its whole state), ``smashed`` (the cut layer's output for one
    batch), ``body_output`` (that of the server part between two cuts) or ``labels`` (one int64 per sample). ``per``
    says whether it crosses once per client and round or with each batch; ``every`` and ``rounds`` name the keys of the
    algorithm's config that thin it out: every q-th local step, every l-th round. Of each l rounds that is the ``start``
    (with ``first``, also a client's own first round), the ``end``, or the client's first one among them (``join``).
    """

    direction: Literal["up", "down"]
    kind: str
    fields: tuple[str, ...]
    per: Literal["round", "batch"] = "round"
    every: str | None = None
    rounds: str | None = None
    first: bool = False
    when: Literal["start", "join", "end"] = "start"

    def interval(self, config: Any) -> int:
        """Local steps from one crossing to the next."""
        return int(getattr(config, self.every)) if self.every else 1

    def crosses(self, config: Any, round: int, *, before: int | None) -> bool:
        """Whether anything crosses in this round (from 0), given the client's round before it (None: it is new)."""
        if not self.rounds:
            return True
        length = int(getattr(config, self.rounds))
        if self.when == "end":
            return (round + 1) % length == 0
        if self.when == "join":
            return before is None or before // length != round // length
        return round % length == 0 or (self.first and before is None)


class Server:
    """The server of an algorithm: answers messages, averages what travels.

    Message handlers are methods named ``on_<kind>(client, message)`` that return the reply's fields, or None for a
    one-way message. In a lockstep schedule ``on_<kind>_cohort(inbox)`` sees all clients' messages together and
    returns a reply per client.
    """

    def __init__(self, ctx: ServerContext) -> None:
        self.ctx = ctx
        self._averages: dict[str, Average] = {}

    def open_round(self, cohort: Sequence[int]) -> None:
        """Called before the first client of a round starts."""
        self._averages = {}

    def down(self, client: int) -> Fields:
        """The message that opens a client's round."""
        return self.ctx.dump(*self.ctx.shared)

    def serve(self, kind: str, inbox: Mapping[int, Payload]) -> dict[int, Fields | None]:
        """Answer the messages of one kind of one or several clients."""
        together = getattr(self, f"on_{kind}_cohort", None)
        if together is not None:
            return dict(together(inbox))
        handler = getattr(self, f"on_{kind}", None)
        if handler is None:
            raise ValueError(f"{type(self).__qualname__} has no handler for messages of kind {kind!r}")
        return {client: handler(client, message) for client, message in inbox.items()}

    def absorb(self, client: int, upload: Upload) -> None:
        """Take in the upload that ends a client's round."""
        self.average(unflatten(upload.fields), self.ctx.weight(client, upload.samples))

    def average(self, states: Mapping[str, Mapping[str, Tensor]], weight: float) -> None:
        """Take states (by part) into the averages that the round's end loads."""
        for name, state in states.items():
            self._averages.setdefault(name, Average()).add(state, weight)

    def forget(self, client: int) -> None:
        """A client dropped out: release what was held for it."""

    def close_round(self) -> None:
        """Called when the last client of a round has ended; with no survivors the parts stay as they were."""
        for name, average in self._averages.items():
            if name in self.ctx.parts and len(average):
                self.ctx.load(name, average.result())
        self._averages = {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round depends on, beyond the rows in the store."""
        return self.ctx.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint."""
        self.ctx.load_state_dict(state)


class SplitServer(Server):
    """A server that holds the model's upper part and trains it on the smashed data of every client."""

    def on_smashed(self, client: int, message: Payload) -> Fields | None:
        """One optimizer step on (z, y); replies with the gradient of z, mean over the batch."""
        return self.train(self.ctx.part("server"), self.ctx.optimizer("server"), message)

    def train(self, model: nn.Module, optimizer: PartOptimizer, message: Payload) -> Fields:
        """One step of a server model on (z, y); gives the gradient of z."""
        z = require_gradients(crossed(message, "z"))
        loss = cross_entropy(model(z), tensor(message, "y"))
        optimizer.update(loss)
        self.ctx.log("loss", loss)
        return {"grad": gradients(z)}


class Algorithm:
    """An algorithm: both parties' programs and the facts that the engine needs to run them.

    Attributes:
        layout: the parts that each party holds.
        shared: the parts that travel down and up each round.
        schedule: ``sequential`` runs one client after another through the round, ``lockstep`` moves the whole cohort
            on by one message at a time.
        personal: parts of the model that each client has for itself, kept in its state under the part's name.
        paths: further ways through the parts, each tested with every client's own parts: the metrics of ``name`` are
            ``name_acc`` and, on the client's share of the test set, ``name_local_acc``.
        evaluates_features: the model gives features [b, d] instead of logits, and is tested by a kNN on them.
        evaluates: ``global`` tests the server's model, ``clients`` each client's own; follows from ``personal``.
        gathers: the server takes the batches of a whole cohort as one, so that a client's may be of one sample.
        pooled: one client holds all the data.
        in_turn: a round's clients can only work one after the other, as each starts from what the one before left.
        traffic: the arrows of the method, from which its bytes follow in closed form.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type[Any]] = NoConfig
    layout: ClassVar[Layout]
    shared: ClassVar[tuple[str, ...]] = ()
    schedule: ClassVar[Literal["sequential", "lockstep"]] = "sequential"
    personal: ClassVar[tuple[str, ...]] = ()
    paths: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    evaluates_features: ClassVar[bool] = False
    evaluates: ClassVar[Literal["global", "clients"]] = "global"
    gathers: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    in_turn: ClassVar[bool] = False
    traffic: ClassVar[tuple[Flow, ...]] = ()
    Server: ClassVar[type[Server]] = Server

    def __init_subclass__(cls) -> None:
        cls.evaluates = "clients" if cls.personal else "global"

    @classmethod
    def check_optimizer(cls, optimizer: OptimizerConfig) -> None:
        """Raises ConfigError if the method's equations do not hold for a client's optimizer."""

    @classmethod
    def arrows(cls, config: Any, round: int, *, before: int | None) -> tuple[Flow, ...]:
        """The arrows along which something crosses in a client's round (from 0).

        Args:
            before: the client's round before this one; None if this is its first.
        """
        return tuple(flow for flow in cls.traffic if flow.crosses(config, round, before=before))

    @classmethod
    def kept(cls, config: Any) -> tuple[str, ...]:  # noqa: ARG003  (for those that override it)
        """The parts of the model that clients have for themselves under this configuration, see ``personal``."""
        return cls.personal

    @classmethod
    def steps(cls, config: Any, client: int, num_clients: int, sizes: Sequence[int]) -> list[int]:  # noqa: ARG003
        """The batches of a client's round, as numbers of samples.

        Args:
            sizes: those of its local epochs.
        """
        return [*sizes]

    @classmethod
    def computes_together(cls, config: Any) -> bool:  # noqa: ARG003
        """Whether ``together`` may stand for the clients' programs: they hold the same weights and take one step."""
        return False

    @staticmethod
    def together(cohort: Cohort, down: Payload) -> Generator[Asked, dict[int, Reply], Fields]:
        """The round of a whole cohort of equal weights: yields what each client asks, returns what each uploads."""
        raise NotImplementedError

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram | Fields:
        """The client's part of a round: a generator that yields messages and returns its upload.

        A client that sends nothing before its upload may be a plain function.
        """
        raise NotImplementedError
