"""U-shaped SplitFed: the model is cut twice, so that neither samples nor labels leave the client."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm, Flow, Server
from cutlayer.models.cutting import Crossing
from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Payload, ask
from cutlayer.runtime.messages.crossing import crossed, gradients, require_gradients
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext, ServerContext


class BodyServer(Server):
    """Holds the large body that all clients' batches go through, and averages what is before and after it.

    It sees no labels: what it learns from is the gradient of its output.
    """

    def __init__(self, ctx: ServerContext) -> None:
        super().__init__(ctx)
        self._passes: dict[int, tuple[Crossing, Crossing]] = {}
        self._turn: int | None = None

    def open_round(self, cohort: Sequence[int]) -> None:
        super().open_round(cohort)
        self._passes.clear()

    def on_smashed(self, client: int, message: Payload) -> Fields:
        """The body's output for z; its graph waits for the gradient."""
        z = require_gradients(crossed(message, "z"))
        output: Crossing = self.ctx.part("server")(z)
        self._passes[client] = z, output
        return {"output": output}

    def on_gradient(self, client: int, message: Payload) -> Fields:
        """One optimizer step along the gradient of the body's output; replies with the gradient of z.

        Where the optimizer is said to live for a round, it is for a client's.
        """
        z, output = self._passes.pop(client)
        optimizer = self.ctx.optimizer("server")
        if client != self._turn and self.ctx.blueprint.keeps_optimizer["server"] is False:
            optimizer.renew(0)
        self._turn = client
        optimizer.update(output, crossed(message, "grad"))
        return {"grad": gradients(z)}

    def forget(self, client: int) -> None:
        self._passes.pop(client, None)


@register("sl_u_shape")
class UShape(Algorithm):
    """SplitFed v2 over two cuts, the U-shaped configuration of Vepakomma et al. (2018, figure 1c).

    Client part and tail are at the client and are averaged as the round ends; the body is at the server, which trains
    it on the batches of all clients in turn. Where labels are the text itself, as of a language model, this keeps it
    home.
    """

    layout = Layout(client=("client", "tail"), server=("client", "server", "tail"))
    shared = ("client", "tail")
    traffic = (
        Flow("down", "model", ("client", "tail")),
        Flow("up", "smashed", ("smashed",), per="batch"),
        Flow("down", "smashed", ("body_output",), per="batch"),
        Flow("up", "gradient", ("body_output",), per="batch"),
        Flow("down", "gradient", ("smashed",), per="batch"),
        Flow("up", "model", ("client", "tail")),
    )
    Server = BodyServer

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram:
        """Each batch: z up, the body's output down, its gradient up, that of z down, one step of both parts."""
        ctx.load(down)
        first, tail = ctx.part("client"), ctx.part("tail")
        optimizer = ctx.optimizer("client", "tail")
        for x, y in ctx.batches():
            z = first(x)
            output = require_gradients(crossed((yield ask("smashed", z=z)), "output"))
            loss = ctx.loss(tail(output), y)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            reply = yield ask("gradient", grad=gradients(output))
            optimizer.update(z, crossed(reply, "grad"), reset=False)
            ctx.log("loss", loss)
        return ctx.dump("client", "tail")
