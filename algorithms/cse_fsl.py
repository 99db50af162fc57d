"""CSE-FSL: split learning whose clients train against an auxiliary model, and upload smashed data now and then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm, Flow, SplitServer
from cutlayer.algorithms.mixins import CountsSteps
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Payload, tell
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext


def check_counts(config: Any, *keys: str) -> None:
    """Raises ConfigError where one of these keys is below 1."""
    for key in keys:
        if getattr(config, key) < 1:
            raise ConfigError(key, getattr(config, key), "an integer >= 1")


class OneWayServer(SplitServer):
    """Trains on smashed data as it arrives and sends nothing back."""

    def on_smashed(self, client: int, message: Payload) -> Fields | None:
        super().on_smashed(client, message)
        return None


def train_with_auxiliary(ctx: ClientContext, down: Payload) -> ClientProgram:
    """Each step: a local loss through the auxiliary model; every q-th step (z, y) goes up before the update."""
    ctx.load(down)
    model, auxiliary = ctx.part("client"), ctx.part("auxiliary")
    optimizer = ctx.optimizer("client", "auxiliary")
    for step, (x, y) in enumerate(ctx.batches()):
        z = model(x)
        if step % ctx.config.upload_interval == 0:
            yield tell("smashed", z=z, y=y)
        loss = ctx.loss(auxiliary(z), y)
        optimizer.update(loss)
        ctx.log("auxiliary_loss", loss)
    return ctx.dump("client", "auxiliary")


@register("cse_fsl")
class CSEFSL(CountsSteps, Algorithm):
    """CSE-FSL (Mu & Shen, 2023): clients train with an auxiliary head and upload smashed data now and then."""

    @dataclass(frozen=True)
    class Config:
        """upload_interval: local steps from one upload of smashed data to the next (q), >= 1."""

        upload_interval: int = 5

        def __post_init__(self) -> None:
            check_counts(self, "upload_interval")

    revision = 1  # before, auxiliary models were narrower, not shorter
    layout = Layout(client=("client", "auxiliary"), server=("client", "auxiliary", "server"))
    shared = ("client", "auxiliary")
    traffic = (
        Flow("down", "model", ("client", "auxiliary")),
        Flow("up", "smashed", ("smashed", "labels"), per="batch", every="upload_interval"),
        Flow("up", "model", ("client", "auxiliary")),
    )
    uneven = True
    Server = OneWayServer

    @staticmethod
    def part_steps(config: Any, part: str, steps: int, epochs: int) -> int | None:
        """The server part's are one for each upload."""
        return -(-steps // config.upload_interval) if part == "server" else steps

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram:
        """See ``train_with_auxiliary``."""
        return train_with_auxiliary(ctx, down)
