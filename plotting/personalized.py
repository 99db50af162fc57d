"""What a run's folder holds of personalisation: accuracy of every client's own fine-tuned model, by epochs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from cutlayer.plotting.content import read_file, reason
from cutlayer.runtime.ground.files import PERSONALIZED, SUMMARY
from cutlayer.runtime.ground.reading import MissingError, read_json

_BYTES = 4 << 20
# Of one evaluation: numbers of epochs, and bins of a histogram.
_MOST, _LAST = 1000, 10**9
_ACCURACIES = ("mean", "std", "worst_decile")
# What else a way to fine-tune is told by, where it is not what it usually is; earlier versions had nothing else.
_USUAL = {"start": "final", "objective": "cross_entropy"}


@dataclass(frozen=True)
class Point:
    """Accuracy of the clients' models after so many epochs of fine-tuning, as fractions.

    Attributes:
        epochs: 0 for the model as it was trained.
        mean, std, worst: over clients the mean, the population standard deviation, and the mean of the worst tenth.
        edges, shares: [bins + 1], [bins]; the share of the clients whose accuracy lies between two edges. Both are
            empty where several histograms with different edges were to be averaged.
    """

    epochs: int
    mean: float
    std: float
    worst: float
    edges: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class FineTuning:
    """One way to fine-tune, evaluated on the clients of one run.

    Attributes:
        part: what of the model was fine-tuned, e.g. "full", or "full, start=best". lr: learning rate of fine-tuning.
        round: after which round of training. clients: how many were evaluated.
        points: by number of epochs, rising.
    """

    part: str
    lr: float
    round: int
    clients: int
    points: dict[int, Point]


@dataclass(frozen=True)
class Evaluations:
    """All evaluations of a run, by part and learning rate; and those that cannot be read, with the reason."""

    found: tuple[FineTuning, ...] = ()
    damaged: dict[Path, str] = field(default_factory=dict[Path, str])


def read_personalized(folder: Path) -> Evaluations:
    """Read every finished evaluation below a run's folder; what has no summary or is not finished is left out.

    Evaluations of the same part and learning rate are one: those after the latest round count. Where several of these
    hold a number of epochs, the one with most numbers of epochs has it.
    """
    evaluations = Evaluations()
    found: list[FineTuning] = []
    for setting in setting_folders(folder / PERSONALIZED, evaluations.damaged):
        try:
            summary = read_file(read_json, setting, SUMMARY, _BYTES)
        except MissingError:
            continue
        except ValueError as error:
            evaluations.damaged[setting] = reason(error)
            continue
        if summary.get("finished") is not True:
            continue
        try:
            found.append(_checked(summary))
        except ValueError as error:
            evaluations.damaged[setting] = f"{SUMMARY}: {reason(error)}"
    return Evaluations(tuple(_merged(found)), evaluations.damaged)


def setting_folders(folder: Path, damaged: dict[Path, str]) -> list[Path]:
    """The folders in one of a run's, one for each setting, sorted; ``damaged`` gets why they cannot be listed."""
    try:
        return [
            folder / name
            for name in sorted(os.listdir(folder))
            if not name.startswith(".") and (folder / name).is_dir()
        ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        damaged[folder] = reason(error)
        return []


def _checked(summary: dict[str, Any]) -> FineTuning:
    """The record of a summary.

    Raises:
        ValueError: what is wrong with it.
    """
    part, lr, round_, clients = (summary.get(name) for name in ("part", "lr", "round", "clients"))
    if not isinstance(part, str) or not part or len(part) > 100:
        raise ValueError("part is no name")
    if not is_number(lr):
        raise ValueError("lr is no number")
    if type(round_) is not int or round_ < 0:
        raise ValueError("round is no number of a round")
    if type(clients) is not int or clients < 1:
        raise ValueError("no client was evaluated")
    epochs = summary.get("epochs")
    if not isinstance(epochs, list) or not epochs or set(map(type, epochs)) != {int} or min(epochs) < 0:
        raise ValueError("epochs is no list of whole numbers from 0")
    if len(epochs) > _MOST or max(epochs) > _LAST:
        raise ValueError(f"epochs are more than {_MOST} numbers, or go beyond {_LAST}")
    if len(set(epochs)) < len(epochs):
        raise ValueError("epochs holds a number twice")
    columns = [_shares_of_one(summary, name, len(epochs)) for name in _ACCURACIES]
    edges, shares = _histogram(summary.get("histogram"), len(epochs))
    rows = zip(epochs, *columns, shares, strict=True)
    others = [f"{key}={summary[key]}" for key, usual in _USUAL.items() if summary.get(key, usual) != usual]
    if any(len(each) > 40 for each in others):
        raise ValueError("start or objective is no word")
    part = ", ".join([part, *others])
    points = {count: Point(count, mean, std, worst, edges, each) for count, mean, std, worst, each in sorted(rows)}
    return FineTuning(part, float(lr), round_, clients, points)


def _shares_of_one(summary: dict[str, Any], name: str, length: int) -> list[float]:
    values = summary.get(name)
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(f"{name} is no list of {length} entries, one for each of epochs")
    for value in values:
        if not is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{name} holds {value!r:.40}, which is no fraction")
    return [float(value) for value in values]


def _histogram(histogram: Any, length: int) -> tuple[tuple[float, ...], list[tuple[float, ...]]]:
    """Edges [bins + 1] and for each of epochs the share of the clients in each bin."""
    edges, counts = (histogram.get(key) for key in ("edges", "counts")) if isinstance(histogram, dict) else (None, None)
    if not isinstance(edges, list) or len(edges) < 2 or not all(map(is_number, edges)) or min(np.diff(edges)) <= 0:
        raise ValueError("histogram.edges are no rising numbers")
    if len(edges) > _MOST or edges[0] < 0 or edges[-1] > 1:
        raise ValueError(f"histogram.edges are more than {_MOST}, or no fractions")
    if not isinstance(counts, list) or len(counts) != length:
        raise ValueError(f"histogram.counts is no list of {length} entries, one for each of epochs")
    for row in counts:
        fits = isinstance(row, list) and len(row) == len(edges) - 1 and set(map(type, row)) == {int}
        if not fits or min(row) < 0 or not 0 < sum(row) <= sys.maxsize:
            raise ValueError(f"histogram.counts has a row that is no {len(edges) - 1} numbers of clients")
    shares: list[tuple[float, ...]] = [tuple(count / total for count in row) for row in counts if (total := sum(row))]
    return tuple(map(float, edges)), shares


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a file is a number that can be computed with."""
    # A whole number of any length is JSON, but not every one is a float.
    return type(value) in (int, float) and abs(value) <= 1e100


def _merged(found: Sequence[FineTuning]) -> list[FineTuning]:
    by_setting: dict[tuple[str, float], list[FineTuning]] = {}
    for each in sorted(found, key=lambda each: (each.round, len(each.points))):
        by_setting.setdefault((each.part, each.lr), []).append(each)
    merged: list[FineTuning] = []
    for (part, lr), same in sorted(by_setting.items()):
        last = same[-1]
        latest = [each for each in same if each.round == last.round]
        points = {count: point for each in latest for count, point in each.points.items()}
        merged.append(FineTuning(part, lr, last.round, last.clients, dict(sorted(points.items()))))
    return merged
