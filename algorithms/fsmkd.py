"""FSMKD: a shared body at the server and a small body at each client, which teach each other between two cuts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm, Flow
from cutlayer.algorithms.mixins import KeepsByConfig
from cutlayer.algorithms.u_shape import BodyServer
from cutlayer.models.cutting import Crossing
from cutlayer.runtime.ground.config import ConfigError, scoped
from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Payload, ask
from cutlayer.runtime.messages.crossing import crossed, detached, floating, gradients, require_gradients
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext
from cutlayer.tasks import Loss

_DISTILLING = scoped(read_if=lambda own, _: own.distillation_weight > 0)


@dataclass(frozen=True)
class FSMKDConfig:
    """Keys of FSMKD.

    Attributes:
        temperature: what both paths' logits are divided by in the divergences (tau), > 0.
        distillation_weight: weight of each divergence (w), >= 0; 0 leaves two independent cross-entropies.
        shared_gradient: whose loss the client part and the tail follow: the ``global`` path's, or the sum of ``both``.
        aggregate_interval: rounds from one averaging of client parts and tails to the next (A), >= 1.
        teacher_gradient: whether each divergence also trains the path that teaches.
        local_path: whose client part and tail the local path goes through: those of this ``step``, which the global
            path has too, or those that they were when the local ``epoch`` began.
    """

    temperature: float = 2.0
    distillation_weight: float = 1.0
    shared_gradient: Literal["global", "both"] = "global"
    aggregate_interval: int = 1
    teacher_gradient: bool = field(default=False, metadata=_DISTILLING)
    local_path: Literal["step", "epoch"] = "step"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ConfigError("temperature", self.temperature, "a finite number > 0")
        if not 0 <= self.distillation_weight < float("inf"):
            raise ConfigError("distillation_weight", self.distillation_weight, "a finite number >= 0")
        if self.aggregate_interval < 1:
            raise ConfigError("aggregate_interval", self.aggregate_interval, "an integer >= 1")
        if self.local_path == "epoch" and self.shared_gradient == "both":
            expected = "global, as with local_path=epoch the local path has copies that do not learn"
            raise ConfigError("shared_gradient", self.shared_gradient, expected)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of logits [b, C] at a temperature, mean over samples."""
    p, q = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return F.kl_div(p, q, reduction="batchmean", log_target=True)


def mutual_losses(
    local: Tensor, shared: Tensor, y: Tensor, config: FSMKDConfig, cross_entropy: Loss = F.cross_entropy
) -> tuple[Tensor, Tensor]:
    """The losses of the local path and of the global one: each its cross-entropy, and w times KL(other || own).

    Args:
        local, shared: logits [b, C] through the personal body and through the server's. y: int64 [b].
    """
    weight, temperature = config.distillation_weight, config.temperature
    teachers = (shared, local) if config.teacher_gradient else (shared.detach(), local.detach())
    of_local, of_shared = (divergence(s, t, temperature) for s, t in zip((local, shared), teachers, strict=True))
    return cross_entropy(local, y) + weight * of_local, cross_entropy(shared, y) + weight * of_shared


