"""What a run's folder holds of generated text: what it is worth, by setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cutlayer.plotting.content import read_file, reason
from cutlayer.plotting.personalized import is_number, setting_folders
from cutlayer.runtime.ground.files import GENERATED, SUMMARY
from cutlayer.runtime.ground.reading import MissingError, read_json
from cutlayer.runtime.ground.text import one_line

_BYTES = 1 << 20
_MOST, _LONGEST = 64, 40
"""Metrics of one setting, and characters of a metric's name."""


@dataclass(frozen=True)
class Generation:
    """Texts of one setting.

    Attributes:
        setting: how they were generated. round: after which round of training.
        prompts, references: how many. metrics: figures by name; more is better.
    """

    setting: str
    round: int
    prompts: int
    references: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Generations:
    """All settings of a run, by name; and those that cannot be read, with the reason."""

    found: dict[str, Generation] = field(default_factory=dict[str, Generation])
    damaged: dict[Path, str] = field(default_factory=dict[Path, str])


def read_generated(folder: Path) -> Generations:
    """Read every finished setting below a run's folder; what has no summary or is not finished is left out."""
    generations = Generations()
    for place in setting_folders(folder / GENERATED, generations.damaged):
        try:
            summary = read_file(read_json, place, SUMMARY, _BYTES)
            if summary.get("finished") is True:
                found = _measured(one_line(place.name), summary)
                generations.found[found.setting] = found
        except MissingError:
            continue
        except ValueError as error:
            generations.damaged[place] = f"{SUMMARY}: {reason(error)}"
    return generations


def _measured(setting: str, summary: dict[str, Any]) -> Generation:
    """The record of a summary.

    Raises:
        ValueError: what is wrong with it.
    """
    for name in ("round", "prompts", "references"):
        value = summary.get(name)
        if type(value) is not int or not 0 <= value < 1 << 60:
            raise ValueError(f"{name} is no whole number from 0")
    metrics = summary.get("metrics")
    if not isinstance(metrics, dict) or len(metrics) > _MOST:
        raise ValueError(f"metrics are no figures by name, {_MOST} at most")
    for name, value in metrics.items():
        if not name.isidentifier() or len(name) > _LONGEST:
            raise ValueError("metrics hold a name that is none of a metric")
        if not is_number(value):
            raise ValueError(f"metrics.{name} is no number")
    figures = {name: float(value) for name, value in metrics.items()}
    return Generation(setting, summary["round"], summary["prompts"], summary["references"], figures)
