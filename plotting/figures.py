"""The figures: each takes curves and draws them on axes. `FIGURES` lists those that `exp_configs.yaml` may name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from plotting.curves import Curve, bytes_to_reach, final_accuracies
from plotting.style import TEXT_WIDTH, applied, dashes, method_style
from runtime.results import byte_unit, format_bytes

FORMATS = ("svg", "pdf", "png")
_MARKERS = 8
# Beyond this ratio between the dearest and the cheapest method, the cheap one is lost in the corner of a linear axis.
_LOG_RATIO = 12.0


@dataclass(frozen=True)
class Options:
    """What a figure may need besides its curves.

    target: accuracy (fraction) whose cost is marked, or None. without_fields: as in `Run.bytes`.
    """

    title: str = ""
    target: float | None = None
    without_fields: tuple[str, ...] = ()


Draw = Callable[[Axes, Sequence[Curve], Options], None]
FIGURES: dict[str, Draw] = {}


def register(name: str) -> Callable[[Draw], Draw]:
    """Make a figure available under `figures` in `exp_configs.yaml`; the name is its file's name too."""

    def decorate(draw: Draw) -> Draw:
        if name in FIGURES:
            raise ValueError(f"figure {name!r} is registered twice")
        FIGURES[name] = draw
        return draw

    return decorate


@register("accuracy_communication")
def accuracy_communication(axes: Axes, curves: Sequence[Curve], options: Options) -> None:
    """Test accuracy against cumulative payload bytes; methods that send nothing are levels."""
    sending = [curve for curve in curves if curve.sends]
    largest = max((float(curve.bytes[-1]) for curve in sending), default=1.0)
    smallest = min((float(curve.bytes[-1]) for curve in sending), default=1.0)
    logarithmic = largest > _LOG_RATIO * smallest
    # A logarithmic axis spans several units: each of its ticks has its own.
    size, unit = (1.0, "") if logarithmic else byte_unit(largest)
    for curve in sending:
        _line(axes, curve, curve.bytes / size)
    for curve in curves:
        if not curve.sends:
            style = method_style(curve.method)
            level = float(np.nanmean(final_accuracies(curve)))
            label = f"{_label(curve)}, sends nothing"
            axes.axhline(level, color=style.color, linestyle=(0, (4, 3)), linewidth=1.2, label=label)
    if options.target is not None:
        _mark_target(axes, sending, options, size)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_byte_tick))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="minor", axis="x", linewidth=0.3)
    else:
        axes.set_xlim(left=0)
    left_out = f" without {', '.join(options.without_fields)}" if options.without_fields else ""
    axes.set_xlabel(f"communication{left_out}" + (f" ({unit})" if unit else ""))
    _accuracy_axis(axes, options)


@register("accuracy_rounds")
def accuracy_rounds(axes: Axes, curves: Sequence[Curve], options: Options) -> None:
    """Test accuracy against completed rounds."""
    for curve in curves:
        _line(axes, curve, curve.rounds)
    if options.target is not None:
        _target_line(axes, options.target)
    axes.set_xlim(left=0)
    axes.set_xlabel("rounds")
    _accuracy_axis(axes, options)


