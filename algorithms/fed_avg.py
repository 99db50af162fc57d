"""FedAvg and FedProx: clients train the whole model, the server averages it."""

from __future__ import annotations

from dataclasses import dataclass

from algorithms import register
from algorithms.base import Algorithm, Flow, cross_entropy
from runtime.blueprint import Layout
from runtime.boundary import Payload
from runtime.config import ConfigError
from runtime.contexts import ClientContext


@register("fed_avg")
class FedAvg(Algorithm):
    """Federated averaging (McMahan et al., AISTATS 2017, algorithm 1)."""

    layout = Layout(client=("model",), server=("model",))
    shared = ("model",)
    traffic = (Flow("down", "model", ("model",)), Flow("up", "model", ("model",)))

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Local training from the global model; the upload is the trained model."""
        ctx.load(down)
        model, optimizer = ctx.part("model"), ctx.optimizer("model")
        for x, y in ctx.batches():
            loss = cross_entropy(model(x), y)
            optimizer.update(loss)
            ctx.log("loss", loss)
        return ctx.dump("model")


@register("fed_prox")
class FedProx(FedAvg):
    """FedAvg with a proximal term mu/2 ||w - w_global||^2 in the local loss (Li et al., MLSys 2020, equation 2)."""

    @dataclass(frozen=True)
    class Config:
        """mu: strength of the pull towards the global model, >= 0."""

        mu: float = 0.01

        def __post_init__(self) -> None:
            if not self.mu >= 0:
                raise ConfigError("mu", self.mu, "a number >= 0")

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """FedAvg's local training with the proximal term."""
        ctx.load(down)
        model, optimizer = ctx.part("model"), ctx.optimizer("model")
        anchor = [parameter.detach().clone() for parameter in model.parameters()]
        for x, y in ctx.batches():
            loss = cross_entropy(model(x), y)
            distance = sum((w - a).square().sum() for w, a in zip(model.parameters(), anchor, strict=True))
            optimizer.update(loss + ctx.config.mu / 2 * distance)
            ctx.log("loss", loss)
        return ctx.dump("model")
