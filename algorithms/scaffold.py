"""SCAFFOLD: FedAvg whose local steps are corrected by control variates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm, Flow, Server
from cutlayer.algorithms.mixins import ChecksOptimizer
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import Payload, Upload, flatten, unflatten
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext, ServerContext
from cutlayer.runtime.parties.optim import OptimizerConfig


class ScaffoldServer(Server):
    """Keeps the server's control variate c and adds |S|/N times the mean change of the clients' own."""

    def __init__(self, ctx: ServerContext) -> None:
        super().__init__(ctx)
        self._control = {name: torch.zeros_like(w) for name, w in ctx.part("model").named_parameters()}

    def down(self, client: int) -> Payload:
        return {**self.ctx.dump("model"), **flatten("control", self._control)}

    def absorb(self, client: int, upload: Upload) -> None:
        states = unflatten(upload.fields)
        change = states.pop("control")
        self.average(states, self.ctx.weight(client, upload.samples))
        for name, value in change.items():
            self._change[name] = self._change.get(name, 0) + value

    def open_round(self, cohort: Any) -> None:
        super().open_round(cohort)
        self._change: dict[str, Any] = {}

    def close_round(self) -> None:
        super().close_round()
        for name, value in self._change.items():
            self._control[name] += value / self.ctx.num_clients

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "control": self._control}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for name, value in state["control"].items():
            self._control[name].copy_(value)


@register("scaffold")
class Scaffold(ChecksOptimizer, Algorithm):
    """SCAFFOLD (Karimireddy et al., ICML 2020, algorithm 1, option II), with a global step of 1.

    Local steps follow g - c_i + c; afterwards c_i becomes c_i - c + (x - y_i) / (K lr) over K local steps, K lr being
    the sum of their rates. Option II holds for plain SGD only, so other optimizers are refused. The paper averages the
    clients uniformly; here ``aggregate.weights`` decides, as for every method.
    """

    layout = Layout(client=("model",), server=("model",))
    shared = ("model",)
    traffic = (
        Flow("down", "model", ("model", "control")),
        Flow("up", "model", ("model", "control")),
    )
    Server = ScaffoldServer

    @classmethod
    def check_optimizer(cls, optimizer: OptimizerConfig) -> None:
        """Option II reads the gradients off the distance travelled, which holds for plain gradient steps."""
        if optimizer.name != "sgd":
            raise ConfigError("optimizer.name", optimizer.name, "what scaffold is defined for", ("sgd",))
        if optimizer.options.get("momentum"):
            raise ConfigError("optimizer.momentum", optimizer.options["momentum"], "0, as scaffold is defined for")

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Corrected local steps; the upload is the model and the change of the client's control variate."""
        ctx.load(down)
        model, optimizer = ctx.part("model"), ctx.optimizer("model")
        names, weights = zip(*model.named_parameters(), strict=True)
        start = [w.detach().clone() for w in weights]
        c = unflatten(down)["control"]
        own = ctx.state.get("control") or {name: torch.zeros_like(value) for name, value in c.items()}
        correction = [c[name] - own[name] for name in names]
        rates: list[float] = []
        for x, y in ctx.batches():
            loss = ctx.loss(model(x), y)
            gradients = torch.autograd.grad(loss, weights)
            for w, g, d in zip(weights, gradients, correction, strict=True):
                w.grad = g + d
            optimizer.step()
            ctx.log("loss", loss)
            rates.append(optimizer.lr)
        travelled = math.fsum(rates)
        if not travelled:
            return {
                **ctx.dump("model"),
                **flatten("control", {name: torch.zeros_like(value) for name, value in c.items()}),
            }
        change = {
            name: -c[name] + (x - w.detach()) / travelled for name, x, w in zip(names, start, weights, strict=True)
        }
        ctx.state.put("control", {name: own[name] + change[name] for name in names})
        return {**ctx.dump("model"), **flatten("control", change)}
