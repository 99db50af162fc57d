"""The bytes of a run in closed form.

They follow from the arrows that an algorithm declares and the sizes of its parts and data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from cutlayer.algorithms.base import Flow
from cutlayer.algorithms.mixins import ClientRound, OwnSizes
from cutlayer.models.cutting import tensors
from cutlayer.models.shapes import sample
from cutlayer.runtime.ground import rng
from cutlayer.runtime.messages.boundary import MODEL, payload_bytes
from cutlayer.runtime.parties.blueprint import state_bytes
from cutlayer.runtime.rounds.setup import Setup

_SAMPLES = 2  # normalisation may refuse to train on one


def expected_bytes(setup: Setup, rounds: Iterable[int]) -> dict[tuple[str, str], int]:
    """Payload bytes of training by (direction, kind) over the given rounds, counted from 0 without a gap.

    Nothing is trained: a run is measured by its ledger, this says beforehand what the ledger will hold.
    """
    info = setup.dataset.info
    labels = payload_bytes(setup.blueprint.task.targets(info, 1)) // max(1, info.length)
    per_place = {"labels": labels, **crossing_bytes(setup)}
    whole, travelling = part_bytes(setup, whole=True), part_bytes(setup, whole=False)
    total: dict[tuple[str, str], int] = {}
    for flows, own in zip(crossings(setup, rounds), _own_sizes(setup, rounds), strict=True):
        for flow, sizes in flows:
            size = sum(sizes) if flow.per == "batch" else 1
            each = per_place if flow.per == "batch" else (travelling if flow.kind == MODEL else whole) | own
            key = flow.direction, flow.kind
            total[key] = total.get(key, 0) + size * sum(each[field] for field in flow.fields)
    return total


def crossings(setup: Setup, rounds: Iterable[int]) -> Iterator[list[tuple[Flow, list[int]]]]:
    """For each client's round its arrows, each with the places of the batches that cross, or [1] for one a round.

    Of images they are samples; of text tokens, see `Setup.places`.
    """
    config = setup.config
    for round, client, before in _turns(setup, rounds):
        sizes = setup.places(client, round)
        flows = setup.algorithm.arrows(config.algorithm, round, before=before)
        yield [(flow, sizes[:: flow.interval(config.algorithm)] if flow.per == "batch" else [1]) for flow in flows]


def _turns(setup: Setup, rounds: Iterable[int]) -> Iterator[tuple[int, int, int | None]]:
    """Each client's rounds: the round, the client, and its round before."""
    seen: dict[int, int] = {}
    for round in rounds:
        for client in setup.cohort(round):
            yield round, client, seen.get(client)
            seen[client] = round


def _own_sizes(setup: Setup, rounds: Iterable[int]) -> Iterator[dict[str, int]]:
    """For each client's round the bytes of the fields of which the method alone knows the size."""
    method = setup.algorithm
    for round, client, before in _turns(setup, rounds):
        if issubclass(method, OwnSizes):
            cohorts = [setup.cohort(each) for each in range(round + 1)]
            yield {**method.field_bytes(setup.blueprint, ClientRound(client, cohorts, before))}
        else:
            yield {}


def part_bytes(setup: Setup, *, whole: bool) -> dict[str, int]:
    """Bytes of each part's state: whole, or as it travels under ``aggregate.buffers``.

    Control variates are of parameters only.
    """
    blueprint = setup.blueprint
    sizes: dict[str, int] = {}
    for name, state in blueprint.initial.items():
        parameters = state_bytes(
            {key: value for key, value in state.items() if key not in blueprint.buffer_names[name]}
        )
        sizes[name] = state_bytes(state) if whole or blueprint.buffers == "average" else parameters
        if name == "model":
            sizes["control"] = parameters
    return sizes


def crossing_bytes(setup: Setup) -> dict[str, int]:
    """Bytes for one sample, or of text for one token, of what comes out at each cut.

    ``smashed`` is at the first, ``body_output`` at the second.

    A cut that the model does not have gives 0.
    """
    sizes = {"smashed": 0, "body_output": 0}
    whole = setup.algorithm.layout.whole
    if not setup.algorithm.layout.cut:
        return sizes
    device, dtype = setup.device, setup.blueprint.dtype
    x: Any = sample(setup.dataset.info.shape, _SAMPLES, dtype=dtype, device=device)
    with torch.no_grad(), setup.blueprint.autocast(), rng.TorchStream(0, device):
        for field, part in zip(sizes, setup.blueprint.parts(whole[:-1]).values(), strict=False):
            x = part(x)
            places = _SAMPLES * max(1, setup.dataset.info.length)
            sizes[field] = sum(payload_bytes(value) for value in tensors(x)) // places
    return sizes
