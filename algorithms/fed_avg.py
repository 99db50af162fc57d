"""FedAvg and FedProx: clients train the whole model, the server averages it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm, Flow
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext


def copies(model: nn.Module) -> list[Tensor]:
    """The model's parameters as they are now."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def train(ctx: ClientContext) -> None:
    """Local epochs on the model."""
    model, optimizer = ctx.part("model"), ctx.optimizer("model")
    for x, y in ctx.batches():
        loss = ctx.loss(model(x), y)
        optimizer.update(loss)
        ctx.log("loss", loss)


def train_near(
    ctx: ClientContext, anchor: Sequence[Tensor], pull: float, *, label: str = "", log: str = "loss"
) -> None:
    """Local epochs on the model with pull/2 ||w - anchor||^2 added to the loss; reported is the loss without it.

    Args:
        label: of the optimizer, see ``ClientContext.optimizer``.
    """
    model, optimizer = ctx.part("model"), ctx.optimizer("model", label=label)
    for x, y in ctx.batches():
        loss = ctx.loss(model(x), y)
        distance = sum((w - a).square().sum() for w, a in zip(model.parameters(), anchor, strict=True))
        optimizer.update(loss + pull / 2 * distance)
        ctx.log(log, loss)


@register("fed_avg")
class FedAvg(Algorithm):
    """Federated averaging (McMahan et al., AISTATS 2017, algorithm 1)."""

    layout = Layout(client=("model",), server=("model",))
    uneven = True
    shared = ("model",)
    traffic = (Flow("down", "model", ("model",)), Flow("up", "model", ("model",)))

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Local training from the global model; the upload is the trained model."""
        ctx.load(down)
        train(ctx)
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

    uneven = True

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """FedAvg's local training with the proximal term."""
        ctx.load(down)
        train_near(ctx, copies(ctx.part("model")), ctx.config.mu)
        return ctx.dump("model")