class LocalPath:
    """A client's way through its own body, with client part and tail as fresh as ``local_path`` says."""

    def __init__(self, ctx: ClientContext) -> None:
        self._first, self._body, self._tail = (ctx.part(name) for name in ("client", "personal", "tail"))
        self._copies = self._first, self._tail
        self._both = ctx.config.shared_gradient == "both"
        self._epoch = max(1, len(ctx.steps) // ctx.data.epochs) if ctx.config.local_path == "epoch" else 0

    def forward(self, step: int, x: Tensor, z: Crossing) -> tuple[Crossing, Tensor]:
        """What enters the body, and the logits [b, C], in a step of the round, from 0.

        Args:
            x: images [b, c, h, w]. z: what the client part of this step makes of them.
        """
        first, tail = self._first, self._tail
        if self._epoch:
            if step % self._epoch == 0:
                self._copies = copy.deepcopy((first, tail))
            first, tail = self._copies
            with torch.no_grad():
                z = first(x)
        own = detached(z)
        return own, tail(self._body(require_gradients(own) if self._both else own))

    def backward(self, own: Crossing, logits: Tensor, along: Tensor) -> None:
        """Add the gradients of what the local path trains: the body, and with ``both`` what is before and after it."""
        others = (*floating(own), *self._tail.parameters()) if self._both else ()
        torch.autograd.backward(logits, along, inputs=[*self._body.parameters(), *others])


class SharedBodyServer(BodyServer):
    """Averages client parts and tails, and sends them to those who have not had them yet."""

    def down(self, client: int) -> Fields:
        """The averaged parts, unless the client has had them since the last averaging and continues with its own."""
        interval = self.ctx.config.aggregate_interval
        if interval > 1:
            own, period = self.ctx.state(client), -(-self.ctx.round // interval)  # averagings before this round
            had = own.get("period")
            if had is not None and int(had["period"]) == period:
                return {}
            own.put("period", {"period": torch.tensor(period)})
        return super().down(client)


@register("fsmkd")
class FSMKD(KeepsByConfig, Algorithm):
    """FSMKD (Luo & Zhang): mutual distillation of a shared body and personal ones over a U-shaped cut.

    Client part and tail are at the client, so labels never leave it. The local path goes through the client's personal
    body, which may differ in architecture from other clients', the global path through the server's. In the first of
    every ``aggregate_interval`` rounds the cohort's client parts and tails are averaged; until the next each client
    keeps its own. The server's body is trained on the batches of all clients in turn.
    """

    Config = FSMKDConfig
    tasks = ("classification",)  # its distillation is of classes' probabilities
    revision = 1  # before, client parts and tails were averaged in the last of every ``aggregate_interval`` rounds
    layout = Layout(client=("client", "personal", "tail"), server=("client", "server", "tail"))
    shared = ("client", "tail")
    paths: ClassVar = {"personal": ("client", "personal", "tail")}
    traffic = (
        Flow("down", "model", ("client", "tail"), rounds="aggregate_interval", when="join"),
        Flow("up", "smashed", ("smashed",), per="batch"),
        Flow("down", "smashed", ("body_output",), per="batch"),
        Flow("up", "gradient", ("body_output",), per="batch"),
        Flow("down", "gradient", ("smashed",), per="batch"),
        Flow("up", "model", ("client", "tail"), rounds="aggregate_interval"),
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
        first, tail, path = ctx.part("client"), ctx.part("tail"), LocalPath(ctx)
        optimizer = ctx.optimizer("client", "personal", "tail")
        for step, (x, y) in enumerate(ctx.batches()):
            z = first(x)
            output = require_gradients(crossed((yield ask("smashed", z=z)), "output"))
            own, local = path.forward(step, x, z)
            shared = tail(output)
            local_loss, loss = mutual_losses(local, shared, y, config, ctx.loss)
            along, of_local = torch.autograd.grad(loss + local_loss, (shared, local))
            optimizer.zero_grad()
            torch.autograd.backward(shared, along, inputs=[*floating(output), *tail.parameters()])
            path.backward(own, local, of_local)
            gradient = crossed((yield ask("gradient", grad=gradients(output))), "grad")
            for each, grown in zip(floating(own), floating(gradient), strict=True):
                if each.grad is not None:
                    grown += each.grad
            optimizer.update(z, gradient, reset=False)
            ctx.log("loss", loss)
            ctx.log("local_loss", local_loss)
        ctx.keep("personal")
        if ctx.round % config.aggregate_interval:
            for name in FSMKD.shared:
                ctx.keep(name)
            return {}
        for name in FSMKD.shared:
            ctx.state.drop(name)
        return ctx.dump(*FSMKD.shared)
