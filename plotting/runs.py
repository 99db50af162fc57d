"""Finding finished runs below a folder and reading what they left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cutlayer.distributions import DISTRIBUTIONS
from cutlayer.plotting.content import METRIC_NAMES, RESULTS_BYTES, check_results, read_file, reason
from cutlayer.plotting.foreign import CODE, read_foreign
from cutlayer.plotting.generated import Generations, read_generated
from cutlayer.plotting.personalized import Evaluations, read_personalized
from cutlayer.plotting.style import shortened
from cutlayer.plotting.timing import Array, Link, simulated_time
from cutlayer.runtime.ground.files import RESULTS
from cutlayer.runtime.ground.reading import YAML_BYTES, MissingError, read_json, read_yaml
from cutlayer.runtime.ground.text import one_line

CONFIG = "config.yaml"
_OPEN = {"optimizer", "scheduler", "options"}

ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
SHAPING_KEYS = frozenset(f"dataset.{key}" for each in DISTRIBUTIONS.values() for key in each.shaping)
"""The keys that shape a distribution; those of another one are without effect and are not shown."""
SPREAD_KEYS = SHAPING_KEYS | {"dataset.distribution"}
"""The keys that together say how the data is spread over clients."""
_UNREADABLE = (OSError, ValueError, RecursionError)
# Beyond this a metric is as good as not finite, and sums and scales of it are no longer numbers.
_LARGEST = 1e100


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its resolved configuration and its `results.json`.

    `code` names the program that wrote it where it is another one, "FSL-SAGE" for instance, and is "" otherwise.
    `earlier` says that it is of a version that lacked keys of today, which have their defaults then.
    """

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]
    code: str = ""
    earlier: bool = False

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
        shape = (f"{key.rpartition('.')[2]}={short(self.get(f'dataset.{key}'))}" for key in self._shape)
        return "-".join([name, *shape])

    @property
    def distribution_label(self) -> str:
        """The same for people, e.g. "Dirichlet α=0.1"."""
        name = str(self.get("dataset.distribution"))
        shape = [f"{label}={short(self.get(f'dataset.{key}'))}" for key, label in self._shape.items()]
        label = DISTRIBUTIONS[name].label if name in DISTRIBUTIONS else name
        return " ".join([shortened(label), ", ".join(shape)]).strip()

    @property
    def alpha(self) -> float | None:
        """Dirichlet's alpha where the distribution has one."""
        value = self.get("dataset.alpha")
        is_one = "alpha" in self._shape and type(value) in (int, float) and 0 < value < _LARGEST
        return float(value) if is_one else None

    @property
    def is_even(self) -> bool:
        """Whether all clients have the same mixture of classes."""
        name = str(self.get("dataset.distribution"))
        return name in DISTRIBUTIONS and DISTRIBUTIONS[name].even

    @property
    def _shape(self) -> dict[str, str]:
        """The keys below `dataset` that shape the distribution, with their names for people."""
        name = str(self.get("dataset.distribution"))
        return DISTRIBUTIONS[name].shaping if name in DISTRIBUTIONS else {}

    @cached_property
    def setting(self) -> dict[str, Any]:
        """Everything that may explain a difference between two runs, but the seed; values as text."""
        return {key: json.dumps(_whole(value), default=str) for key, value in self._deciding().items() if key != "seed"}

    def _deciding(self) -> dict[str, Any]:
        """The keys that decided the result: as the run says, or as follows from its configuration."""
        if self.code:
            without_effect = SHAPING_KEYS - {f"dataset.{key}" for key in self._shape}
            return {key: value for key, value in self.flat.items() if key not in without_effect}
        if self.reported and not self.earlier:
            return {key: self.get(key) for key in self.reported}
        from cutlayer.runtime.settings import setting_in  # late: only runs of earlier versions need what takes torch

        return setting_in(_nested(self.flat))

    @property
    def reported(self) -> tuple[str, ...]:
        """The keys that decided the result by its own word; () where it has none, as runs of early versions."""
        keys = self.results.get("setting")
        return tuple(keys) if isinstance(keys, list) and all(isinstance(key, str) for key in keys) else ()

    def bytes(self, without_fields: tuple[str, ...] = ()) -> list[int]:
        """Cumulative payload bytes of training at each evaluated round.

        Args:
            without_fields: message fields that are not counted, e.g. ("y",) to leave out labels as some papers do.
        """
        load = list(self.results["comm_load"])
        for name, counts in self.results.get("traffic", {}).items():
            _, kind, field = name.split("/", 2)
            # What clients report of themselves is in no `comm_load`.
            if field in without_fields and kind != "metrics":
                load = [total - count for total, count in zip(load, counts, strict=True)]
        return load

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names that `series` takes."""
        return (*(name for name in METRIC_NAMES if name in self.results), *self.results.get("metrics", {}))

    def series(self, metric: str) -> Array:
        """A metric at the evaluated rounds [n]; NaN where it was not measured, or was not finite or beyond 1e100.

        Args:
            metric: "test_acc" (fraction), "test_loss", "train_loss", or a further metric such as "local_acc/mean".

        Raises:
            ValueError: the run has no such metric.
        """
        if metric not in self.metrics:
            raise ValueError(f"no metric {metric}; it has {', '.join(self.metrics)}")
        values = self.results[metric] if metric in METRIC_NAMES else self.results["metrics"][metric]
        series = np.asarray(values, dtype=np.float64)
        return np.where(np.abs(series) < _LARGEST, series, np.nan)

    @cached_property
    def personalized(self) -> Evaluations:
        """What its clients reach with models of their own, fine-tuned from what it trained; read once."""
        return Evaluations() if self.code else read_personalized(self.folder)

    @cached_property
    def generated(self) -> Generations:
        """What texts of its language model are worth; read once."""
        return Generations() if self.code else read_generated(self.folder)

    def seconds(self, link: Link) -> Array | None:
        """Simulated seconds so far at the evaluated rounds [n]; None where the run lacks what it takes."""
        return simulated_time(self.results, link)


@dataclass(frozen=True)
class Found:
    """What lies below a folder.

    Attributes:
        runs: finished runs by path; of those with the same setting and seed only the latest.
        older: the rest of them.
        unfinished, damaged: folders of runs that cannot be drawn, with the reason.
    """

    runs: list[Run] = field(default_factory=list)
    older: list[Run] = field(default_factory=list)
    unfinished: dict[Path, str] = field(default_factory=dict)
    damaged: dict[Path, str] = field(default_factory=dict)


def find_runs(*folders: Path) -> Found:
    """Read every run below the folders: each folder that holds a `config.yaml`, and those of FSL-SAGE's own code."""
    found = Found()
    finished: list[tuple[float, Run]] = []
    for folder, files in _run_folders(folders, found.damaged):
        try:
            if RESULTS not in files:
                found.unfinished[folder] = _state(folder)
                continue
            run = read_run(folder)
            written = (folder / RESULTS).stat().st_mtime
        except _UNREADABLE as error:
            found.damaged[folder] = reason(error)
            continue
        if not run.results.get("finished", True):
            found.unfinished[folder] = _state(folder)
            continue
        finished.append((written, run))
    latest: dict[tuple[str, str, str], tuple[float, Run]] = {}
    for written, run in _completed(finished):
        key = (run.code, json.dumps(run.setting, sort_keys=True), str(run.get("seed")))
        earlier = latest.get(key)
        if earlier is None or earlier[0] <= written:
            latest[key] = (written, run)
        found.older.extend([] if earlier is None else [earlier[1] if earlier[0] <= written else run])
    found.runs.extend(sorted((run for _, run in latest.values()), key=lambda run: run.folder))
    return found


