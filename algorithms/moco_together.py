"""The clients of MocoSFL computed as one, for rounds of many clients with little data each."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from cutlayer.algorithms.byte_saving import FROZEN
from cutlayer.algorithms.mixins import ComputesTogether
from cutlayer.models.cutting import Crossing
from cutlayer.runtime.messages.boundary import Fields, Payload, Reply
from cutlayer.runtime.messages.crossing import backward, crossed, divided, joined, scaled
from cutlayer.runtime.parties.cohort import Asked, Cohort


class MocoTogether(ComputesTogether):
    """`MocoSFL.client` for a whole cohort."""

    @classmethod
    def computes_together(cls, config: Any) -> bool:
        """After every step clients have the same weights again, and what follows these is the same for all."""
        alike = config.client_copy == "shared" and config.client_schedule == "round"
        return config.together == "auto" and config.local_steps == 1 and alike

    @staticmethod
    def together(cohort: Cohort, down: Payload) -> Generator[Asked, dict[int, Reply], Fields]:
        """The same round, of clients that begin it with the same weights and take one step: chunks of many clients."""
        if not down:
            return {}
        cohort.load(down)
        model, average, optimizer = cohort.part("client"), cohort.part("client_momentum"), cohort.optimizer("client")
        sent: dict[int, Fields] = {}
        graphs: list[tuple[list[int], Crossing]] = []
        for chunk, one, two in cohort.views():
            query = model(one)
            with torch.no_grad():
                key = average(two)
            graphs.append((chunk, query))
            sizes = [cohort.sizes[client] for client in chunk]
            for client, own, other in zip(chunk, divided(query, sizes), divided(key, sizes), strict=True):
                sent[client] = {"query": own, "key": other}
        replies = yield Asked("smashed", sent)
        if FROZEN in down:
            return {}
        optimizer.zero_grad()
        for chunk, query in graphs:
            # The mean of the clients' steps is the step along their gradients' mean: each as its average weighs.
            along = [scaled(crossed(replies[client], "grad"), cohort.share(client)) for client in chunk]
            backward(query, joined(along))
        optimizer.step()
        return cohort.dump("client")
