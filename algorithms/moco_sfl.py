"""MocoSFL: momentum contrast in split learning, with one server step on the batches of a whole cohort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm, Flow, Server
from cutlayer.algorithms.byte_saving import FROZEN, ByteSaving
from cutlayer.algorithms.contrastive import Queue, check_positive, check_unit, contrast, follow
from cutlayer.algorithms.mixins import CountsSteps, OwnSteps
from cutlayer.algorithms.moco_together import MocoTogether
from cutlayer.models.cutting import Crossing
from cutlayer.runtime.ground.config import ConfigError, scoped
from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Payload, ask
from cutlayer.runtime.messages.crossing import (
    crossed,
    divided,
    gradients,
    joined,
    require_gradients,
    scaled,
)
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext, ServerContext
from cutlayer.runtime.parties.optim import PartOptimizer

_SAVING = scoped(read_if=lambda own, _: own.loss_threshold is not None)


@dataclass(frozen=True)
class MocoSFLConfig:
    """Keys of MocoSFL.

    Attributes:
        temperature: of InfoNCE, > 0.
        momentum, client_momentum: of the moving averages of the server's model and of the client part, in [0, 1).
        queue: keys that queries are compared with, >= 1, in all.
        feature_sharing: one queue for all clients; else each has its own share of it.
        symmetric: the server learns from each image in both directions; clients only as the query.
        local_steps: steps of a round, from one synchronisation to the next, >= 1.
        client_gradient: of what a client gets the gradient: the mean loss of the whole cohort's queries, or that of its
            own alone, which in a cohort of N equal batches is N times as long.
        client_copy: own leaves each client a momentum copy for itself, which never travels and follows its online copy
            before each key; with shared there is one, the server's, which goes down with the online copy.
        client_schedule: what moves the client part's learning rate on: a round, or each step that the client takes.
        rich_share, rich_batch_size: share of the clients (the first ones) whose batches have another size.
        loss_threshold, loss_interval: when the mean loss of an interval of rounds has fallen by less than the
            threshold, the next interval saves bytes: first the gradients, then the uploads too; null never does.
        stored_steps: steps whose smashed data the server keeps to learn from while it gets none.
        together: auto lets a cohort of equal weights compute as one where nothing but time depends on it.
    """

    temperature: float = 0.1
    momentum: float = 0.99
    client_momentum: float = 0.99
    queue: int = 6000
    feature_sharing: bool = True
    symmetric: bool = True
    local_steps: int = 1
    client_gradient: Literal["cohort", "own"] = "cohort"
    client_copy: Literal["own", "shared"] = "own"
    client_schedule: Literal["round", "step"] = "round"
    rich_share: float = 0.0
    rich_batch_size: int | None = field(default=None, metadata=scoped(read_if=lambda own, _: own.rich_share > 0))
    loss_threshold: float | None = None
    loss_interval: int = field(default=100, metadata=_SAVING)
    stored_steps: int = field(default=10, metadata=_SAVING)
    together: Literal["auto", "never"] = "auto"

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_unit("momentum", self.momentum)
        check_unit("client_momentum", self.client_momentum)
        for key in ("queue", "local_steps", "loss_interval", "stored_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "an integer >= 1")
        if not 0 <= self.rich_share <= 1:
            raise ConfigError("rich_share", self.rich_share, "a number >= 0 and <= 1")
        if self.rich_share and (self.rich_batch_size is None or self.rich_batch_size < 1):
            raise ConfigError("rich_batch_size", self.rich_batch_size, "an integer >= 1, where rich_share is above 0")


class MocoServer(Server):
    """Online and momentum copies of the upper part with a projector each, and the queue.

    It sees the smashed data of two views of each image, no image and no label.
    """

    gathers = True

    def __init__(self, ctx: ServerContext) -> None:
        super().__init__(ctx)
        config: MocoSFLConfig = ctx.config
        lines = 1 if config.feature_sharing else ctx.num_clients
        if config.queue < lines:
            raise ConfigError("algorithm.queue", config.queue, f"at least a key for each of {lines} clients")
        width = next(reversed(list(ctx.part("projector").parameters()))).shape[0]
        self._queue = Queue(torch.randn(lines, config.queue // lines, width, generator=ctx.generator("queue")))
        self._queue.move(next(ctx.part("projector").parameters()))
        self._saving = ByteSaving(config.loss_threshold, config.loss_interval, config.stored_steps)

    def open_round(self, cohort: Sequence[int]) -> None:
        super().open_round(cohort)
        self._saving.open_round()
        for query, key, lines in self._saving.replayed(self.ctx.config.local_steps):
            self._learn(query, key, lines)

    def down(self, client: int) -> Payload:
        """The client part, with its momentum copy if shared; nothing while the server learns from what it has."""
        if self._saving.silent:
            return {}
        copies = ("client", "client_momentum") if self.ctx.config.client_copy == "shared" else ("client",)
        return self.ctx.dump(*copies) | ({FROZEN: True} if self._saving.frozen else {})

    def on_smashed_cohort(self, inbox: Mapping[int, Payload]) -> dict[int, Fields | None]:
        """One step on the cohort's batches as one; each client gets the gradient of its own queries."""
        query, key = (joined([crossed(message, name) for message in inbox.values()]) for name in ("query", "key"))
        sizes = [len(next(iter(message.values()))) for message in inbox.values()]  # type: ignore[arg-type]
        shared = self.ctx.config.feature_sharing
        lines = torch.tensor([0 if shared else client for client in inbox]).repeat_interleave(torch.tensor(sizes))
        self._learn(require_gradients(query), key, lines)
        if self._saving.frozen:
            return dict.fromkeys(inbox)
        own = divided(gradients(query), sizes)
        if self.ctx.config.client_gradient == "own":
            own = [scaled(grad, sum(sizes) / size) for grad, size in zip(own, sizes, strict=True)]
        return {client: {"grad": grad} for client, grad in zip(inbox, own, strict=True)}

    def _learn(self, query: Crossing, key: Crossing, lines: Tensor) -> None:
        """One optimizer step of the online copies, one step of the averages, the new keys into the queue."""
        config: MocoSFLConfig = self.ctx.config
        part = self.ctx.part
        loss, *keys = contrast(
            lambda z: part("projector")(part("server")(z)),
            lambda z: part("projector_momentum")(part("server_momentum")(z)),
            query,
            key,
            self._queue,
            lines,
            temperature=config.temperature,
            symmetric=config.symmetric,
        )
        self.ctx.optimizer("server", "projector").update(loss)
        for name in ("server", "projector"):
            follow(part(f"{name}_momentum"), part(name), config.momentum)
        self._queue.push(*keys)
        self._saving.note(loss, query, key, lines)
        self.ctx.log("loss", loss)

    def close_round(self) -> None:
        """The averaged client part, and the shared momentum copy as after a round's steps towards that."""
        learnt = "client" in self._averages
        super().close_round()
        if learnt and self.ctx.config.client_copy == "shared":
            momentum = self.ctx.config.client_momentum**self.ctx.config.local_steps
            follow(self.ctx.part("client_momentum"), self.ctx.part("client"), momentum)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "queue": self._queue.state(), "saving": self._saving.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._queue.load(state["queue"])
        self._saving.load(state["saving"], self.ctx.blueprint.device)


