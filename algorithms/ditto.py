"""Ditto: FedAvg, and with it a model for each client that is pulled towards the global one."""

from __future__ import annotations

from dataclasses import dataclass

from cutlayer.algorithms import register
from cutlayer.algorithms.fed_avg import FedAvg, copies, train, train_near
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.parties.contexts import ClientContext


@register("ditto")
class Ditto(FedAvg):
    """Ditto (Li et al., ICML 2021, algorithm 1): the personal model minimises F_i(v) + lambda/2 ||v - w||^2.

    The personal model starts as the global one of the client's first round and takes ``local_epochs`` passes in each of
    its rounds, w being the global model at the round's beginning. Both models see the same batches. Reported is the
    accuracy of the personal models.
    """

    @dataclass(frozen=True)
    class Config:
        """pull: strength of the pull of personal models towards the global one (lambda), >= 0."""

        pull: float = 0.75

        def __post_init__(self) -> None:
            if not 0 <= self.pull < float("inf"):
                raise ConfigError("pull", self.pull, "a finite number >= 0")

    revision = 1  # before, the personal model saw its batches in another order
    uneven = True
    personal = ("model",)

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """The personal model, which stays, then FedAvg's local training of the global one, which is the upload."""
        ctx.load(down)
        anchor = copies(ctx.part("model"))
        ctx.restore("model")
        train_near(ctx, anchor, ctx.config.pull, label="personal", log="personal_loss")
        ctx.keep("model")
        ctx.load(down)
        train(ctx)
        return ctx.dump("model")
