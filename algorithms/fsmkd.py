"""FSMKD: a shared body at the server and a small body at each client, which teach each other between two cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm, Flow, Server, cross_entropy
from cutlayer.algorithms.mixins import KeepsByConfig
from cutlayer.models.cutting import Crossing
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Payload, ask
from cutlayer.runtime.messages.crossing import crossed, detached, floating, gradients, require_gradients
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext, ServerContext


@dataclass(frozen=True)
class FSMKDConfig:
    """Keys of FSMKD.

    Attributes:
        temperature: what both paths' logits are divided by in the divergences (tau), > 0.
        distillation_weight: weight of each divergence (w), >= 0; 0 leaves two independent cross-entropies.
        shared_gradient: whose loss the client part and the tail follow: the ``global`` path's, or the sum of ``both``.
        aggregate_interval: rounds from one averaging of client parts and tails to the next (A), >= 1.
    """

    temperature: float = 2.0
    distillation_weight: float = 1.0
    shared_gradient: Literal["global", "both"] = "global"
    aggregate_interval: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ConfigError("temperature", self.temperature, "a finite number > 0")
        if not 0 <= self.distillation_weight < float("inf"):
            raise ConfigError("distillation_weight", self.distillation_weight, "a finite number >= 0")
        if self.aggregate_interval < 1:
            raise ConfigError("aggregate_interval", self.aggregate_interval, "an integer >= 1")


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of logits [b, C] at a temperature, mean over samples; the teacher is constant."""
    p, q = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher.detach()))
    return F.kl_div(p, q, reduction="batchmean", log_target=True)


def mutual_losses(local: Tensor, shared: Tensor, y: Tensor, config: FSMKDConfig) -> tuple[Tensor, Tensor]:
    """The losses of the local path and of the global one: each its cross-entropy, and w times KL(other || own).

    Args:
        local, shared: logits [b, C] through the personal body and through the server's. y: int64 [b].
    """
    weight, temperature = config.distillation_weight, config.temperature
    return (
        cross_entropy(local, y) + weight * divergence(local, shared, temperature),
        cross_entropy(shared, y) + weight * divergence(shared, local, temperature),
    )


class SharedBodyServer(Server):
    """Holds the large body that all clients' batches go through, and averages client parts and tails.

    It sees no labels: what it learns from is the gradient of its output.
    """

    def __init__(self, ctx: ServerContext) -> None:
        super().__init__(ctx)
        self._passes: dict[int, tuple[Crossing, Crossing]] = {}

    def open_round(self, cohort: Sequence[int]) -> None:
        super().open_round(cohort)
        self._passes.clear()

    def down(self, client: int) -> Fields:
        """The averaged parts, unless the client has had them since the last averaging and continues with its own."""
        interval = self.ctx.config.aggregate_interval
        if interval > 1:
            own, period = self.ctx.state(client), self.ctx.round // interval
            had = own.get("period")
            if had is not None and int(had["period"]) == period:
                return {}
            own.put("period", {"period": torch.tensor(period)})
        return super().down(client)

    def on_smashed(self, client: int, message: Payload) -> Fields:
        """The body's output for z; its graph waits for the gradient."""
        z = require_gradients(crossed(message, "z"))
        output: Crossing = self.ctx.part("server")(z)
        self._passes[client] = z, output
        return {"output": output}

    def on_gradient(self, client: int, message: Payload) -> Fields:
        """One optimizer step along the gradient of the body's output; replies with the gradient of z."""
        z, output = self._passes.pop(client)
        self.ctx.optimizer("server").update(output, crossed(message, "grad"))
        return {"grad": gradients(z)}

    def forget(self, client: int) -> None:
        self._passes.pop(client, None)


@register("fsmkd")
class FSMKD(KeepsByConfig, Algorithm):
    """FSMKD (Luo & Zhang): mutual distillation of a shared body and personal ones over a U-shaped cut.

    Client part and tail are at the client, so labels never leave it. The local path goes through the client's personal
    body, which may differ in architecture from other clients', the global path through the server's. In the last of
    every ``aggregate_interval`` rounds the cohort's client parts and tails are averaged; until then each client
    keeps its own. The server's body is trained on the batches of all clients in turn.
    """

    Config = FSMKDConfig
    layout = Layout(client=("client", "personal", "tail"), server=("client", "server", "tail"))
    shared = ("client", "tail")
    paths: ClassVar = {"personal": ("client", "personal", "tail")}
    traffic = (
        Flow("down", "model", ("client", "tail"), rounds="aggregate_interval", when="join"),
        Flow("up", "smashed", ("smashed",), per="batch"),
        Flow("down", "smashed", ("body_output",), per="batch"),
        Flow("up", "gradient", ("body_output",), per="batch"),
        Flow("down", "gradient", ("smashed",), per="batch"),
        Flow("up", "model", ("client", "tail"), rounds="aggregate_interval", when="end"),
    )
    Server = SharedBodyServer

    @classmethod
    def kept(cls, config: Any) -> tuple[str, ...]:
        """Between two averagings each client has its own client part and tail."""
        return cls.shared if config.aggregate_interval > 1 else ()

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram:
        """Each batch: z up, the shared body's output down, its gradient up, that of z down, one step of all parts."""
        config: FSMKDConfig = ctx.config
        ctx.load(down)
        for name in () if down else FSMKD.shared:
            ctx.restore(name)
        ctx.restore("personal")
        first, body, tail = (ctx.part(name) for name in ("client", "personal", "tail"))
        optimizer = ctx.optimizer("client", "personal", "tail")
        both = config.shared_gradient == "both"
        for x, y in ctx.batches():
            z = first(x)
            output = require_gradients(crossed((yield ask("smashed", z=z)), "output"))
            # What the local loss does not train sees no gradient of it.
            own = detached(z)
            local, shared = tail(body(require_gradients(own) if both else own)), tail(output)
            local_loss, loss = mutual_losses(local, shared, y, config)
            optimizer.zero_grad()
            torch.autograd.backward(loss, inputs=[*floating(output), *tail.parameters()])
            inputs = [*body.parameters(), *((*floating(own), *tail.parameters()) if both else ())]
            torch.autograd.backward(local_loss, inputs=inputs)
            gradient = crossed((yield ask("gradient", grad=gradients(output))), "grad")
            for each, along in zip(floating(own), floating(gradient), strict=True):
                if each.grad is not None:
                    along += each.grad
            optimizer.update(z, gradient, reset=False)
            ctx.log("loss", loss)
            ctx.log("local_loss", local_loss)
        ctx.keep("personal")
        if (ctx.round + 1) % config.aggregate_interval:
            for name in FSMKD.shared:
                ctx.keep(name)
            return {}
        for name in FSMKD.shared:
            ctx.state.drop(name)
        return ctx.dump(*FSMKD.shared)
