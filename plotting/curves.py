"""Curves: runs of one setting averaged over seeds, and what is read off them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutlayer.plotting.content import METRIC_NAMES
from cutlayer.plotting.measures import competing, measured
from cutlayer.plotting.runs import SPREAD_KEYS, Run, short
from cutlayer.plotting.style import shortened
from cutlayer.plotting.timing import Array, Link

_MOST_POINTS = 4000
"""Of a curve that is drawn: more than a screen has places for."""
# What decides is `optimizer.lr`, which has the value of `lr` unless it is set apart: it is called the same.
_RATE, _LR = "optimizer.lr", "lr"
_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


@dataclass(frozen=True)
class Curve:
    """One method's metric by round, by bytes and by simulated time, averaged over the seeds of one setting.

    Attributes:
        method: registered name. label: what distinguishes it from other settings of the same method, or "".
        variant: 0 for the first setting of its method in a group, 1 for the next, ...
        runs: what was averaged.
        rounds, bytes: [n], of many thousand evaluations at some of them; bytes are cumulative payload.
        seconds: [n] simulated seconds so far, or None where a run lacks what it takes.
        value, deviation: [n] the metric's mean and population standard deviation over seeds. An evaluation that gave
            no finite number is NaN.
        metric: its name, as in `Run.series`.
    """

    method: str
    label: str
    variant: int
    runs: tuple[Run, ...]
    rounds: Array
    bytes: Array
    seconds: Array | None
    value: Array
    deviation: Array
    metric: str

    @property
    def sends(self) -> bool:
        """Whether the method communicates at all."""
        return bool(self.bytes[-1] > 0)


def make_curves(
    runs: Sequence[Run], metric: str = "test_acc", without_fields: tuple[str, ...] = (), link: Link | None = None
) -> list[Curve]:
    """The curves of a group of runs, by method and within it by setting, in order of their names.

    Args:
        runs: runs that shall be compared.
        metric: as in `Run.series`.
        without_fields: as in `Run.bytes`.
        link: of every client, for simulated time; None: `Link()`.

    Raises:
        ValueError: a run has no such metric.
    """
    settings: dict[tuple[str, str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.method, run.code)):
        settings.setdefault((run.method, run.code, str(sorted(run.setting.items()))), []).append(run)
    ordered = sorted(settings.items(), key=lambda item: [_natural(text) for text in item[0]])
    mixed = len({run.code for run in runs}) > 1
    curves: list[Curve] = []
    for method in dict.fromkeys(method for method, *_ in settings):
        variants = [group for (name, *_), each in ordered if name == method for group in _together(each)]
        labels = _labels([each[0] for each in variants], mixed)
        for variant, (each, label) in enumerate(zip(variants, labels, strict=True)):
            axes = (metric, without_fields, link or Link())
            curves.append(Curve(method, label, variant, tuple(each), **_average(each, *axes), metric=metric))
    return curves


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better: not for losses, perplexities, errors and how much clients differ."""
    return not metric.endswith(("loss", "perplexity", "/std")) and "error" not in metric


def _average(runs: Sequence[Run], metric: str, without_fields: tuple[str, ...], link: Link) -> dict[str, Any]:
    # Only rounds that every seed reached: a mean over fewer seeds would jump where one of them stops.
    rounds = sorted(set.intersection(*(set(run.results["rounds"]) for run in runs)))
    at = [np.searchsorted(run.results["rounds"], rounds) for run in runs]

    def picked(columns: Sequence[Any]) -> Array:
        return np.asarray([np.asarray(column, np.float64)[each] for column, each in zip(columns, at, strict=True)])

    values = picked([run.series(metric) for run in runs])
    seconds = [run.seconds(link) for run in runs]
    found: dict[str, Array | None] = {
        "rounds": np.asarray(rounds, dtype=np.float64),
        "bytes": picked([run.bytes(without_fields) for run in runs]).mean(axis=0),
        "seconds": None if any(each is None for each in seconds) else picked(seconds).mean(axis=0),
        "value": (mean := values.mean(axis=0)),
        "deviation": values.std(axis=0),
    }
    kept = _kept(mean)
    return {name: None if each is None else each[kept] for name, each in found.items()}


def _kept(values: Array) -> NDArray[np.intp]:
    """Where a curve [n] is drawn: everywhere, or if it is very long at the highest and lowest place of each stretch."""
    if len(values) <= _MOST_POINTS:
        return np.arange(len(values))
    low, high = np.where(np.isnan(values), np.inf, values), np.where(np.isnan(values), -np.inf, values)
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), _MOST_POINTS // 2):
        kept |= {int(part[low[part].argmin()]), int(part[high[part].argmax()])}
    return np.asarray(sorted(kept))


