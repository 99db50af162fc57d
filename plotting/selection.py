"""Which runs a comparison holds: by what they are, by their folders, or by themselves where nothing is asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cutlayer.distributions import DISTRIBUTIONS
from cutlayer.plotting.experiments import Comparison, PlotConfig
from cutlayer.plotting.runs import ALPHA, Found, Run, short
from cutlayer.runtime.ground.config import ConfigError, nearest
from cutlayer.runtime.run_folder import safe_component

# Of what a run is besides its configuration.
_DERIVED: dict[str, Callable[[Run], Any]] = {
    "distribution": lambda run: run.distribution,
    "code": lambda run: run.code or "Cutlayer",
}
_OVER_ALPHA = ("metric_alpha", "accuracy_scatter")


class NoRuns(Exception):
    """No run is what a comparison asks for; the text says what stood in the way."""


def automatic(runs: Sequence[Run], config: PlotConfig) -> tuple[Comparison, ...]:
    """One comparison for each dataset, model and distribution among the runs, in order of their names.

    Where a dataset and model has several values of Dirichlet's alpha, there is one more, over alpha.
    """
    groups: dict[tuple[str, str, str], Comparison] = {}
    alphas: dict[tuple[str, str, str], set[float]] = {}
    for run in runs:
        what = {"dataset.name": run.get("dataset.name"), "model.name": run.get("model.name")}
        names = (what["dataset.name"], what["model.name"])
        key = (*names, run.distribution)
        groups.setdefault(key, Comparison(_name(*key), where={**what, "distribution": run.distribution}))
        if run.alpha is not None:
            alphas.setdefault((*names, str(run.get("dataset.distribution"))), set()).add(run.alpha)
    wanted = _OVER_ALPHA if config.figures == "auto" else tuple(set(_OVER_ALPHA) & set(config.figures))
    for dataset, model, kind in [key for key, values in alphas.items() if len(values) > 1 and wanted]:
        # Evenly spread data is where alpha leads to as it grows.
        even = [name for name, each in DISTRIBUTIONS.items() if each.even]
        where = {"dataset.name": dataset, "model.name": model, "dataset.distribution": [kind, *even]}
        name = _name(dataset, model, f"{kind}-alpha")
        groups[dataset, model, f"{kind}-alpha"] = Comparison(
            name, f"{dataset}, {model}, by Dirichlet {ALPHA}", where, figures=wanted
        )
    return tuple(_distinct(groups[key] for key in sorted(groups)))


def select(comparison: Comparison, found: Found, saves: Path) -> list[Run]:
    """The runs of a comparison: those in its folders, or all, narrowed by its `where`.

    Args:
        comparison: what to look for.
        found: all runs, those of `outside` included.
        saves: folder that `folders` are relative to.

    Raises:
        ConfigError: a folder is not there, or a key is in no run's configuration.
        NoRuns: no run is left.
    """
    runs = _in_folders(comparison, found, saves) if comparison.folders else found.runs
    where = {resolve_key(key, found.runs, "where"): wanted for key, wanted in comparison.where.items()}
    for key, wanted in where.items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        left = [run for run in runs if any(same(_value(run, key), value) for value in allowed)]
        if not left and runs:
            raise NoRuns(_missing(key, allowed, {short(_value(run, key)) for run in runs}))
        runs = left
    if not runs:
        raise NoRuns("no finished run was found")
    return list(runs)


def outside(comparisons: Iterable[Comparison], saves: Path) -> list[Path]:
    """Folders that comparisons name and that are not below `saves`."""
    above = Path(os.path.abspath(saves))
    named = [_place(folder, saves) for comparison in comparisons for folder in comparison.folders]
    return [path for path in dict.fromkeys(named) if path.is_dir() and not path.is_relative_to(above)]


def resolve_key(key: str, runs: Sequence[Run], where: str) -> str:
    """The dotted key of a run's configuration that is meant; `dataset` is short for `dataset.name`, as when running.

    Args:
        key: as written.
        runs: among which one must have it; without any run there is nothing to check.
        where: the key in `exp_configs.yaml` that a mistake is reported for.

    Raises:
        ConfigError: no run has such a key.
    """
    for name in (key, f"{key}.name"):
        if not runs or name in _DERIVED or any(name in run.flat for run in runs):
            return name
    known = {name for run in runs for name in run.flat} | set(_DERIVED)
    raise ConfigError(where, key, "a key of a run's configuration", sorted(known))


def same(value: Any, wanted: Any) -> bool:
    """Whether a run's value is the one that is asked for; numbers compare as numbers, also when written as text."""
    if isinstance(value, bool) or isinstance(wanted, bool):
        return str(value).lower() == str(wanted).lower()
    numbers = _number(value), _number(wanted)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return value == wanted or short(value) == short(wanted)


def _in_folders(comparison: Comparison, found: Found, saves: Path) -> list[Run]:
    chosen: dict[Path, Run] = {}
    for folder in comparison.folders:
        place = _place(folder, saves)
        if not place.is_dir():
            below = [str(path.relative_to(saves)) for path in saves.rglob("*") if path.is_dir()]
            raise ConfigError("folders", folder, f"a folder below {saves}, or an absolute one", _near(folder, below))
        inside = {path: run for path, run in _paths(found.runs) if path.is_relative_to(place)}
        # An older run of the same setting and seed counts where it is named itself.
        chosen |= inside | {path: run for path, run in _paths(found.older) if path == place}
    return list(chosen.values())


def _paths(runs: Sequence[Run]) -> list[tuple[Path, Run]]:
    return [(Path(os.path.abspath(run.folder)), run) for run in runs]


def _place(folder: str, saves: Path) -> Path:
    return Path(os.path.abspath(saves / folder))


def _near(word: str, choices: Sequence[str]) -> list[str]:
    found = nearest(word, choices)
    return [] if found is None else [found]


def _value(run: Run, key: str) -> Any:
    return _DERIVED[key](run) if key in _DERIVED else run.get(key)


def _missing(key: str, allowed: Sequence[Any], there: set[str]) -> str:
    close = next(iter(_near(short(allowed[0]), sorted(there))), None) if allowed else None
    hint = "" if close is None else f"; did you mean {close}?"
    wanted = ", ".join(short(value) for value in allowed)
    return f"no finished run has {key}={wanted}{hint} (there are: {', '.join(sorted(there))})"


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _name(*parts: str) -> str:
    name = safe_component("-".join(parts))
    return name if re.search(r"\w", name) else f"_{name}"


def _distinct(comparisons: Iterable[Comparison]) -> Iterable[Comparison]:
    """The comparisons under names that differ, which those of odd data sets may not."""
    taken: set[str] = set()
    for comparison in comparisons:
        name, count = comparison.name, 1
        while name in taken:
            count += 1
            name = f"{comparison.name}-{count}"
        taken.add(name)
        yield comparison if name == comparison.name else replace(comparison, name=name)
