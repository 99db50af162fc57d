"""From a folder of runs and `exp_configs.yaml` to a folder of figures and tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from plotting.curves import default_target, make_curves
from plotting.figures import FIGURES, FORMATS, Options, make_figure, save_figure
from plotting.runs import Found, Run, find_runs
from plotting.style import applied
from plotting.tables import as_csv, as_markdown, table_rows
from runtime.config import ConfigError, build

Target = float | Literal["auto", "none"]


@dataclass(frozen=True)
class Comparison:
    """Runs to compare: those whose configuration has the given values.

    name: folder of the figures. title: above them; null: from the runs. where: dotted key of a run's configuration to a
    value or a list of allowed ones. target: accuracy (fraction) whose cost is marked. Null keys are as at the top.
    """

    name: str
    where: dict[str, Any]
    title: str | None = None
    target: Target | None = None
    figures: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.,=+-]*\w[\w.,=+-]*", self.name):
            raise ConfigError("name", self.name, "a name fit for a folder: letters, digits and any of _ - . , = +")
        _check_figures(self.figures or ())
        _check_target(self.target)


@dataclass(frozen=True)
class PlotConfig:
    """What `plot_results.py` draws.

    comparisons: sets of runs; none: one for each dataset, model and distribution found. target: see `Comparison`; auto
    is 95% of the best accuracy of a comparison. without_fields: message fields that are left out of the bytes.
    """

    comparisons: tuple[Comparison, ...] = ()
    figures: tuple[str, ...] = ("accuracy_communication", "accuracy_rounds")
    formats: tuple[Literal["svg", "pdf", "png"], ...] = FORMATS
    target: Target = "auto"
    without_fields: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        _check_figures(self.figures)
        _check_target(self.target)
        if not self.formats:
            raise ConfigError("formats", "[]", "at least one of", FORMATS)
        names = [comparison.name for comparison in self.comparisons]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("comparisons", name, "names that differ from each other")


@dataclass(frozen=True)
class Composed:
    """What was read and what was made: files in order, and for each comparison that matched no run its name."""

    found: Found
    files: list[Path]
    empty: list[str]


def read_config(path: Path) -> PlotConfig:
    """Read `exp_configs.yaml`; a file that is not there, or an empty one, stands for the defaults.

    Raises:
        ConfigError: not YAML, an unknown key or a wrong value.
    """
    if not path.exists():
        return PlotConfig()
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(str(path), "", f"valid YAML ({' '.join(str(error).split())})") from None
    return build(PlotConfig, values or {})


def compose(saves: Path, out: Path, config: PlotConfig) -> Composed:
    """Draw every comparison into its own folder below `out`, with `table.md` and `table.csv`.

    Args:
        saves: folder below which runs lie.
        out: folder for the figures; made if it is not there.
        config: what to draw.
    """
    found = find_runs(saves)
    comparisons = config.comparisons or automatic(found.runs)
    files: list[Path] = []
    empty: list[str] = []
    for comparison in comparisons:
        runs = [run for run in found.runs if matches(run, comparison.where)]
        if runs:
            files += _draw(comparison, runs, out / comparison.name, config)
        else:
            empty.append(comparison.name)
    return Composed(found, files, empty)


def automatic(runs: Sequence[Run]) -> tuple[Comparison, ...]:
    """One comparison for each dataset, model and distribution among the runs, in order of their names."""
    groups: dict[str, Run] = {}
    for run in runs:
        name = f"{run.get('dataset.name')}-{run.get('model.name')}-{run.distribution}"
        groups.setdefault(re.sub(r"[^\w.,=+-]+", "-", name), run)
    keys = ("dataset.name", "model.name")
    return tuple(
        Comparison(name, {key: run.get(key) for key in keys} | {"distribution": run.distribution})
        for name, run in sorted(groups.items())
    )


def matches(run: Run, where: dict[str, Any]) -> bool:
    """Whether a run's configuration has the values of `where`; "distribution" stands for the spread and its shape."""
    for key, wanted in where.items():
        value = run.distribution if key == "distribution" else run.get(key)
        if value not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def _draw(comparison: Comparison, runs: Sequence[Run], folder: Path, config: PlotConfig) -> list[Path]:
    curves = make_curves(runs, config.without_fields)
    wanted = config.target if comparison.target is None else comparison.target
    target = default_target(curves) if wanted == "auto" else None if wanted == "none" else wanted
    options = Options(comparison.title or _title(runs), target, config.without_fields)
    files: list[Path] = []
    with applied():
        for name in config.figures if comparison.figures is None else comparison.figures:
            files += save_figure(make_figure(name, curves, options), folder / name, config.formats)
    rows = table_rows(curves, target, config.without_fields)
    for name, text in (("table.md", as_markdown(rows, options.title, target)), ("table.csv", as_csv(rows))):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        files.append(folder / name)
    return files


def _title(runs: Sequence[Run]) -> str:
    def each(values: Sequence[object]) -> str:
        return " / ".join(dict.fromkeys(str(value) for value in values))

    datasets, models = each([run.get("dataset.name") for run in runs]), each([run.get("model.name") for run in runs])
    return f"{datasets}, {models}, {each([run.distribution_label for run in runs])}"


def _check_figures(names: Sequence[str]) -> None:
    for name in names:
        if name not in FIGURES:
            raise ConfigError("figures", name, "a figure", FIGURES)


def _check_target(target: Target | None) -> None:
    if isinstance(target, float) and not 0 < target <= 1:
        raise ConfigError("target", target, "an accuracy as a fraction > 0 and <= 1, auto or none")
