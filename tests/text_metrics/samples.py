"""The stored texts, and which metrics can be computed where the tests run."""

import json

import pytest

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.text_metrics import check_metrics, score
from cutlayer.text_metrics.files import read_hypotheses, read_references
from tests.places import ROOT

FOLDER = ROOT / "tests" / "text_metrics" / "e2e"
FIGURES: dict[str, dict[str, float]] = json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))
"""By sample and metric what the E2E script computed."""


def sample(name: str) -> tuple[list[str], list[list[str]]]:
    """Hypotheses and references."""
    return read_hypotheses(FOLDER / f"{name}_hypotheses.txt"), read_references(FOLDER / f"{name}_references.txt")


def figure(name: str, hypotheses: list[str], references: list[list[str]]) -> float:
    """One metric; the test is skipped where the metric lacks a package or a program."""
    try:
        check_metrics([name])
    except ConfigError as error:
        pytest.skip(str(error))
    return score([name], hypotheses, references)[name]