def _together(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of one setting as one group; each alone where they have no evaluated round in common."""
    common = set.intersection(*(set(run.results["rounds"]) for run in runs))
    return [list(runs)] if common else [[run] for run in runs]


def _labels(runs: Sequence[Run], mixed: bool) -> list[str]:
    """For each run what distinguishes it from the others; `mixed` says that runs of several programs are compared."""
    labels = [""] * len(runs)
    for code in dict.fromkeys(run.code for run in runs):
        # Settings of different programs are not compared: they share few keys.
        at = [index for index, run in enumerate(runs) if run.code == code]
        for index, label in zip(at, _differences([runs[index] for index in at]), strict=True):
            labels[index] = ", ".join(text for text in (f"{code}'s code" if mixed and code else "", label) if text)
    return labels


def _differences(runs: Sequence[Run]) -> list[str]:
    """For each run, the keys in which it differs from the others, e.g. "lr=0.01, rounds=50"; "" for a single one."""
    names = {key for run in runs for key in run.setting}
    values = {key: tuple(run.setting.get(key) for run in runs) for key in names}
    keys = sorted((key for key in names if len(set(values[key])) > 1), key=lambda key: _LR if key == _RATE else key)
    if not keys and len(runs) > 1:
        return [f"seed={short(run.get('seed'))}" for run in runs]
    # The distribution and the settings that shape it are one thing: "Dirichlet α=0.1".
    others = [key for key in keys if key not in SPREAD_KEYS]
    reported = [[run.distribution_label] if len(others) < len(keys) else [] for run in runs]
    each = [
        [f"{_short(key)}={short(json.loads(run.setting[key]))}" for key in others if key in run.setting] for run in runs
    ]
    return [", ".join(spread + rest) for spread, rest in zip(reported, each, strict=True)]


def _natural(text: str) -> list[Any]:
    """A key that sorts numbers in a text by their size."""
    parts = _NUMBER.split(text)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def _short(key: str) -> str:
    """The key as in a legend: "model" for "model.name", "upload_interval" for "algorithm.upload_interval"."""
    if key == _RATE:
        return _LR
    return shortened(key.removesuffix(".name") if key.endswith(".name") else key.removeprefix("algorithm."))


def final_values(curve: Curve) -> Array:
    """The last evaluation of each seed [seeds]; of a metric that is not measured each time, its last measurement."""
    found: list[float] = []
    for run in curve.runs:
        values = run.series(curve.metric)
        measured = values if curve.metric in METRIC_NAMES else values[~np.isnan(values)]
        found.append(float(measured[-1]) if len(measured) else math.nan)
    return np.asarray(found)


def best_values(curve: Curve) -> Array:
    """The best evaluation of each seed [seeds]; NaN for one without a finite evaluation."""
    best = np.nanmax if higher_is_better(curve.metric) else np.nanmin
    found = [run.series(curve.metric) for run in curve.runs]
    return np.asarray([np.nan if np.isnan(each).all() else best(each) for each in found])


def values_at_budget(curve: Curve, budget: float, without_fields: tuple[str, ...] = ()) -> Array:
    """Each seed's last evaluation that came with at most `budget` bytes [seeds]; NaN where the first one cost more.

    A metric that is not measured each time gives its last measurement until then.
    """
    found: list[float] = []
    for run in curve.runs:
        within = np.asarray(run.bytes(without_fields)) <= budget
        values = run.series(curve.metric)[within]
        measured = values if curve.metric in METRIC_NAMES else values[~np.isnan(values)]
        found.append(float(measured[-1]) if len(measured) else math.nan)
    return np.asarray(found)


def total_bytes(curve: Curve, without_fields: tuple[str, ...] = ()) -> Array:
    """Bytes that each seed sent in all [seeds]."""
    return np.asarray([run.bytes(without_fields)[-1] for run in curve.runs], dtype=np.float64)


def bytes_to_reach(curve: Curve, target: float, without_fields: tuple[str, ...] = ()) -> list[int | None]:
    """Bytes that each seed had sent at its first evaluation at least as good as `target`; None if never."""
    needed: list[int | None] = []
    for run in curve.runs:
        values = run.series(curve.metric)
        reached = np.flatnonzero(values >= target if higher_is_better(curve.metric) else values <= target)
        needed.append(run.bytes(without_fields)[int(reached[0])] if len(reached) else None)
    return needed


def default_target(curves: Sequence[Curve]) -> float | None:
    """What the best method that communicates reaches with a little to spare; None where no such value makes sense.

    Of a metric of which more is better 95% of the best value, rounded down to a whole percent; of one of which less is
    better the best value and 5% of it, rounded up to two digits.
    """
    able = [curve for curve in curves if curve.sends and _has_number(curve)]
    measures = [measured(curve.runs[0], curve.metric) for curve in able]
    rank = competing(measures) or measures
    found = [float(np.nanmean(best_values(curve))) for curve, each in zip(able, measures, strict=True) if each in rank]
    if not found:
        return None
    if higher_is_better(curves[0].metric):
        return math.floor(95 * max(found) + 1e-9) / 100 if max(found) > 0 else None
    if min(found) <= 0:
        return None
    digit = 10.0 ** (math.floor(math.log10(1.05 * min(found))) - 1)
    return float(f"{math.ceil(1.05 * min(found) / digit - 1e-9) * digit:.2g}")


def default_budget(curves: Sequence[Curve], without_fields: tuple[str, ...] = ()) -> float | None:
    """The bytes of the run that sent the least among those that communicate: every run has a value there."""
    totals = [float(total) for curve in curves for total in total_bytes(curve, without_fields) if total > 0]
    return min(totals, default=None)


def _has_number(curve: Curve) -> bool:
    return bool(np.isfinite(best_values(curve)).any())
