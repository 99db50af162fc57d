"""The two references that exchange nothing: pooled training above, each client alone below."""

from __future__ import annotations

from cutlayer.algorithms import register
from cutlayer.algorithms.base import Algorithm
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.contexts import ClientContext


@register("local_only")
class LocalOnly(Algorithm):
    """Each client trains its own model on its own data; reported is the mean over clients."""

    layout = Layout(client=("model",), server=())
    personal = ("model",)
    keeps_optimizer = ("model",)
    uneven = True
    unread = ("aggregate.weights", "comm_threshold_mb")

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> Payload:
        """Training continues from the client's own model and optimizer; nothing is sent."""
        ctx.restore("model")
        model, optimizer = ctx.part("model"), ctx.optimizer("model")
        for x, y in ctx.batches():
            loss = ctx.loss(model(x), y)
            optimizer.update(loss)
            ctx.log("loss", loss)
        ctx.keep("model")
        return {}


@register("centralized")
class Centralized(LocalOnly):
    """One party trains on all the data: the upper reference."""

    pooled = True
    unread = (*LocalOnly.unread, "dataset.min_samples", "dataset.client_samples", "dataset.drop_unassigned")