def make_figure(name: str, curves: Sequence[Curve], options: Options) -> Figure:
    """Draw one registered figure with its legend below; to be called and saved within `style.applied()`."""
    columns = min(3, len(curves)) if max((len(_label(curve)) for curve in curves), default=0) < 28 else 2
    rows = -(-len(curves) // max(columns, 1))
    figure = Figure(figsize=(TEXT_WIDTH, 3.4 + 0.2 * rows), layout="constrained")
    axes = figure.add_subplot()
    FIGURES[name](axes, curves, options)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def save_figure(figure: Figure, stem: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Save as `stem` plus each format's ending; the same figure gives the same bytes. Returns the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    paths: list[Path] = []
    for ending in formats:
        path = stem.with_name(f"{stem.name}.{ending}")
        figure.savefig(path, format=ending, metadata=undated.get(ending))
        paths.append(path)
    return paths


def first_picture(folder: Path, results: dict[str, Any], title: str, method: str = "") -> Path:
    """Draw a run's accuracy against its communication, as `accuracy_communication.png` and `.svg` in its folder.

    Args:
        folder: the run's folder.
        results: content of `results.json`.
        title: what ran.
        method: registered name of the algorithm, for its colour.

    Returns:
        The path of the PNG.
    """
    style = method_style(method or title.split(" ")[0])
    accuracy = np.asarray([np.nan if value is None else value for value in results["test_acc"]], dtype=np.float64)
    load = np.asarray(results["comm_load"], dtype=np.float64)
    sends = len(load) > 0 and load[-1] > 0
    size, unit = byte_unit(load[-1]) if sends else (1.0, "")
    x = load / size if sends else np.asarray(results["rounds"], dtype=np.float64)
    with applied():
        figure = Figure(figsize=(TEXT_WIDTH, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(x, accuracy, color=style.color, marker=style.marker, markevery=_mark_every(len(x)))
        if np.isfinite(accuracy).any():
            best = int(np.nanargmax(accuracy))
            where = f"after {format_bytes(load[best])}" if sends else f"in round {results['rounds'][best]}"
            axes.plot(x[best], accuracy[best], "o", markersize=10, markerfacecolor="none", markeredgecolor="black")
            axes.text(0.98, 0.04, f"best {accuracy[best]:.2%} {where}", transform=axes.transAxes, ha="right")
        axes.set_xlim(left=0)
        axes.set_xlabel(f"communication ({unit})" if sends else "rounds (this method sends nothing)")
        _accuracy_axis(axes, Options(title))
        return save_figure(figure, folder / "accuracy_communication", ("svg", "png"))[-1]


def _line(axes: Axes, curve: Curve, x: np.ndarray[Any, Any]) -> None:
    style = method_style(curve.method)
    axes.plot(
        x,
        curve.accuracy,
        color=style.color,
        linestyle=dashes(curve.variant),
        marker=style.marker,
        markevery=_mark_every(len(x)),
        label=_label(curve),
    )
    if len(curve.runs) > 1:
        low, high = curve.accuracy - curve.deviation, curve.accuracy + curve.deviation
        axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)


def _mark_target(axes: Axes, curves: Sequence[Curve], options: Options, size: float) -> None:
    """A level at the target, and on it for each method the bytes after which its seeds had reached it on average."""
    assert options.target is not None
    _target_line(axes, options.target)
    for curve in curves:
        needed = [count for count in bytes_to_reach(curve, options.target, options.without_fields) if count is not None]
        if len(needed) == len(curve.runs):
            color = method_style(curve.method).color
            axes.plot(
                *(float(np.mean(needed)) / size, options.target),
                *("o",),
                markersize=7,
                markerfacecolor="white",
                markeredgecolor=color,
                markeredgewidth=1.6,
                zorder=4,
            )


def _target_line(axes: Axes, target: float) -> None:
    axes.axhline(target, color="#555555", linestyle=":", linewidth=1)
    # Beside the axes, where no curve can run through it, whatever the scale of the axis.
    place = axes.get_yaxis_transform()
    axes.text(1.01, target, f"target\n{_short_percent(target)}", transform=place, va="center", fontsize=7)


def _accuracy_axis(axes: Axes, options: Options) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_ylabel("test accuracy")
    if options.title:
        axes.set_title(options.title)


def _label(curve: Curve) -> str:
    name = method_style(curve.method).label
    return f"{name}, {curve.label}" if curve.label else name


def _byte_tick(count: float, _: int | None = None) -> str:
    size, unit = byte_unit(count)
    return f"{count / size:g} {unit}"


def _short_percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _mark_every(points: int) -> int:
    return max(1, points // _MARKERS)
