"""MHMD: FedBABU whose body also learns from classifiers on its inner blocks, which teach each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutlayer.algorithms import register
from cutlayer.algorithms.mixins import OwnLoss
from cutlayer.algorithms.personal import FedBABU
from cutlayer.models import AuxiliaryHeads
from cutlayer.runtime.ground.config import ConfigError, scoped
from cutlayer.runtime.ground.devices import queued
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext
from cutlayer.tasks import Loss

_DISTILLING = scoped(read_if=lambda own, _: own.distill != "none")


@dataclass(frozen=True)
class MHMDConfig:
    """The terms of the loss; every default is the published one.

    Attributes:
        auxiliary_weight: weight of the cross-entropy of each auxiliary head.
        distillation_weight: weight of each distillation term.
        temperature: what auxiliary heads' logits are divided by: ``per_sample``, the sigmoid of the head's own last
            output, or one number for all samples.
        distill: which way: the final head teaches the auxiliary ones, they teach it, both or none.
        gate: distil only the samples that the teacher classifies correctly.
        reduction: of the divergence over the gated samples: ``mean`` over samples and classes (what torch calls mean),
            ``batchmean`` over samples, or ``sum``.
        teacher_gradient: whether the divergence also trains the teacher.
    """

    auxiliary_weight: float = 10.0
    distillation_weight: float = field(default=1.0, metadata=_DISTILLING)
    temperature: Literal["per_sample"] | float = "per_sample"
    distill: Literal["both", "to_auxiliary", "to_final", "none"] = "both"
    gate: bool = field(default=True, metadata=_DISTILLING)
    reduction: Literal["mean", "batchmean", "sum"] = field(default="mean", metadata=_DISTILLING)
    teacher_gradient: bool = field(default=True, metadata=_DISTILLING)

    def __post_init__(self) -> None:
        for key in ("auxiliary_weight", "distillation_weight"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ConfigError(key, getattr(self, key), "a finite number >= 0")
        if self.temperature != "per_sample" and not 0 < self.temperature < float("inf"):
            raise ConfigError("temperature", self.temperature, "per_sample or a finite number > 0")


def tempered(outputs: Tensor, temperature: Literal["per_sample"] | float) -> Tensor:
    """An auxiliary head's logits [b, C] at its temperature, from its outputs [b, C + 1]."""
    logits = outputs[:, :-1]
    return logits / (outputs[:, -1:].sigmoid() if temperature == "per_sample" else temperature)


def gated_divergence(student: Tensor, teacher: Tensor, y: Tensor, config: MHMDConfig) -> Tensor:
    """KL(teacher || student) of logits [b, C], on the samples that the teacher gets right; 0 where there is none."""
    right = teacher.argmax(1) == y if config.gate else None
    teacher = teacher if config.teacher_gradient else teacher.detach()
    if right is not None and queued(student.device):
        return _weighed_divergence(student, teacher, right, config.reduction)
    if right is not None:
        student, teacher = student[right], teacher[right]
    if not len(student):
        return student.sum()  # zero, and still part of the graph
    p, q = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    over = {"mean": student.numel(), "batchmean": len(student), "sum": 1}[config.reduction]
    return F.kl_div(p, q, reduction="sum", log_target=True) / over


def _weighed_divergence(student: Tensor, teacher: Tensor, right: Tensor, reduction: str) -> Tensor:
    """The same to rounding, of all samples, for a device that would have to be waited for to leave some out."""
    p, q = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    each = F.kl_div(p, q, reduction="none", log_target=True)
    total = torch.where(right[:, None], each, 0.0).sum()
    over = {"mean": student.shape[1], "batchmean": 1}.get(reduction)
    return total if over is None else total / (over * right.sum().clamp(min=1))


def mhmd_loss(
    final: Tensor, auxiliary: Sequence[Tensor], y: Tensor, config: MHMDConfig, cross_entropy: Loss = F.cross_entropy
) -> dict[str, Tensor]:
    """The terms of the loss: cross-entropy ``loss`` of the final head, ``auxiliary_loss``, ``distillation``, and their
    weighted sum ``total``.

    Args:
        final: logits [b, C]. auxiliary: each head's outputs [b, C + 1]. y: int64 [b].
    """
    loss = cross_entropy(final, y)
    heads = [tempered(outputs, config.temperature) for outputs in auxiliary]
    auxiliary_loss = torch.stack([cross_entropy(logits, y) for logits in heads]).sum()
    distillation = torch.zeros_like(loss)
    for logits in heads:
        if config.distill in ("both", "to_auxiliary"):
            distillation = distillation + gated_divergence(logits, final, y, config)
        if config.distill in ("both", "to_final"):
            distillation = distillation + gated_divergence(final, logits, y, config)
    total = loss + config.auxiliary_weight * auxiliary_loss + config.distillation_weight * distillation
    return {"loss": loss, "auxiliary_loss": auxiliary_loss, "distillation": distillation, "total": total}


def terms_of(
    body: nn.Module, head: nn.Module, heads: AuxiliaryHeads, x: Tensor, y: Tensor, config: MHMDConfig, loss: Loss
) -> dict[str, Tensor]:
    """The terms of the loss of a batch, as ``mhmd_loss`` gives them: x [b, C, H, W], y int64 [b]."""
    z, auxiliary = heads.attached(body, x)
    return mhmd_loss(head(z), auxiliary, y, config, loss)


@register("mhmd")
class MHMD(OwnLoss, FedBABU):
    """Multi-Head Mutual Distillation on FedBABU.

    ``model.auxiliary_heads.blocks`` names the inner blocks whose outputs the auxiliary heads classify. Like the final
    head they keep the initial weights that all clients share, and never travel; without them, the model is tested.
    """

    Config = MHMDConfig
    unread = FedBABU.unread
    layout = Layout(client=("body", "head", "auxiliary_heads"), server=("body", "head"))
    beside = ("auxiliary_heads",)
    tasks = ("classification",)  # its distillation is of classes' probabilities

    @staticmethod
    def loss_of(
        body: nn.Module, head: nn.Module, beside: Sequence[nn.Module], x: Tensor, y: Tensor, config: Any, loss: Loss
    ) -> Tensor:
        """The weighted sum of all terms."""
        return terms_of(body, head, cast(AuxiliaryHeads, beside[0]), x, y, config, loss)["total"]

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Local training of the body under all heads."""
        ctx.load(down)
        body, head = ctx.part("body"), ctx.part("head").requires_grad_(False)
        heads = cast(AuxiliaryHeads, ctx.part("auxiliary_heads").requires_grad_(False))
        optimizer = ctx.optimizer("body")
        for x, y in ctx.batches():
            terms = terms_of(body, head, heads, x, y, ctx.config, ctx.loss)
            optimizer.update(terms.pop("total"))
            for name, value in terms.items():
                ctx.log(name, value)
        return ctx.dump("body")
