"""Methods that divide the model into a body and a head: FedBABU, FedPer, FedRep, LG-FedAvg."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm, Flow
from cutlayer.algorithms.mixins import CountsSteps
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext
from cutlayer.runtime.parties.optim import PartOptimizer

BODY_AND_HEAD = Layout(client=("body", "head"), server=("body", "head"))


def train_parts(ctx: ClientContext, *trained: str, stream: str = "batches", epochs: int | None = None) -> None:
    """Local epochs on the named parts, by the loss of the whole model; the others stay as they are."""
    body, head = ctx.part("body"), ctx.part("head")
    for name, part in (("body", body), ("head", head)):
        part.requires_grad_(name in trained)
    take_steps(ctx, ctx.optimizer(*trained), stream, epochs)


def take_steps(ctx: ClientContext, optimizer: PartOptimizer, stream: str, epochs: int | None) -> None:
    """Local epochs by the loss of the whole model, on what the optimizer holds."""
    body, head = ctx.part("body"), ctx.part("head")
    for x, y in ctx.batches(stream, epochs):
        loss = ctx.loss(head(body(x)), y)
        optimizer.update(loss)
        ctx.log("loss", loss)


@register("fed_babu")
class FedBABU(Algorithm):
    """FedBABU (Oh et al., ICLR 2022, algorithm 1): the body is trained and averaged.

    The head keeps the initial weights that all clients share, and never travels; it is fitted to a client only when the
    trained model is personalised.
    """

    layout = BODY_AND_HEAD
    uneven = True
    shared = ("body",)
    unread = ("model.head",)
    traffic = (Flow("down", "model", ("body",)), Flow("up", "model", ("body",)))

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Local training of the body under the fixed head."""
        ctx.load(down)
        train_parts(ctx, "body")
        return ctx.dump("body")


@register("fed_per")
class FedPer(FedBABU):
    """FedPer (Arivazhagan et al., 2019): body and head are trained together, and each client keeps its own head."""

    uneven = True
    personal = ("head",)

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Local training from the global body and the client's head; the upload is the body."""
        ctx.load(down)
        ctx.restore("head")
        train_parts(ctx, "body", "head")
        ctx.keep("head")
        return ctx.dump("body")


@register("fed_rep")
class FedRep(CountsSteps, FedPer):
    """FedRep (Collins et al., ICML 2021, algorithm 1): first the client's own head, then the shared body.

    The head takes the round's local epochs with the body fixed, then the body ``body_epochs`` with the head fixed.
    """

    @dataclass(frozen=True)
    class Config:
        """The two phases of a client's round.

        Attributes:
            body_epochs: passes over the client's data on the body, after the ``local_epochs`` on the head, >= 1.
            one_optimizer: the phases are steps of one optimizer, in which the part that is fixed has the rate 0 but
                its momentum goes on; otherwise each phase begins with an optimizer of its own.
        """

        body_epochs: int = 1
        one_optimizer: bool = False

        def __post_init__(self) -> None:
            if self.body_epochs < 1:
                raise ConfigError("body_epochs", self.body_epochs, "an integer >= 1")

    uneven = True

    @staticmethod
    def part_steps(config: Any, part: str, steps: int, epochs: int) -> int | None:
        """Each part's own phase; with ``one_optimizer`` the phases set its rates."""
        if config.one_optimizer:
            return None
        return steps // epochs * config.body_epochs if part == "body" else steps

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """The head, then the body; the upload is the body."""
        ctx.load(down)
        ctx.restore("head")
        phases = {"head": ("batches", None), "body": ("body batches", ctx.config.body_epochs)}
        if ctx.config.one_optimizer:
            optimizer = ctx.optimizer("body", "head")
            rates = dict(zip(("body", "head"), optimizer.rates, strict=True))
            for learning, (stream, epochs) in phases.items():
                optimizer.set({"lr": rate if name == learning else 0.0} for name, rate in rates.items())
                take_steps(ctx, optimizer, stream, epochs)
        else:
            for learning, (stream, epochs) in phases.items():
                train_parts(ctx, learning, stream=stream, epochs=epochs)
        ctx.keep("head")
        return ctx.dump("body")


@register("lg_fed_avg")
class LGFedAvg(Algorithm):
    """LG-FedAvg (Liang et al., 2020): each client keeps its own body, the head is averaged.

    The paper starts from a model trained with FedAvg: ``model.init=<folder of a FedAvg run>`` does so.
    """

    layout = BODY_AND_HEAD
    uneven = True
    shared = ("head",)
    personal = ("body",)
    traffic = (Flow("down", "model", ("head",)), Flow("up", "model", ("head",)))

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Local training from the client's body and the global head; the upload is the head."""
        ctx.load(down)
        ctx.restore("body")
        train_parts(ctx, "body", "head")
        ctx.keep("body")
        return ctx.dump("head")
