"""FedSA-LoRA: of low-rank adapters the matrices A are averaged, and each client keeps its own B."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm, Flow, Server
from cutlayer.algorithms.fed_avg import train
from cutlayer.algorithms.mixins import ClientRound, OwnSizes, TrainsAdapters
from cutlayer.models.lora import is_second
from cutlayer.runtime.messages.boundary import Payload, Value, flatten
from cutlayer.runtime.parties.blueprint import Blueprint, Layout, state_bytes
from cutlayer.runtime.parties.contexts import ClientContext


def without_second(model: Payload) -> dict[str, Value]:
    """A model without the matrices B of its adapters."""
    return {name: value for name, value in model.items() if not is_second(name)}


class SharesFirst(Server):
    """Sends and averages the model without the matrices B, which are zero here."""

    def down(self, client: int) -> Payload:
        return without_second(self.ctx.dump("model"))


@register("fed_sa_lora")
class FedSALora(TrainsAdapters, OwnSizes, Algorithm):
    """FedSA-LoRA (Guo et al., ICLR 2025): clients train both matrices, A is averaged, and each client keeps its B."""

    layout = Layout(client=("model",), server=("model",))
    uneven = True
    shared = ("model",)
    personal = ("model",)
    partly = ("model",)
    traffic = (Flow("down", "model", ("model without B",)), Flow("up", "model", ("model without B",)))
    Server = SharesFirst

    @classmethod
    def field_bytes(cls, blueprint: Blueprint, turn: ClientRound) -> Mapping[str, int]:  # noqa: ARG003
        sent = blueprint.travelling("model", blueprint.parts(["model"])["model"])
        return {"model without B": state_bytes({name: sent[name] for name in sent if not is_second(name)})}

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Local training from the global A and the client's B, at first zero; the upload is A."""
        model = ctx.part("model")
        own = ctx.state.get("model") or _second(model.state_dict())
        ctx.load({**down, **flatten("model", own)})
        train(ctx)
        ctx.state.put("model", _second(model.state_dict()))
        return without_second(ctx.dump("model"))


def _second(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if is_second(name)}
