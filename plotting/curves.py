"""Curves: runs of one setting averaged over seeds, and what is read off them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plotting.runs import Run

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One method's accuracy by round and by bytes, averaged over the seeds of one setting.

    Attributes:
        method: registered name. label: what tells it from other settings of the same method, or "".
        variant: 0 for the first setting of its method in a group, 1 for the next, ...
        runs: what was averaged.
        rounds, bytes, accuracy, deviation: [n]; bytes are cumulative payload, accuracy a fraction, `deviation` its
            population standard deviation over seeds. An evaluation that gave no finite number is NaN.
    """

    method: str
    label: str
    variant: int
    runs: tuple[Run, ...]
    rounds: Array
    bytes: Array
    accuracy: Array
    deviation: Array

    @property
    def sends(self) -> bool:
        """Whether the method communicates at all."""
        return bool(self.bytes[-1] > 0)


def make_curves(runs: Sequence[Run], without_fields: tuple[str, ...] = ()) -> list[Curve]:
    """The curves of a group of runs, by method and within it by setting, in order of their names.

    Args:
        runs: runs that shall be compared.
        without_fields: as in `Run.bytes`.
    """
    settings: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.method):
        settings.setdefault((run.method, str(sorted(run.setting.items()))), []).append(run)
    curves: list[Curve] = []
    for method in dict.fromkeys(method for method, _ in settings):
        variants = [each for (name, _), each in sorted(settings.items()) if name == method]
        labels = _differences([each[0] for each in variants])
        for variant, (each, label) in enumerate(zip(variants, labels, strict=True)):
            curves.append(_average(method, label, variant, each, without_fields))
    return curves


def _average(method: str, label: str, variant: int, runs: Sequence[Run], without_fields: tuple[str, ...]) -> Curve:
    # Only rounds that every seed reached: a mean over fewer seeds would jump where one of them stops.
    rounds = sorted(set.intersection(*(set(run.results["rounds"]) for run in runs)))
    accuracy, load = [], []
    for run in runs:
        at = [run.results["rounds"].index(number) for number in rounds]
        values = [math.nan if value is None else value for value in run.results["test_acc"]]
        accuracy.append(np.asarray(values, dtype=np.float64)[at])
        load.append(np.asarray(run.bytes(without_fields), dtype=np.float64)[at])
    return Curve(
        method=method,
        label=label,
        variant=variant,
        runs=tuple(runs),
        rounds=np.asarray(rounds, dtype=np.float64),
        bytes=np.mean(load, axis=0),
        accuracy=np.mean(accuracy, axis=0),
        deviation=np.std(accuracy, axis=0),
    )


def _differences(runs: Sequence[Run]) -> list[str]:
    """For each run, the keys in which it differs from the others, e.g. "lr=0.01, rounds=50"; "" for a single one."""
    names = {key for run in runs for key in run.setting}
    values = {key: tuple(run.setting.get(key) for run in runs) for key in names}
    keys = sorted(key for key in names if len(set(values[key])) > 1)
    # `optimizer.lr` follows `lr` unless it is set apart: told once.
    keys = [key for key in keys if key == (top := key.rpartition(".")[2]) or values.get(top) != values[key]]
    return [", ".join(f"{_short(key)}={_text(run.get(key))}" for key in keys) for run in runs]


def _short(key: str) -> str:
    """The key as in a legend: "model" for "model.name", "upload_interval" for "algorithm.upload_interval"."""
    return key.removesuffix(".name") if key.endswith(".name") else key.removeprefix("algorithm.")


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def final_accuracies(curve: Curve) -> Array:
    """The last evaluation of each seed [seeds]."""
    return np.asarray([_numbers(run)[-1] for run in curve.runs])


def best_accuracies(curve: Curve) -> Array:
    """The best evaluation of each seed [seeds]; NaN for one without a finite evaluation."""
    found = [_numbers(run) for run in curve.runs]
    return np.asarray([np.nan if np.isnan(each).all() else np.nanmax(each) for each in found])


def bytes_to_reach(curve: Curve, target: float, without_fields: tuple[str, ...] = ()) -> list[int | None]:
    """Bytes that each seed had sent at its first evaluation with an accuracy of at least `target`; None if never."""
    needed: list[int | None] = []
    for run in curve.runs:
        reached = np.flatnonzero(_numbers(run) >= target)
        needed.append(run.bytes(without_fields)[int(reached[0])] if len(reached) else None)
    return needed


def default_target(curves: Sequence[Curve]) -> float | None:
    """95% of the best accuracy among the methods that communicate, rounded down to a whole percent."""
    best = [float(np.nanmean(best_accuracies(curve))) for curve in curves if curve.sends and _has_number(curve)]
    return math.floor(95 * max(best) + 1e-9) / 100 if best else None


def _numbers(run: Run) -> Array:
    return np.asarray([np.nan if value is None else value for value in run.results["test_acc"]], dtype=np.float64)


def _has_number(curve: Curve) -> bool:
    return bool(np.isfinite(best_accuracies(curve)).any())
