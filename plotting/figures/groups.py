"""Runs of one method that differ in a swept key only, put together again, and the axis of such a key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from cutlayer.plotting.curves import Curve, best_values, final_values, make_curves
from cutlayer.plotting.figures.layout import text_width, wrapped
from cutlayer.plotting.measures import marked, measured
from cutlayer.plotting.runs import Run
from cutlayer.plotting.style import method_style, shortened

ALPHA_KEY = "dataset.alpha"
DISTRIBUTION = "dataset.distribution"
AXES_WIDTH = 5.2
"""Inches that the axes of a figure of the house's width have at least."""
_TICK = 9.0
_LOG_RATIO = 10.0
# Numbers beyond it, and those that are none, have no place to scale.
_LARGEST = 1e100

_RATES = ("lr", "optimizer.lr")
_KEYS = {
    "algorithm.align_interval": "alignment interval (rounds)",
    "algorithm.upload_interval": "upload interval (local steps)",
    "algorithm.buffer_size": "buffer size (samples)",
    "model.auxiliary.size": "size of the auxiliary model",
    "model.cut": "cut layer",
    "model.name": "model",
    "dataset.name": "dataset",
    **dict.fromkeys(_RATES, "learning rate"),
    "num_clients": "clients",
    "frac": "share of clients in each round",
    "batch_size": "batch size",
    "local_epochs": "local epochs",
}


@dataclass(frozen=True)
class Group:
    """Runs of one method that are alike but for the keys that were left aside, and for the seed.

    method, label, variant, metric: as in `Curve`, for what still differs within the method.
    """

    method: str
    label: str
    variant: int
    runs: tuple[Run, ...]
    metric: str

    @property
    def name(self) -> str:
        """For a legend."""
        name = method_style(self.method).label
        return marked(f"{name}, {self.label}" if self.label else name, measured(self.runs[0], self.metric))

    def split(self, key: Callable[[Run], Hashable]) -> dict[Any, list[Run]]:
        """The runs by the value that `key` gives them."""
        parts: dict[Any, list[Run]] = {}
        for run in self.runs:
            parts.setdefault(key(run), []).append(run)
        return parts


def grouped(curves: Sequence[Curve], keys: Collection[str]) -> list[Group]:
    """The runs of the curves, grouped as if the given keys of the configuration did not exist."""
    originals = {run.folder: run for curve in curves for run in curve.runs}
    blind = [
        replace(run, config={key: value for key, value in run.flat.items() if key not in keys})
        for run in originals.values()
    ]
    metric = curves[0].metric if curves else "test_acc"
    return [
        Group(each.method, each.label, each.variant, tuple(originals[run.folder] for run in each.runs), metric)
        for each in make_curves(blind, metric)
    ]


def swept_key(curves: Sequence[Curve]) -> str | None:
    """The one key, besides how data is spread, in which the runs of a method differ; None where it is not one."""
    found: set[str] = set()
    by_method: dict[tuple[str, str], list[Run]] = {}
    for curve in curves:
        by_method.setdefault((curve.method, curve.runs[0].code), []).append(curve.runs[0])
    for runs in by_method.values():
        names = {key for run in runs for key in run.setting} - {ALPHA_KEY, DISTRIBUTION}
        values = {key: tuple(run.setting.get(key) for run in runs) for key in names}
        found |= {key for key in names if len(set(values[key])) > 1}
    return found.pop() if len(found) == 1 else None


def followers(key: str) -> set[str]:
    """A swept key and the one that has its value by default, or whose value it has."""
    return set(_RATES) if key in _RATES else {key}


def statistics(runs: Sequence[Run], metric: str) -> tuple[float, float, float]:
    """Mean over seeds of the final and of the best value of a metric, and the standard deviation of the final one."""
    rounds = bytes_ = np.zeros(1)
    curve = Curve("", "", 0, tuple(runs), rounds, bytes_, None, rounds, rounds, metric)
    final, best = final_values(curve), best_values(curve)
    known = final[np.isfinite(final)]
    mean = float(known.mean()) if len(known) else math.nan
    top = float(np.nanmean(best)) if np.isfinite(best).any() else math.nan
    return mean, top, float(known.std()) if len(known) else math.nan


def key_label(key: str) -> str:
    """A key of the configuration in plain words; one that is not known by its own name."""
    return _KEYS.get(key, shortened(key))


@dataclass(frozen=True)
class Scale:
    """Where the values of a swept key lie on an axis: [n] positions in rising order, values and their text."""

    values: tuple[Any, ...]
    positions: tuple[float, ...]
    texts: tuple[str, ...]
    numeric: bool

    def at(self, value: Any) -> float:
        """The position of one of the values."""
        return self.positions[self.values.index(value)]


def scale_of(values: Collection[Any], order: Callable[[Any], Any]) -> Scale:
    """Numbers lie to scale (to the logarithm where they span a decade), anything else side by side in a given order."""
    numeric = all(type(value) in (int, float) and abs(value) < _LARGEST for value in values)
    found = tuple(sorted(values, key=None if numeric else order))
    texts = tuple(f"{value:g}" if numeric else value_text(value) for value in found)
    if not numeric:
        return Scale(found, tuple(map(float, range(len(found)))), texts, numeric)
    logarithmic = found[0] > 0 and found[-1] >= _LOG_RATIO * found[0]
    return Scale(found, tuple(math.log10(v) if logarithmic else float(v) for v in found), texts, numeric)


def value_text(value: Any) -> str:
    """A value of the configuration for people; a key that is left to itself is "default"."""
    text = "default" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return shortened(text)


def put_ticks(axes: Axes, positions: Sequence[float], texts: Sequence[str], width: float = AXES_WIDTH) -> int:
    """Ticks at given places of the x axis, with their texts where they find room; returns the lines they take.

    Texts that are wider than the distance of neighbours are wrapped; of those that still touch every other is left out.
    """
    low, high = min(positions), max(positions)
    margin = 0.08 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)
    per_inch = (high - low + 2 * margin) / width
    places = [position / per_inch for position in positions]
    nearest = min((b - a for a, b in pairwise(places)), default=width)
    slot = max(nearest - 0.08, 0.45)
    shown: list[str] = []
    end = -math.inf
    for place, text in zip(places, texts, strict=True):
        lines = wrapped(text, min(slot, width / 2), _TICK)
        half = max(text_width(line, _TICK) for line in lines.split("\n")) / 2
        free = place - half >= end + 0.06
        end = place + half if free else end
        shown.append(lines if free else "")
    axes.xaxis.set_major_locator(FixedLocator(list(positions)))
    axes.set_xticks(list(positions), shown)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    return max(text.count("\n") + 1 for text in shown)
