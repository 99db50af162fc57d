"""The bytes and the round trips of a run in closed form.

They follow from the arrows that an algorithm declares and the sizes of its parts and data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from cutlayer.algorithms.base import Flow
from cutlayer.models.cutting import tensors
from cutlayer.runtime.ground import rng
from cutlayer.runtime.messages.boundary import MODEL, SCALAR_BYTES, payload_bytes
from cutlayer.runtime.parties.blueprint import state_bytes
from cutlayer.runtime.rounds.federation import Federation

_SAMPLES = 2  # normalisation may refuse to train on one


def expected_bytes(federation: Federation, rounds: Iterable[int]) -> dict[tuple[str, str], int]:
    """Payload bytes of training by (direction, kind) over the given rounds, counted from 0 without a gap.

    Nothing is trained: a run is measured by its ledger, this says beforehand what the ledger will hold.
    """
    per_sample = {"labels": SCALAR_BYTES, **crossing_bytes(federation)}
    whole, travelling = part_bytes(federation, whole=True), part_bytes(federation, whole=False)
    total: dict[tuple[str, str], int] = {}
    for flows in _crossings(federation, rounds):
        for flow, sizes in flows:
            size = sum(sizes) if flow.per == "batch" else 1
            each = per_sample if flow.per == "batch" else (travelling if flow.kind == MODEL else whole)
            key = flow.direction, flow.kind
            total[key] = total.get(key, 0) + size * sum(each[field] for field in flow.fields)
    return total


def expected_round_trips(federation: Federation, rounds: Iterable[int]) -> int:
    """How often clients wait for the server over the given rounds: for what opens a round, and for each reply."""
    total = 0
    for flows in _crossings(federation, rounds):
        replies = {flow.kind: len(sizes) for flow, sizes in flows if flow.direction == "down"}
        replies |= {flow.kind: 1 for flow, _ in flows if flow.kind == MODEL}
        total += sum(replies.values())
    return total


def _crossings(federation: Federation, rounds: Iterable[int]) -> Iterator[list[tuple[Flow, list[int]]]]:
    """For each client's round its arrows, each with the sizes of the batches that cross, or [1] for one a round."""
    config = federation.config
    seen: dict[int, int] = {}
    for round in rounds:
        for client in federation.cohort(round):
            sizes = federation.clients.steps(client)
            flows = federation.algorithm.arrows(config.algorithm, round, before=seen.get(client))
            yield [(flow, sizes[:: flow.interval(config.algorithm)] if flow.per == "batch" else [1]) for flow in flows]
            seen[client] = round


def part_bytes(federation: Federation, *, whole: bool) -> dict[str, int]:
    """Bytes of each part's state: whole, or as it travels under ``aggregate.buffers``.

    Control variates are of parameters only.
    """
    blueprint = federation.blueprint
    sizes: dict[str, int] = {}
    for name, state in blueprint.initial.items():
        parameters = state_bytes(
            {key: value for key, value in state.items() if key not in blueprint.buffer_names[name]}
        )
        sizes[name] = state_bytes(state) if whole or blueprint.buffers == "average" else parameters
        if name == "model":
            sizes["control"] = parameters
    return sizes


def crossing_bytes(federation: Federation) -> dict[str, int]:
    """Bytes for one sample of what comes out at each cut: ``smashed`` at the first, ``body_output`` at the second.

    A cut that the model does not have gives 0.
    """
    sizes = {"smashed": 0, "body_output": 0}
    whole = federation.algorithm.layout.whole
    if not federation.algorithm.layout.cut:
        return sizes
    device, dtype = federation.device, federation.blueprint.dtype
    x: Any = torch.zeros(_SAMPLES, *federation.dataset.info.shape, dtype=dtype, device=device)
    with torch.no_grad(), federation.blueprint.autocast(), rng.TorchStream(0, device):
        for field, part in zip(sizes, federation.blueprint.parts(whole[:-1]).values(), strict=False):
            x = part(x)
            sizes[field] = sum(payload_bytes(value) for value in tensors(x)) // _SAMPLES
    return sizes


def smashed_bytes(federation: Federation) -> int:
    """Bytes of the cut layer's output for one sample; 0 for an uncut model."""
    return crossing_bytes(federation)["smashed"]
