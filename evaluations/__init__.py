"""The registry of evaluations: what a round's test measures beside accuracy and loss, `evaluations=[<name>]`.

Every module of this package is imported, so that a new file registers itself.
"""

from __future__ import annotations

if __name__ != "cutlayer.evaluations":
    from cutlayer.names import refuse

    refuse(__name__)

import math
from collections.abc import Callable, Iterable, Mapping

from cutlayer.datasets import DatasetInfo
from cutlayer.runtime.ground.registry import Registry, import_modules
from cutlayer.tasks import Score, task_of

Evaluate = Callable[[Score, DatasetInfo], Mapping[str, float]]
"""Gives figures by name, of samples that were tested: at least one, perhaps of some of the classes only."""

EVALUATIONS: Registry[Evaluate] = Registry("evaluation")


def register(name: str) -> Callable[[Evaluate], Evaluate]:
    """Register the decorated function as evaluation `name`; a figure that it calls `k` is the metric `name/k`.

    Figures that are not finite are left out. What is a share of samples, from 0 to 1, has a name that ends in `acc`,
    and is shown in percent.
    """

    def add(evaluate: Evaluate) -> Evaluate:
        EVALUATIONS.add(name, evaluate)
        return evaluate

    return add


def measure(names: Iterable[str], score: Score, info: DatasetInfo) -> dict[str, float]:
    """The metrics of the task and of these evaluations, on samples that were tested."""
    found = {**task_of(info).figures(score)}
    for name in names:
        found |= {f"{name}/{key}": float(value) for key, value in EVALUATIONS[name](score, info).items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


import_modules(__name__, __path__)
