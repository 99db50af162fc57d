"""FSL-SAGE: CSE-FSL whose auxiliary model is aligned to the server's gradients instead of trained at the client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from cutlayer.algorithms import register
from cutlayer.algorithms.alignment import alignment_batch, frozen, input_gradient
from cutlayer.algorithms.base import Flow
from cutlayer.algorithms.cse_fsl import CSEFSL, OneWayServer, check_counts, train_with_auxiliary
from cutlayer.runtime.messages.boundary import ClientProgram, Payload, Reply, ask, flatten, tell
from cutlayer.runtime.messages.crossing import appended, tensor
from cutlayer.runtime.parties.contexts import ClientContext
from cutlayer.tasks import IGNORED


def _total(each: Iterable[Tensor]) -> Tensor:
    """The sum, to be divided and averaged in double precision."""
    return reduce(torch.add, each).double()


class AligningServer(OneWayServer):
    """Keeps each client's newest smashed data and an auxiliary model per client, aligned on request."""

    def on_smashed(self, client: int, message: Payload) -> None:
        if not self._warming():
            self._collect(client, message)
        super().on_smashed(client, message)

    def _collect(self, client: int, message: Payload) -> None:
        own, size = self.ctx.state(client), self.ctx.config.buffer_size
        kept = own.get("buffer") or {}
        fill = {"z": 0, "y": IGNORED}
        new = {name: tensor(message, name) for name in fill}
        if kept:
            new = {name: appended(kept[name], new[name], fill[name]) for name in fill}
        own.put("buffer", {name: t[-size:] for name, t in new.items()})

    def on_align(self, client: int, message: Payload) -> Reply:
        """Fit the client's auxiliary model to the server's gradients over the buffer, and send it down.

        Minimises the squared distance between the two gradients of z (summed), with the targets computed once.
        """
        own, config = self.ctx.state(client), self.ctx.config
        buffer = own.get("buffer")
        auxiliary, optimizer = self.ctx.replica("auxiliary", client)
        auxiliary.load_state_dict(own.get("auxiliary") or auxiliary.state_dict())
        assert buffer is not None, "a client asks for alignment after an upload"
        size, server = config.align_batch_size, frozen(self.ctx.part("server"))
        dtype = next(auxiliary.parameters()).dtype
        with torch.autocast(buffer["z"].device.type, enabled=False):
            # Batches of nearly equal size: a remainder of one sample could not be normalised.
            count = -(-len(buffer["y"]) // size)
            pieces = zip(buffer["z"].to(dtype).tensor_split(count), buffer["y"].tensor_split(count), strict=True)
            loss = self.ctx.loss
            batches = [alignment_batch(auxiliary, z, y, input_gradient(server, z, y, loss), loss) for z, y in pieces]
            before = _total(batch.error() for batch in batches)
            for _ in range(config.align_epochs):
                for batch in batches:
                    optimizer.step(batch.differentiate)
            after = _total(batch.error() for batch in batches)
        norm = _total(batch.target.square().sum() for batch in batches)
        for name, value in {"error_before": before, "error_after": after, "target": norm}.items():
            self.ctx.log(f"align/{name}", value)
        for name, value in {"before": before, "after": after}.items():
            self.ctx.log(f"align/normalised_{name}", torch.where(norm != 0, value / norm, 0.0))
        own.put("auxiliary", auxiliary.state_dict())
        return flatten("auxiliary", auxiliary.state_dict())

    def down(self, client: int) -> Payload:
        return self.ctx.dump(*(self.ctx.shared if not self._warming() else CSEFSL.shared))

    def _warming(self) -> bool:
        return self.ctx.config.warm_start and self.ctx.round == 0


@register("fsl_sage")
class FSLSAGE(CSEFSL):
    """FSL-SAGE (Nair et al., ICML 2025): the auxiliary model estimates the server's gradient and is aligned to it.

    The auxiliary model is not trained on the client. It comes down, fitted to the client's own smashed data, in every
    ``align_interval``-th round after the client's first upload; the client keeps it until then. An addition: a client
    that joins between two alignments (``frac`` < 1, which the paper does not have) is aligned in its first round, as it
    would else follow the gradient of a random model.
    """

    @dataclass(frozen=True)
    class Config:
        """Keys of FSL-SAGE.

        upload_interval: local steps between uploads (q). align_interval: rounds between alignments (l).
        buffer_size: smashed samples kept per client (M). align_epochs: passes over the buffer per alignment (K).
        align_batch_size: samples per alignment step (A). warm_start: the first round is one of CSE-FSL, which trains
        the auxiliary model; buffers and alignment begin in the second.
        """

        upload_interval: int = 5
        align_interval: int = 10
        buffer_size: int = 1000
        align_epochs: int = 100
        align_batch_size: int = 1000
        warm_start: bool = False

        def __post_init__(self) -> None:
            check_counts(self, "upload_interval", "align_interval", "buffer_size", "align_epochs", "align_batch_size")

    revision = 2  # before, a linear auxiliary model was aligned by other sums, which round otherwise
    uneven = True
    shared = ("client",)
    traffic = (
        Flow("down", "model", ("client",)),
        Flow("up", "smashed", ("smashed", "labels"), per="batch", every="upload_interval"),
        Flow("down", "align", ("auxiliary",), rounds="align_interval", first=True),
        Flow("up", "model", ("client",)),
    )
    Server = AligningServer

    @classmethod
    def arrows(cls, config: Any, round: int, *, before: int | None) -> tuple[Flow, ...]:
        """A warm start's first round is one of CSE-FSL, and alignment counts from the second."""
        if config.warm_start and round == 0:
            return CSEFSL.traffic
        return super().arrows(config, round - config.warm_start, before=before)

    @staticmethod
    def part_steps(config: Any, part: str, steps: int, epochs: int) -> int | None:
        """As of CSE-FSL; an alignment's depend on what the server has buffered."""
        if part == "auxiliary":
            return None
        return -(-steps // config.upload_interval) if part == "server" else steps

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram:
        """Each step follows the gradient that the auxiliary model estimates at the cut layer."""
        config = ctx.config
        if config.warm_start and ctx.round == 0:
            return (yield from train_with_auxiliary(ctx, down))
        aligned = ctx.restore("auxiliary")
        due = (ctx.round - config.warm_start) % config.align_interval == 0 or not aligned
        ctx.load(down)
        model, optimizer = ctx.part("client"), ctx.optimizer("client")
        for step, (x, y) in enumerate(ctx.batches()):
            z = model(x)
            if step % config.upload_interval == 0:
                yield tell("smashed", z=z, y=y)
            if step == 0 and due:
                ctx.load((yield ask("align")))
                ctx.keep("auxiliary")
            optimizer.update(z, input_gradient(ctx.part("auxiliary"), z, y, ctx.loss))
        return ctx.dump("client")