@register("moco_sfl")
class MocoSFL(OwnSteps, CountsSteps, MocoTogether, Algorithm):
    """MocoSFL (Li et al., ICLR 2023): self-supervised split learning for many clients with little data each.

    A client sends the client part's outputs for two augmented views of its images, one through the online copy and one
    through its moving average; the server takes one step of momentum contrast on all of the cohort's, and answers with
    the gradient of the first. Client parts are averaged after ``local_steps`` such steps. The model's classifier is
    left alone: what is tested are the features before it.
    """

    Config = MocoSFLConfig
    layout = Layout(
        client=("client", "client_momentum"),
        server=("client", "client_momentum", "server", "server_momentum", "projector", "projector_momentum"),
    )
    shared = ("client",)
    revision = 1  # before, momentum copies travelled, and a client's gradient was of its own mean
    keeps_optimizer = ("client",)
    schedule = "lockstep"
    evaluates_features = True
    unread = ("dataset.shuffle", "local_epochs")
    tasks = ("classification",)  # by which its features are tested
    traffic = (
        Flow("down", "model", ("client", "client_momentum")),
        Flow("up", "smashed", ("smashed", "smashed"), per="batch"),
        Flow("down", "smashed", ("smashed",), per="batch"),
        Flow("up", "model", ("client",)),
    )
    Server = MocoServer

    @classmethod
    def steps(cls, config: MocoSFLConfig, client: int, num_clients: int, sizes: Sequence[int]) -> list[int]:
        """``local_steps`` batches, of the client's kind's size."""
        samples = sum(sizes)
        rich = client < round(config.rich_share * num_clients)
        size = config.rich_batch_size if rich and config.rich_batch_size else max(sizes, default=0)
        return [min(size, samples)] * config.local_steps

    @classmethod
    def arrows(cls, config: MocoSFLConfig, round: int, *, before: int | None) -> tuple[Flow, ...]:
        """The momentum copy goes down where it is shared."""
        down, *others = super().arrows(config, round, before=before)
        return (down if config.client_copy == "shared" else replace(down, fields=("client",)), *others)

    @staticmethod
    def part_steps(config: MocoSFLConfig, part: str, steps: int, epochs: int) -> int | None:
        """``local_steps``; ``client_schedule`` by step has a count of its own."""
        return None if part == "client" and config.client_schedule == "step" else steps

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram:
        """Each step: two views up, the gradient of the first down, one step; the momentum copy follows."""
        if not down:
            return {}
        ctx.load(down)
        own, schedule = ctx.config.client_copy == "own", _OwnSchedule(ctx)
        if own:
            ctx.restore("client_momentum")
        model, average, optimizer = ctx.part("client"), ctx.part("client_momentum"), ctx.optimizer("client")
        for one, two in ctx.views(ctx.steps):
            query = model(one)
            if own:
                follow(average, model, ctx.config.client_momentum)
            with torch.no_grad():
                key = average(two)
            reply = yield ask("smashed", query=query, key=key)
            if FROZEN in down:
                continue
            schedule.step(optimizer)
            optimizer.update(query, crossed(reply, "grad"))
            if not own:
                follow(average, model, ctx.config.client_momentum)
        schedule.keep()
        if own:
            ctx.keep("client_momentum")
        return {} if FROZEN in down else ctx.dump("client")


class _OwnSchedule:
    """A client's learning rate where its own steps move it on: how many it has taken is kept with it."""

    def __init__(self, ctx: ClientContext) -> None:
        self._ctx, self._by_step = ctx, ctx.config.client_schedule == "step"
        kept = ctx.state.get("steps") if self._by_step else None
        self._taken = 0 if kept is None else int(kept["taken"])

    def step(self, optimizer: PartOptimizer) -> None:
        """Set the rate of the step that comes."""
        if self._by_step:
            self._ctx.schedule(optimizer, "client", at=self._taken)
            self._taken += 1

    def keep(self) -> None:
        """Keep the number of steps for the client's next round."""
        if self._by_step:
            self._ctx.state.put("steps", {"taken": torch.tensor(self._taken)})
