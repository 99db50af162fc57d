"""FL-MoCo: momentum contrast at each client, averaged as by FedAvg."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm, Flow
from cutlayer.algorithms.contrastive import Queue, check_positive, check_unit, contrast, follow
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext

_NAMES = ("model", "projector")


@dataclass(frozen=True)
class FLMocoConfig:
    """Keys of FL-MoCo.

    Attributes:
        temperature: of InfoNCE, > 0.
        momentum: of the moving average, in [0, 1).
        queue: keys that each client keeps, >= 1.
        client_copy: own leaves each client its momentum copies from round to round; with shared they begin each round
            as the averaged model that all share.
        symmetric: each image is learnt from in both directions.
    """

    temperature: float = 0.1
    momentum: float = 0.99
    queue: int = 6000
    client_copy: Literal["own", "shared"] = "own"
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_unit("momentum", self.momentum)
        if self.queue < 1:
            raise ConfigError("queue", self.queue, "an integer >= 1")


@register("fl_moco")
class FLMoco(Algorithm):
    """MoCo v2 (Chen et al. 2020) trained with FedAvg, the baseline of MocoSFL.

    The online model and its projector travel. A client's momentum copies follow them before each step; these copies
    stay with it, or begin each round as the online ones, and its queue stays with it. The model's classifier is left
    alone: what is tested are the features before it.
    """

    Config = FLMocoConfig
    layout = Layout(
        client=("model", "model_momentum", "projector", "projector_momentum"), server=("model", "projector")
    )
    shared = _NAMES
    revision = 1  # before, momentum copies and optimizers began anew in each round
    keeps_optimizer = _NAMES
    unread = ("dataset.shuffle",)
    tasks = ("classification",)  # by which its features are tested
    evaluates_features = True
    traffic = (Flow("down", "model", _NAMES), Flow("up", "model", _NAMES))

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Local epochs of momentum contrast from the global model; the upload is the online model."""
        ctx.load(down)
        config: FLMocoConfig = ctx.config
        online = [ctx.part(name) for name in _NAMES]
        average = [_momentum_copy(ctx, name) for name in _NAMES]
        optimizer, queue = ctx.optimizer(*_NAMES), _own_queue(ctx)
        line = torch.zeros(1, dtype=torch.int64)
        for one, two in ctx.views(ctx.steps):
            for mean, module in zip(average, online, strict=True):
                follow(mean, module, config.momentum)
            loss, *keys = contrast(
                lambda x: online[1](online[0](x)),
                lambda x: average[1](average[0](x)),
                one,
                two,
                queue,
                line.expand(len(one)),
                temperature=config.temperature,
                symmetric=config.symmetric,
            )
            optimizer.update(loss)
            queue.push(*keys)
            ctx.log("loss", loss)
        ctx.state.put("queue", queue.state())
        if config.client_copy == "own":
            for name in _NAMES:
                ctx.keep(f"{name}_momentum")
        return ctx.dump(*_NAMES)


def _momentum_copy(ctx: ClientContext, name: str) -> nn.Module:
    """The copy that follows a part: as the client kept it, in its first round as initialised, or as the part is now."""
    if ctx.config.client_copy == "own":
        ctx.restore(f"{name}_momentum")
        return ctx.part(f"{name}_momentum")
    copy = ctx.part(f"{name}_momentum")
    copy.load_state_dict(ctx.part(name).state_dict())
    return copy


def _own_queue(ctx: ClientContext) -> Queue:
    """The client's keys, in its first round random ones."""
    last = list(ctx.part("projector").parameters())[-1]
    queue = Queue(torch.randn(1, ctx.config.queue, len(last), generator=ctx.generator("queue")))
    kept = ctx.state.get("queue")
    queue.move(last)
    if kept is not None:
        queue.load(kept)
    return queue
