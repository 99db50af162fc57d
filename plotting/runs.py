"""Finding finished runs below a folder and reading what they left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from runtime.results import RESULTS

ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
# The settings that shape a distribution; others are without effect on it and are not told.
_SHAPES = {
    "noniid_dirichlet": {"alpha": ALPHA},
    "dirichlet": {"alpha": ALPHA},
    "quantity_skew": {"alpha": ALPHA},
    "shards": {"classes_per_client": "classes per client"},
    "class_major": {"major_share": "major share"},
}
_DISTRIBUTIONS = {
    "iid": "IID",
    "noniid_dirichlet": "Dirichlet",
    "dirichlet": "Dirichlet, unequal sizes",
    "shards": "shards",
    "class_major": "majority class",
    "quantity_skew": "quantity skew",
}
# Keys that do not decide a run's result, or repeat for averaging.
_IRRELEVANT = ("seed", "save_dir", "resume", "logger", "checkpoint_interval", "progress", "device", "transport")
_SERIES = ("rounds", "test_acc", "test_loss", "comm_load", "comm_up", "comm_down")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its resolved configuration and its `results.json`."""

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key of the configuration, e.g. "dataset.alpha"."""
        return self.flat.get(key, default)

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The configuration with dotted keys; lists and empty mappings are values."""
        return dict(_flatten(self.config))

    @property
    def method(self) -> str:
        """The algorithm's registered name."""
        return str(self.get("algorithm.name"))

    @property
    def distribution(self) -> str:
        """How the data is spread over clients, e.g. "noniid_dirichlet-alpha=0.1"; with what has an effect only."""
        name = str(self.get("dataset.distribution"))
        return "-".join([name, *(f"{key}={self.get(f'dataset.{key}')}" for key in _SHAPES.get(name, {}))])

    @property
    def distribution_label(self) -> str:
        """The same for people, e.g. "Dirichlet α=0.1"."""
        name = str(self.get("dataset.distribution"))
        shape = [f"{label}={self.get(f'dataset.{key}')}" for key, label in _SHAPES.get(name, {}).items()]
        return " ".join([_DISTRIBUTIONS.get(name, name), ", ".join(shape)]).strip()

    @cached_property
    def setting(self) -> dict[str, Any]:
        """Everything that may explain a difference between two runs, but the seed; values as text."""
        shapes = {f"dataset.{key}" for keys in _SHAPES.values() for key in keys}
        effective = {f"dataset.{key}" for key in _SHAPES.get(str(self.get("dataset.distribution")), {})}
        ignored = (shapes - effective) | {"dataset.root", "dataset.storage", "dataset.workers"}
        return {
            key: json.dumps(value, default=str)
            for key, value in self.flat.items()
            if key.split(".")[0] not in _IRRELEVANT and key not in ignored
        }

    def bytes(self, without_fields: tuple[str, ...] = ()) -> list[int]:
        """Cumulative payload bytes of training at each evaluated round.

        Args:
            without_fields: message fields that are not counted, e.g. ("y",) to leave out labels as some papers do.
        """
        load = list(self.results["comm_load"])
        for name, counts in self.results.get("traffic", {}).items():
            if name.split("/", 2)[-1] in without_fields:
                load = [total - count for total, count in zip(load, counts, strict=True)]
        return load


@dataclass(frozen=True)
class Found:
    """What lies below a folder: finished runs, unfinished ones, and damaged ones with the reason, by path."""

    runs: list[Run]
    unfinished: list[Path]
    damaged: dict[Path, str]


def find_runs(saves: Path) -> Found:
    """Read every run below `saves`: every folder that holds a `config.yaml` and a `results.json`.

    Of finished runs with the same setting and the same seed only the latest is kept.
    """
    unfinished: list[Path] = []
    damaged: dict[Path, str] = {}
    latest: dict[tuple[str, str], tuple[float, Run]] = {}
    for config in sorted(saves.rglob("config.yaml")):
        folder = config.parent
        path = folder / RESULTS
        if not path.exists():
            unfinished.append(folder)
            continue
        try:
            run = read_run(folder)
            written = path.stat().st_mtime
        except (OSError, ValueError, yaml.YAMLError) as error:
            damaged[folder] = " ".join(str(error).split())
            continue
        if not run.results.get("finished", True):
            unfinished.append(folder)
            continue
        key = (json.dumps(run.setting, sort_keys=True), str(run.get("seed")))
        if key not in latest or latest[key][0] <= written:
            latest[key] = (written, run)
    runs = sorted((run for _, run in latest.values()), key=lambda run: run.folder)
    return Found(runs, unfinished, damaged)


def read_run(folder: Path) -> Run:
    """Read one run.

    Raises:
        ValueError: a file is not what it should be; the text says which and why.
        OSError, yaml.YAMLError: a file cannot be read.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{RESULTS}: {error}") from None
    if not isinstance(config, dict) or not isinstance(results, dict):
        raise ValueError(f"{'config.yaml' if not isinstance(config, dict) else RESULTS} holds no mapping")
    run = Run(folder, config, results)
    for key in ("algorithm.name", "model.name", "dataset.name", "dataset.distribution"):
        if run.get(key) is None:
            raise ValueError(f"config.yaml has no {key}")
    for name in _SERIES:
        if not isinstance(results.get(name), list):
            raise ValueError(f"{RESULTS} has no list {name}")
        if len(results[name]) != len(results["rounds"]):
            raise ValueError(f"{RESULTS}: {name} has {len(results[name])} entries, rounds {len(results['rounds'])}")
    if not results["rounds"]:
        raise ValueError(f"{RESULTS} holds no evaluated round")
    return run


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat += _flatten(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return flat
