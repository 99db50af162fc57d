"""Axes with units by magnitude, and how a curve of a method is drawn on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, NullFormatter

from cutlayer.plotting.content import METRIC_NAMES
from cutlayer.plotting.curves import Curve
from cutlayer.plotting.figures.layout import wrapped
from cutlayer.plotting.measures import marked, measured
from cutlayer.plotting.style import dashes, format_metric, is_share, marker_of, method_style, metric_label, shade
from cutlayer.plotting.timing import Array, time_unit
from cutlayer.runtime.ground.units import byte_unit

Unit = Callable[[float], tuple[float, str]]

_MARKERS = 8
# Beyond this ratio between the dearest and the cheapest method, the cheap one is lost in the corner of a linear axis.
_LOG_RATIO = 12.0
# A loss that falls by more than this is read on a logarithmic axis.
_LOG_METRIC = 50.0
# Next to nothing: a margin below it has no place on such an axis.
_SMALLEST = 1e-100
_FEW_TICKS = 5
_LABEL_HEIGHT, _LABEL_SIZE = 2.2, 9.0


def label_of(curve: Curve) -> str:
    """A curve's name."""
    name = method_style(curve.method).label
    return f"{name}, {curve.label}" if curve.label else name


def measured_label(curve: Curve) -> str:
    """Its name where its metric is drawn: with what that is of, if it does not compare with a classifier's."""
    return marked(label_of(curve), measured(curve.runs[0], curve.metric))


def line_look(method: str, variant: int) -> dict[str, Any]:
    """Colour, dashes and marker of the n-th setting (from 0) of a method, as arguments of `Axes.plot`."""
    style = method_style(method)
    marker = marker_of(style.marker, variant)
    return {"color": shade(style.color, variant), "linestyle": dashes(variant), "marker": marker}


def draw_curve(axes: Axes, x: Array, curve: Curve, place: int) -> Line2D:
    """A curve over x [n] with a band of one standard deviation where it is a mean over seeds.

    Args:
        place: number of the curve in the figure; markers of curves that coincide do not cover each other.
    """
    value, deviation = curve.value, curve.deviation
    if curve.metric not in METRIC_NAMES:
        # Measured in some rounds only: drawn from each measurement to the next.
        known = np.isfinite(value)
        x, value, deviation = x[known], value[known], deviation[known]
    style = line_look(curve.method, curve.variant)
    (line,) = axes.plot(x, value, **style, markevery=_marked(value, place), label=measured_label(curve))
    if len(curve.runs) > 1:
        low, high = value - deviation, value + deviation
        if is_share(curve.metric):
            low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    return line


def draw_level(axes: Axes, method: str, variant: int, value: float, label: str) -> Line2D:
    """A level line from side to side, for what does not depend on the figure's x."""
    x = [0.0, 0.03, 0.97, 1.0]
    options = line_look(method, variant) | {"linestyle": (0, (4, 3)), "linewidth": 1.2, "markevery": [1, 2]}
    (line,) = axes.plot(x, [value] * 4, transform=axes.get_yaxis_transform(), **options, label=label)
    return line


def by_right_end(lines: Sequence[Line2D], texts: Sequence[str]) -> tuple[list[Line2D], list[str]]:
    """Lines and their texts in the order of the lines' right ends, the highest first; for a legend."""

    def end(line: Line2D) -> float:
        y = np.asarray(line.get_ydata(), np.float64)
        known = y[np.isfinite(y)]
        return float(known[-1]) if len(known) else -np.inf

    order = sorted(range(len(lines)), key=lambda at: -end(lines[at]))
    return [lines[at] for at in order], [texts[at] for at in order]


def _marked(value: Array, place: int) -> list[int]:
    """Where a curve bears its marker: now and then, and at every point that no line reaches."""
    known = np.isfinite(value)
    neighbours = np.r_[False, known[:-1]] | np.r_[known[1:], False]
    step = max(1, len(value) // _MARKERS)
    regular = range(place % step, len(value), step)
    return sorted({*regular, *(int(at) for at in np.flatnonzero(known & ~neighbours))})


def amount_axis(axes: Axes, largest: Sequence[float], unit: Unit) -> tuple[float, str]:
    """Make the x axis one of amounts of very different or of like size.

    Args:
        axes: with nothing drawn on it yet.
        largest: of each curve, > 0.
        unit: gives size and name of the best unit of a magnitude.

    Returns:
        What to divide by, and the unit for the axis' label; on a logarithmic axis each tick has its own.
    """
    if largest and max(largest) > _LOG_RATIO * min(largest):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=_FEW_TICKS + 2))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: _tick(count, unit)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="minor", axis="x", linewidth=0.3)
        return 1.0, ""
    return unit(max(largest, default=1.0))


def _tick(count: float, unit: Unit) -> str:
    size, name = unit(count)
    return f"{count / size:g} {name}"


def bytes_unit(count: float) -> tuple[float, str]:
    """`byte_unit` for amounts that may be means: a tenth of a byte is bytes too."""
    return byte_unit(count * (1 + 1e-9))


def seconds_unit(seconds: float) -> tuple[float, str]:
    """`time_unit`, whatever floating point makes of 0.1 * 10."""
    return time_unit(seconds * (1 + 1e-9))


class Percent(Formatter):
    """Fractions in percent, with as many digits as the ticks of the axis need to be distinguished, and no more."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The text of one value alone."""
        return self.format_ticks([x])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """The texts of all ticks of an axis."""
        shares = 100 * np.asarray(values)
        exact = (digits for digits in range(6) if np.allclose(shares, shares.round(digits), rtol=0, atol=1e-7))
        digits = next(exact, 6)
        return [f"{share:.{digits}f}%" for share in shares]


def metric_axis(axes: Axes, metric: str, values: Sequence[Array], when: str = "") -> None:
    """Label and scale the y axis for a metric; percent for shares, logarithmic for a loss that falls a long way.

    Args:
        values: all that is drawn, [n] each.
        when: what is added to the label, e.g. "last evaluation".
    """
    label = metric_label(metric) + (f", {when}" if when else "")
    axes.set_ylabel(wrapped(label, _LABEL_HEIGHT, _LABEL_SIZE))
    known = np.concatenate([each[np.isfinite(each)] for each in values]) if len(values) else np.empty(0)
    if is_share(metric):
        axes.yaxis.set_major_formatter(Percent())
    elif len(known) and known.min() > _SMALLEST and known.max() > _LOG_METRIC * known.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def draw_target(axes: Axes, metric: str, target: float) -> None:
    """A dotted line at the target, named beside the axes, where no curve can run through the name."""
    axes.axhline(target, color="#555555", linestyle=":", linewidth=1)
    text = f"target\n{format_metric(metric, target)}"
    axes.text(1.01, target, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7)
