"""The bytes of a run in closed form, from the arrows that an algorithm declares and the sizes of its parts and data."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from datasets import batch_sizes
from runtime.blueprint import state_bytes
from runtime.boundary import SCALAR_BYTES
from runtime.federation import Federation


def expected_bytes(federation: Federation, rounds: Iterable[int]) -> dict[tuple[str, str], int]:
    """Payload bytes of training by (direction, kind) over the given rounds, counted from 0 without a gap.

    Nothing is trained: a run is measured by its ledger, this says beforehand what the ledger will hold.
    """
    config = federation.config
    per_sample = {"labels": SCALAR_BYTES, "smashed": smashed_bytes(federation)}
    total: dict[tuple[str, str], int] = {}
    seen: set[int] = set()
    for round in rounds:
        for client in federation.cohort(round):
            samples = int(federation.partition.sizes[client])
            sizes = config.local_epochs * batch_sizes(samples, config.batch_size, config.dataset.drop_last)
            for flow in federation.algorithm.traffic:
                if not flow.crosses(config.algorithm, round, is_first=client not in seen):
                    continue
                step = flow.interval(config.algorithm)
                size = sum(sizes[::step]) if flow.per == "batch" else 1
                each = per_sample if flow.per == "batch" else federation.part_bytes
                key = flow.direction, flow.kind
                total[key] = total.get(key, 0) + size * sum(each[field] for field in flow.fields)
            seen.add(client)
    return total


def smashed_bytes(federation: Federation) -> int:
    """Bytes of the cut layer's output for one sample; 0 for an uncut model."""
    if not federation.algorithm.layout.cut:
        return 0
    client = federation.blueprint.parts(["client"])["client"].eval()
    x = torch.zeros(1, *federation.dataset.info.shape, dtype=federation.blueprint.dtype, device=federation.device)
    with torch.no_grad(), federation.blueprint.autocast():
        z = client(x)
    return state_bytes({"z": z})
