"""All runs below a folder as one table: a row for each run and evaluated round."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas

from cutlayer.interface.result import RunResult, curves
from cutlayer.plotting.content import reason
from cutlayer.plotting.runs import Run, find_runs, read_run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import RESULTS
from cutlayer.runtime.ground.text import one_line

_NAMED = {
    "algorithm": "algorithm.name",
    "model": "model.name",
    "dataset": "dataset.name",
    "distribution": "dataset.distribution",
    "seed": "seed",
}


def all_runs(*folders: str | Path | RunResult) -> pandas.DataFrame:
    """All runs below the folders, a row for each run and evaluated round, in order of folder and round.

    Columns: ``algorithm``, ``model``, ``dataset``, ``distribution`` (with what shapes it), ``seed``; dotted keys that
    decide a result and in which the runs differ; ``round`` and the other columns of `RunResult.metrics`; ``finished``;
    ``latest``: whether it is finished, and no later run has the same setting and seed; ``folder``. Damaged runs are
    left out with one warning.

    Args:
        folders: of runs or above them, or results; ``saves`` unless there are any.

    Raises:
        ConfigError: a folder is not there.
    """
    paths = [each.folder if isinstance(each, RunResult) else Path(each) for each in folders or ("saves",)]
    for path in paths:
        if not path.is_dir():
            raise ConfigError("runs", str(path), "a folder with runs")
    found = find_runs(*paths)
    runs = [(run, True, True) for run in found.runs] + [(run, True, False) for run in found.older]
    damaged = dict(found.damaged)
    for folder in found.unfinished:
        try:
            if (folder / RESULTS).exists():
                runs.append((read_run(folder), False, False))
        except (OSError, ValueError, RecursionError) as error:
            damaged[folder] = reason(error)
    _warn(damaged)
    return _table(sorted(runs, key=lambda each: each[0].folder))


def _table(runs: Sequence[tuple[Run, bool, bool]]) -> pandas.DataFrame:
    keys = _differing([run for run, *_ in runs])
    rows: list[dict[str, Any]] = []
    metrics: dict[str, None] = {}
    for run, finished, latest in runs:
        named = {name: run.get(key) for name, key in _NAMED.items()} | {"distribution": run.distribution}
        settings = {key: _plain(run.get(key)) for key in keys if key in run.flat}
        states = {"finished": finished, "latest": latest, "folder": str(run.folder.absolute())}
        table = curves(run)
        metrics |= dict.fromkeys(table.columns)
        rows += [{**named, **settings, **figures, **states} for figures in table.to_dict("records")]
    return pandas.DataFrame(rows, columns=[*_NAMED, *keys, *(metrics or ["round"]), "finished", "latest", "folder"])


def _differing(runs: Sequence[Run]) -> list[str]:
    """The keys in which runs differ: of all that have one, or by having it among those of one method."""
    settings = [(run.method, run.setting) for run in runs]
    keys = sorted({key for _, setting in settings for key in setting} - {*_NAMED.values()})
    return [key for key in keys if _differ(key, settings)]


def _differ(key: str, settings: Iterable[tuple[str, Mapping[str, Any]]]) -> bool:
    values, having = set[Any](), dict[str, set[bool]]()
    for method, setting in settings:
        having.setdefault(method, set()).add(key in setting)
        values |= {setting[key]} if key in setting else set()
    return len(values) > 1 or any(len(each) > 1 for each in having.values())


def _plain(value: Any) -> Any:
    """A value that a table can be grouped by."""
    return json.dumps(value, default=str) if isinstance(value, list | dict) else value


def _warn(damaged: Mapping[Path, str]) -> None:
    if damaged:
        each = "; ".join(f"{folder}: {why}" for folder, why in damaged.items())
        warnings.warn(one_line(f"left out, damaged: {each}"), stacklevel=3)
