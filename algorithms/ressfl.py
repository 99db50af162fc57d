"""Pre-training of a client part whose smashed data gives little of the images away: ResSFL, by SSIM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm
from cutlayer.algorithms.mixins import ConfiguresParts
from cutlayer.models.similarity import ssim
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.messages.crossing import detached
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext
from cutlayer.runtime.parties.optim import OptimizerConfig


@dataclass(frozen=True)
class ResSFLConfig:
    """Keys of ResSFL.

    alpha: weight of the likeness, >= 0. target_ssim: likeness that is not punished, -1 to 1. attacker_lr: learning rate
    of the simulated attacker's Adam. attacker_width: its channels. ssim_border: SSIM over the windows within the image,
    or with zeros beyond its edges.
    """

    alpha: float = 2.0
    target_ssim: float = 0.6
    attacker_lr: float = 0.001
    attacker_width: int = 64
    ssim_border: Literal["within", "zeros"] = "within"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ConfigError("alpha", self.alpha, "a number >= 0")
        if not -1 <= self.target_ssim <= 1:
            raise ConfigError("target_ssim", self.target_ssim, "a number from -1 to 1")
        if not 0 < self.attacker_lr < math.inf:
            raise ConfigError("attacker_lr", self.attacker_lr, "a finite number > 0")
        if self.attacker_width < 1:
            raise ConfigError("attacker_width", self.attacker_width, "an integer >= 1")


@register("ressfl")
class ResSFL(ConfiguresParts, Algorithm):
    """ResSFL's attacker-aware pre-training (Li et al., CVPR 2022) with the target for SSIM of MocoSFL (ICLR 2023).

    One party trains client and server part on all the data, together with an attacker that it builds itself: a decoder
    from smashed data to images, which each step first trains to maximise SSIM. The loss of the two parts is the
    cross-entropy plus ``alpha * max(SSIM(decoder(z), x) - target_ssim, 0)`` over the mean SSIM of the batch, in which
    the decoder is fixed. The images are those of the batch, augmented, before normalisation.
    """

    Config = ResSFLConfig
    layout = Layout(client=("client", "server", "attacker"), server=())
    personal = ("client", "server")
    keeps_optimizer = ("client", "server", "attacker")
    pooled = True
    tasks = ("classification", "multi_label")  # of images, which its attacker makes again
    unread = (
        "aggregate.weights",
        "comm_threshold_mb",
        "dataset.min_samples",
        "dataset.client_samples",
        "dataset.drop_unassigned",
    )

    @classmethod
    def part_options(cls, config: ResSFLConfig) -> Mapping[str, Mapping[str, Any]]:
        """The attacker's width."""
        return {"attacker": {"width": config.attacker_width}}

    @classmethod
    def part_optimizers(cls, config: ResSFLConfig) -> Mapping[str, OptimizerConfig]:
        """An Adam of the attacker's own."""
        return {"attacker": OptimizerConfig("adam", {"lr": config.attacker_lr})}

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Training continues from where the round before left all three and their optimizers; nothing is sent."""
        config: ResSFLConfig = ctx.config
        client, server, attacker = (ctx.part(name) for name in ("client", "server", "attacker"))
        optimizer, padded = ctx.optimizer("client", "server"), config.ssim_border == "zeros"
        attacking = ctx.optimizer("attacker")
        for name in ("client", "server", "attacker"):
            ctx.restore(name)
        for x, y in ctx.batches():
            images = ctx.pixels(x)
            z = client(x)
            attacking.update(1 - ssim(attacker(detached(z)), images, padded=padded).mean())
            attacker.requires_grad_(False)
            likeness = ssim(attacker(z), images, padded=padded).mean()
            loss = ctx.loss(server(z), y)
            optimizer.update(loss + config.alpha * (likeness - config.target_ssim).clamp(min=0))
            attacker.requires_grad_(True)
            ctx.log("loss", loss)
            ctx.log("ssim", likeness)
        for name in ("client", "server", "attacker"):
            ctx.keep(name)
        return {}
