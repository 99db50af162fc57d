"""Whether clients are computed one by one or several as one (``cohort.together=auto``): both are tried, once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from cutlayer.datasets import Partition
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.parties.cohort import CohortConfig
from cutlayer.runtime.rounds.schedule import RoundLostError, RoundReport
from cutlayer.runtime.rounds.setup import Setup

# On a processor more clients leave its cache; on a GPU as many as there is room for.
_ON_A_PROCESSOR = (8, 16)
_STEPS = 2
_REPEATS = 3


class Side(Protocol):
    """One way of computing: rounds of clients and of a server of its own, which are of no run."""

    @property
    def groups(self) -> int:
        """How often several clients were computed as one so far."""
        ...

    def play(self, cohort: list[int], round: int) -> RoundReport: ...


MakeSide = Callable[[Setup], Side]


def choose(setup: Setup, cohort: int, room: int, make: MakeSide) -> tuple[int, float]:
    """How many clients are best computed as one, 1 where one by one is faster, and how many times as fast that is.

    Args:
        cohort: clients of a round. room: of how many there is memory for. make: a way of computing a setup.
    """
    most = max(1, min(cohort, room))
    sizes = sorted({min(size, most) for size in _ON_A_PROCESSOR}) if setup.device.type == "cpu" else [most]
    best, gain = 1, 1.0
    for size in (size for size in sizes if size > 1):
        found = _gain(setup, size, make)
        if found > gain:
            best, gain = size, found
    return best, gain


def _gain(setup: Setup, size: int, make: MakeSide) -> float:
    """How many times as fast so many clients are as one, in rounds of two steps, the two ways in turn."""
    few = _few_steps(setup, size)
    alone, several = make(few(CohortConfig())), make(few(CohortConfig(size)))
    cohort, ratios = [*range(size)], list[float]()
    try:
        for repeat in range(_REPEATS + 1):
            order = (alone, several) if repeat % 2 else (several, alone)
            taken = {id(side): _seconds(setup.device, side, cohort, repeat) for side in order}
            ratios.append(taken[id(alone)] / taken[id(several)])
    except (ConfigError, RoundLostError):
        return 0.0  # no memory for so many, or a server that draws; what else is wrong is wrong one by one too
    if not several.groups:
        return 0.0
    return statistics.median(ratios[1:])  # the first was to warm up


def _seconds(device: torch.device, side: Side, cohort: list[int], round: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    side.play(cohort, round)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _few_steps(setup: Setup, clients: int) -> Callable[[CohortConfig], Setup]:
    """The setup with clients of two batches each, however many samples there are."""
    samples, each = len(setup.dataset.train), min(_STEPS * setup.config.batch_size, len(setup.dataset.train))
    order = np.concatenate(
        [np.arange(each, dtype=np.int64) + client % (samples - each + 1) for client in range(clients)]
    )
    population = max(setup.population, clients)
    offsets = np.minimum(np.arange(population + 1, dtype=np.int64), clients) * each
    shares = Partition(order, offsets)

    def made(cohort: CohortConfig) -> Setup:
        return setup.with_shares(replace(setup.config, local_epochs=1, cohort=cohort), shares)

    return made
