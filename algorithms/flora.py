"""FLoRA: low-rank adapters of clients are stacked, folded into the weights, and begun anew in each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm, Flow, Server
from cutlayer.algorithms.fed_avg import train
from cutlayer.algorithms.mixins import ClientRound, ConfiguresParts, OwnSizes, TrainsAdapters
from cutlayer.models.folding import fold, renew, scaled_adapters, stacked_adapters, weights_below
from cutlayer.models.lora import is_adapter, is_below
from cutlayer.runtime.ground.config import ConfigError, scoped
from cutlayer.runtime.messages.boundary import Payload, Upload, Value, flatten, unflatten
from cutlayer.runtime.parties.blueprint import Blueprint, Layout, state_bytes
from cutlayer.runtime.parties.contexts import ClientContext, ServerContext

Stack = dict[str, Tensor]


class StackingServer(Server):
    """Stacks a round's adapters, folds the stack into its own weights, and sends each client the stacks that it lacks.

    A client that was away has the weights themselves in their place, where its stacks have more bytes.
    """

    def __init__(self, ctx: ServerContext) -> None:
        super().__init__(ctx)
        self._stacks: dict[int, Stack] = {}  # by round, of the last ones
        self._uploads: list[tuple[Stack, float]] = []

    def open_round(self, cohort: Sequence[int]) -> None:
        super().open_round(cohort)
        self._uploads = []

    def down(self, client: int) -> Payload:
        last = self.ctx.state(client).get("round")
        lacking = range(0 if last is None else int(last["number"]), self.ctx.round)
        statistics = rest(self.ctx.dump("model"))
        if any(round not in self._stacks for round in lacking):
            return {**statistics, **flatten("weights", weights_below(self.ctx.part("model")))}
        stacks = {f"{i}.{name}": each for i, n in enumerate(lacking) for name, each in self._stacks[n].items()}
        return {**statistics, **flatten("stack", stacks)}

    def absorb(self, client: int, upload: Upload) -> None:
        states, weight = unflatten(upload.fields), self.ctx.weight(client, upload.samples)
        self._uploads.append((states.pop("adapters"), weight))
        self.average(states, weight)
        self.ctx.state(client).put("round", {"number": torch.tensor(self.ctx.round)})

    def close_round(self) -> None:
        super().close_round()
        model, total = self.ctx.part("model"), sum(weight for _, weight in self._uploads)
        weights = [weight / total if total else 0.0 for _, weight in self._uploads]
        stack = stacked_adapters([adapters for adapters, _ in self._uploads], weights)
        fold(model, stack)
        self._stacks[self.ctx.round] = stack
        self._uploads = []
        sizes = {round: state_bytes(each) for round, each in self._stacks.items()}
        kept = kept_stacks(list(sizes.values()), state_bytes(weights_below(model)))
        self._stacks = {round: self._stacks[round] for round in [*sizes][len(sizes) - kept :]}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "stacks": {str(round): stack for round, stack in self._stacks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        device = self.ctx.blueprint.device
        self._stacks = {
            int(round): {name: tensor.to(device) for name, tensor in stack.items()}
            for round, stack in state["stacks"].items()
        }


def rest(model: Payload) -> dict[str, Value]:
    """What a model sends beside adapters and the weights below them, such as running statistics."""
    return {name: value for name, value in model.items() if not (is_adapter(name) or is_below(name))}


def kept_stacks(sizes: Sequence[int], weights: int) -> int:
    """How many of the last stacks have no more bytes together than the weights: one at least."""
    return max(1, sum(sum(sizes[i:]) <= weights for i in range(len(sizes))))


@register("flora")
class FLoRA(TrainsAdapters, ConfiguresParts, OwnSizes, Algorithm):
    """FLoRA (Wang et al., NeurIPS 2024, algorithm 1): the update is exactly the weighted sum of the clients' B A.

    Clients may have adapters of different ranks, r_k, with the scale alpha_k / r_k. It goes into A at the client, and
    the client's weight at the server, so that a stack's own scale is 1.
    """

    @dataclass(frozen=True)
    class Config:
        """Adapters of several ranks.

        Attributes:
            ranks: given to the clients in turn; none: ``model.lora.r`` for all.
            alphas: as many, beside the ranks; none: ``model.lora.alpha`` for all.
        """

        ranks: tuple[int, ...] = ()
        alphas: tuple[float, ...] = field(default=(), metadata=scoped(read_if=lambda own, _: bool(own.ranks)))

        def __post_init__(self) -> None:
            if any(rank < 1 for rank in self.ranks):
                raise ConfigError("ranks", self.ranks, "integers >= 1")
            if self.alphas and len(self.alphas) != len(self.ranks):
                raise ConfigError("alphas", self.alphas, f"as many as algorithm.ranks, which are {len(self.ranks)}")
            if not all(0 < alpha < float("inf") for alpha in self.alphas):
                raise ConfigError("alphas", self.alphas, "finite numbers > 0")

    layout = Layout(client=("model",), server=("model",))
    shared = ("model",)
    traffic = (Flow("down", "model", ("stacks", "rest")), Flow("up", "model", ("adapters", "rest")))
    Server = StackingServer

    @classmethod
    def part_options(cls, config: Config) -> Mapping[str, Mapping[str, Any]]:
        return {"model": {"folded": True, "ranks": config.ranks, "alphas": config.alphas}}

    @classmethod
    def field_bytes(cls, blueprint: Blueprint, turn: ClientRound) -> Mapping[str, int]:
        def adapters(client: int) -> int:
            state = blueprint.for_client(client).initial["model"]
            return state_bytes({name: tensor for name, tensor in state.items() if is_adapter(name)})

        model = blueprint.parts(["model"])["model"]
        other = rest(blueprint.travelling("model", model))
        sizes, weights = [sum(map(adapters, cohort)) for cohort in turn.cohorts[:-1]], state_bytes(weights_below(model))
        lacking = sizes[turn.before or 0 :]
        known = len(lacking) <= kept_stacks(sizes, weights)
        return {
            "adapters": adapters(turn.client),
            "stacks": sum(lacking) if known else weights,
            "rest": state_bytes({name: tensor for name, tensor in other.items() if isinstance(tensor, Tensor)}),
        }

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Fold what came into the client's weights, and train new adapters on them; these are the upload."""
        model, sent = ctx.part("model"), unflatten(down)
        weights = sent.get("weights") or ctx.state.get("weights") or weights_below(model)
        begun = {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}
        ctx.load(flatten("model", {**begun, **weights, **sent.get("model", {})}))
        for stack in _by_round(sent.get("stack", {})):
            fold(model, stack)
        ctx.state.put("weights", weights_below(model))
        renew(model)
        train(ctx)
        return {**flatten("adapters", scaled_adapters(model)), **rest(ctx.dump("model"))}


def _by_round(stacks: Mapping[str, Tensor]) -> list[Stack]:
    found: dict[int, Stack] = {}
    for key, tensor in stacks.items():
        i, _, name = key.partition(".")
        found.setdefault(int(i), {})[name] = tensor
    return [found[i] for i in sorted(found)]
