"""Curves: a metric against rounds, communication and simulated time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cutlayer.plotting.curves import Curve, bytes_to_reach, final_values
from cutlayer.plotting.figures.axes import (
    Unit,
    amount_axis,
    by_right_end,
    bytes_unit,
    draw_curve,
    draw_level,
    draw_target,
    label_of,
    line_look,
    measured_label,
    metric_axis,
    seconds_unit,
)
from cutlayer.plotting.figures.base import Options, register, without
from cutlayer.plotting.figures.layout import axis_text, put_legend
from cutlayer.plotting.style import format_metric
from cutlayer.plotting.timing import Array
from cutlayer.runtime.ground.units import format_bytes


def _any(curves: Sequence[Curve], _: Options) -> bool:
    return bool(curves)


def _any_time(curves: Sequence[Curve], _: Options) -> bool:
    return any(curve.seconds is not None for curve in curves)


@register("accuracy_communication", "a run", _any, charted=True)
def accuracy_communication(figure: Figure, curves: Sequence[Curve], options: Options) -> None:
    """A metric against cumulative payload bytes; methods that send nothing are levels."""
    axes = figure.add_subplot()
    x = {id(curve): curve.bytes for curve in curves if curve.sends}
    lines, size, unit = _against(axes, curves, x, bytes_unit, options)
    axes.set_xlabel(axis_text(figure, f"communication{without(options)}" + (f" ({unit})" if unit else "")))
    costs: dict[int, str] = {}
    if options.target is not None:
        for curve in curves:
            if curve.sends:
                costs[id(curve)] = _mark_cost(axes, lines[id(curve)], curve, options, options.target, size)
    note = ""
    if options.target is not None and costs:
        mean = ", mean over seeds" if any(len(curve.runs) > 1 for curve in curves) else ""
        note = f"sent when {format_metric(options.metric, options.target)} is first reached{mean}:"
    _legend(figure, axes, curves, costs, note)


@register("accuracy_rounds", "a run", _any, charted=True)
def accuracy_rounds(figure: Figure, curves: Sequence[Curve], options: Options) -> None:
    """A metric against completed rounds."""
    axes = figure.add_subplot()
    for place, curve in enumerate(curves):
        draw_curve(axes, curve.rounds, curve, place)
    _finish(axes, curves, options)
    axes.set_xticks(_round_ticks(max(int(curve.rounds[-1]) for curve in curves)))
    axes.set_xlabel("rounds")
    _legend(figure, axes, curves, levels=False)


def _round_ticks(last: int) -> list[int]:
    """Whole numbers from 0 with the last round among them, and none too near to it."""
    ticks = [
        int(tick) for tick in MaxNLocator(7, steps=[1, 2, 5, 10], integer=True).tick_values(0, last) if tick <= last
    ]
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1
    return [*(tick for tick in ticks if last - tick > 0.7 * step), last]


@register("accuracy_time", "a run that recorded its seconds, bytes and round trips", _any_time, charted=True)
def accuracy_time(figure: Figure, curves: Sequence[Curve], options: Options) -> None:
    """A metric against simulated time over the given link; methods that send nothing are levels."""
    axes = figure.add_subplot()
    x = {id(curve): curve.seconds for curve in curves if curve.sends and curve.seconds is not None}
    *_, unit = _against(axes, curves, x, seconds_unit, options)
    missing = [label_of(curve) for curve in curves if curve.sends and curve.seconds is None]
    label = f"simulated time{f' ({unit})' if unit else ''}, each client's link: {options.link.label}"
    note = f"not drawn, as no time was recorded: {'; '.join(missing)}" if missing else ""
    axes.set_xlabel(axis_text(figure, label, note))
    _legend(figure, axes, curves)


def _against(
    axes: Axes, curves: Sequence[Curve], x: dict[int, Array], unit: Unit, options: Options
) -> tuple[dict[int, Line2D], float, str]:
    """Draw the curves that have an x, by identity, and levels for those that send nothing."""
    lines: dict[int, Line2D] = {}
    size, name = amount_axis(axes, [float(each[-1]) for each in x.values() if each[-1] > 0], unit)
    for place, curve in enumerate(curves):
        if id(curve) in x:
            lines[id(curve)] = draw_curve(axes, x[id(curve)] / size, curve, place)
        elif not curve.sends:
            level = final_values(curve)
            value = float(np.nanmean(level)) if np.isfinite(level).any() else np.nan
            draw_level(axes, curve.method, curve.variant, value, measured_label(curve))
    if not x:
        axes.set_xticks([])
    _finish(axes, curves, options)
    return lines, size, name if x else ""


def _finish(axes: Axes, curves: Sequence[Curve], options: Options) -> None:
    metric_axis(axes, options.metric, [curve.value for curve in curves])
    if options.target is not None:
        draw_target(axes, options.metric, options.target)
    if axes.get_xscale() == "linear":
        axes.set_xlim(left=0)


def _mark_cost(axes: Axes, line: Line2D, curve: Curve, options: Options, target: float, size: float) -> str:
    """Mark on the curve the mean bytes after which the seeds had reached the target; reports them for the legend."""
    found = bytes_to_reach(curve, target, options.without_fields)
    needed = [count for count in found if count is not None]
    if not needed:
        return "not reached"
    mean = float(np.mean(needed))
    mark = line_look(curve.method, curve.variant) | {
        "linestyle": "",
        "markersize": 8,
        "markeredgewidth": 1.4,
        "zorder": 4,
    }
    axes.plot(mean / size, _height(axes, line, mean / size), **mark, markerfacecolor="none")
    some = f" ({len(needed)} of {len(found)} seeds)" if len(needed) < len(found) else ""
    return f"{format_bytes(mean)}{some}"


def _height(axes: Axes, line: Line2D, x: float) -> float:
    """Where a drawn line is at x: straight from point to point as it is seen; NaN beyond its end."""
    points = np.column_stack([np.asarray(line.get_xdata(), np.float64), np.asarray(line.get_ydata(), np.float64)])
    points = points[np.isfinite(points).all(axis=1)]
    to_screen = axes.transScale.transform
    seen, (across, _) = to_screen(points), to_screen((x, points[-1, 1]))
    height = np.interp(across, *seen.T, right=np.nan if x > points[-1, 0] * (1 + 1e-9) else None)
    return float(axes.transScale.inverted().transform((across, height))[1])


def _legend(
    figure: Figure,
    axes: Axes,
    curves: Sequence[Curve],
    costs: dict[int, str] | None = None,
    note: str = "",
    *,
    levels: bool = True,
) -> None:
    # Not the axes' own list of labels, in which none begins with an underscore.
    drawn = {str(line.get_label()): line for line in axes.get_lines()}
    shown = [curve for curve in curves if measured_label(curve) in drawn]
    texts: list[str] = []
    for curve in shown:
        level = "" if curve.sends or not levels else ": sends nothing"
        cost = f": {costs[id(curve)]}" if costs and id(curve) in costs else ""
        texts.append(f"{measured_label(curve)}{level}{cost}")
    put_legend(figure, *by_right_end([drawn[measured_label(curve)] for curve in shown], texts), note)
