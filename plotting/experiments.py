"""What `exp_configs.yaml` may hold: the comparisons and what is drawn of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from cutlayer.plotting.figures import FIGURES, FORMATS
from cutlayer.plotting.style import is_share
from cutlayer.plotting.timing import Link
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError, build

Target = float | Literal["auto", "none"]
Figures = tuple[str, ...] | Literal["auto"]
Tables = tuple[Literal["md", "tex", "csv"], ...]


@dataclass(frozen=True)
class Comparison:
    """Runs to compare, and what is drawn of them. A key that is null is as at the top of `exp_configs.yaml`.

    name: folder of the figures. title: above them; null: from the runs. where: key of a run's configuration to a value
    or a list of allowed ones. folders: folders of runs or above them, relative to the folder of runs or absolute;
    narrowed by `where`. over: key that the ablation is drawn against; null: the one in which runs of a method differ.
    The others are as in `PlotConfig`.
    """

    name: str
    title: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    over: str | None = None
    figures: Figures | None = None
    metric: str | None = None
    target: Target | None = None
    without_fields: tuple[str, ...] | None = None
    link: Link | None = None
    budget_mb: float | None = None
    tables: Tables | None = None
    report: bool | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.,=+-]*\w[\w.,=+-]*", self.name):
            raise ConfigError("name", self.name, "a name fit for a folder: letters, digits and any of _ - . , = +")
        _check_drawn(self)


@dataclass(frozen=True)
class PlotConfig:
    """What `plot_results.py` draws.

    comparisons: sets of runs; none: those that are found, see `plotting.selection.automatic`. figures: names; auto:
    every one that the runs have what it needs for. formats: of the figures. metric: as in `Run.series`. target: value
    of the metric whose cost is marked; auto: see `default_target`. without_fields: message fields that are left out of
    the bytes. link: of every client, for simulated time. budget_mb: megabytes (10^6) at which methods are compared;
    null: what the run that sent the least sent in all. tables: formats. report: whether to write the HTML report.
    """

    comparisons: tuple[Comparison, ...] = ()
    figures: Figures = "auto"
    formats: tuple[Literal["svg", "pdf", "png"], ...] = FORMATS
    metric: str = "test_acc"
    target: Target = "auto"
    without_fields: tuple[str, ...] = ()
    link: Link = field(default_factory=Link)
    budget_mb: float | None = None
    tables: Tables = ("md", "tex", "csv")
    report: bool = True

    def __post_init__(self) -> None:
        _check_drawn(self)
        if not self.formats:
            raise ConfigError("formats", "[]", "at least one of", FORMATS)
        names = [comparison.name for comparison in self.comparisons]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("comparisons", name, "names that differ from each other")
        for at, comparison in enumerate(self.comparisons):
            if not comparison.where and not comparison.folders:
                raise ConfigError(f"comparisons.{at}", NO_VALUE, "expected `where` or `folders`: which runs it holds")
            try:
                self.complete(comparison)
            except ConfigError as error:
                raise error.within(f"comparisons.{at}") from None

    def complete(self, comparison: Comparison) -> Comparison:
        """The comparison with what it leaves open as at the top."""
        shared = {each.name for each in fields(self)} & {each.name for each in fields(comparison)}
        return replace(
            comparison, **{name: getattr(self, name) for name in shared if getattr(comparison, name) is None}
        )


def read_plot_config(path: Path) -> PlotConfig:
    """Read `exp_configs.yaml`; a file that is not there, or an empty one, stands for the defaults.

    Raises:
        ConfigError: not YAML, an unknown key or a wrong value.
    """
    if not path.exists():
        return PlotConfig()
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(str(path), NO_VALUE, f"no valid YAML: {' '.join(str(error).split())}") from None
    return build(PlotConfig, {} if values is None else values)


def _check_drawn(config: Comparison | PlotConfig) -> None:
    figures: Sequence[str] = () if config.figures is None or config.figures == "auto" else config.figures
    for name in figures:
        if name not in FIGURES:
            raise ConfigError("figures", name, "a figure, or auto instead of the list", FIGURES)
    target = config.target
    if isinstance(target, float) and config.metric is not None and is_share(config.metric) and not 0 < target <= 1:
        raise ConfigError("target", target, f"{config.metric} as a fraction > 0 and <= 1, auto or none")
    if config.budget_mb is not None and not 0 < config.budget_mb < float("inf"):
        raise ConfigError("budget_mb", config.budget_mb, "megabytes > 0, or null for the smallest total")