def _completed(runs: Sequence[tuple[float, Run]]) -> Iterator[tuple[float, Run]]:
    """The same, with those marked as earlier that have no such key as decided another run of their method."""
    deciding: dict[str, set[str]] = {}
    for _, run in runs:
        # What an optimizer, a scheduler or a model takes depends on which it is.
        fixed = (key for key in run.reported if not _OPEN & set(key.split(".")[:-1]))
        deciding.setdefault(run.method, set()).update(fixed)
    for written, run in runs:
        lacks = not run.code and not deciding[run.method] <= run.flat.keys()
        yield written, replace(run, earlier=True) if lacks else run


def read_run(folder: Path) -> Run:
    """Read one run, of this platform or of FSL-SAGE's own code.

    Raises:
        ValueError: a file is not what it should be; the text says which and why.
        OSError: a file cannot be read.
    """
    results = read_file(read_json, folder, RESULTS, RESULTS_BYTES)
    try:
        config = read_file(read_yaml, folder, CONFIG)
    except MissingError:
        return Run(folder, *read_foreign(folder, results), code=CODE)
    run = Run(folder, config, results)
    for key in ("algorithm.name", "model.name", "dataset.name", "dataset.distribution"):
        if not isinstance(run.get(key), str):
            raise ValueError(f"{CONFIG} has no {key}")
    try:
        check_results(results)
    except ValueError as error:
        raise ValueError(f"{RESULTS}: {error}") from None
    return run


def short(value: Any) -> str:
    """A value of a configuration in a legend or a name: as on the command line, numbers without needless digits."""
    return shortened(f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value))


def _run_folders(folders: tuple[Path, ...], unreadable: dict[Path, str]) -> Iterator[tuple[Path, set[str]]]:
    """Every folder that is a run or looks like one, once, with the names of its files; in order of their paths."""
    seen: set[Path] = set()

    def note(error: OSError) -> None:
        unreadable[Path(error.filename)] = reason(error)

    for top in folders:
        for name, inner, files in os.walk(top, onerror=note):
            inner[:] = sorted(each for each in inner if not each.startswith("."))
            if CONFIG in files:
                # What lies in a run's folder belongs to it: checkpoints, and what trackers write.
                inner.clear()
            folder = Path(name)
            if (CONFIG in files or RESULTS in files) and folder.absolute() not in seen:
                seen.add(folder.absolute())
                yield folder, set(files)


def _state(folder: Path) -> str:
    """What a run that did not come to its end says of itself."""
    try:
        status = read_json(folder, "status.json", YAML_BYTES)
    except ValueError:
        return "no results yet"
    return ": ".join(one_line(status[key]) for key in ("state", "error") if status.get(key)) or "no results yet"


def _whole(value: Any) -> Any:
    """1.0 as 1: the same setting, whichever way it was spelled."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration whose dotted keys these are."""
    made: dict[str, Any] = {}
    for key, value in flat.items():
        section = made
        *above, last = key.split(".")
        for name in above:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[last] = value
    return made


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat += _flatten(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return flat
