"""What a setting does: a metric against Dirichlet alpha, against any swept key, and against communication."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation, Transform

from cutlayer.plotting.curves import Curve
from cutlayer.plotting.figures.axes import (
    amount_axis,
    by_right_end,
    bytes_unit,
    draw_level,
    draw_target,
    line_look,
    metric_axis,
)
from cutlayer.plotting.figures.base import Options, register, without
from cutlayer.plotting.figures.groups import (
    ALPHA_KEY,
    DISTRIBUTION,
    Group,
    followers,
    grouped,
    key_label,
    put_ticks,
    scale_of,
    statistics,
    swept_key,
)
from cutlayer.plotting.figures.layout import axis_text, grow, put_legend
from cutlayer.plotting.runs import Run
from cutlayer.plotting.timing import Array

_ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
_IID = math.inf
_SMALLEST, _LARGEST, _PLAIN = 4.0, 11.0, 7.0


def alpha_of(run: Run) -> float | None:
    """Dirichlet alpha of a run's data; infinity where it is spread evenly, None for any other way to spread it."""
    if run.is_even:
        return _IID
    return run.alpha


def with_alpha(curves: Sequence[Curve]) -> list[Curve]:
    """The curves of one kind of Dirichlet distribution (the most frequent one) and those of evenly spread data."""
    kinds = [str(curve.runs[0].get(DISTRIBUTION)) for curve in curves if alpha_of(curve.runs[0]) not in (None, _IID)]
    kind = max(dict.fromkeys(kinds), key=kinds.count, default="")
    return [
        curve
        for curve in curves
        if alpha_of(curve.runs[0]) is not None and (curve.runs[0].is_even or curve.runs[0].get(DISTRIBUTION) == kind)
    ]


def _several_alphas(curves: Sequence[Curve], _: Options) -> bool:
    found = {alpha_of(curve.runs[0]) for curve in with_alpha(curves)}
    return len(found) > 1 and found != {_IID}


@register("metric_alpha", "runs that differ in Dirichlet alpha", _several_alphas, charted=True)
def metric_alpha(figure: Figure, curves: Sequence[Curve], options: Options) -> None:
    """The final metric against Dirichlet alpha, with evenly spread data at the right end."""
    axes = figure.add_subplot()
    groups = grouped(with_alpha(curves), (ALPHA_KEY, DISTRIBUTION))
    alphas = sorted({alpha for group in groups for run in group.runs if (alpha := alpha_of(run)) is not None})
    finite = [alpha for alpha in alphas if alpha != _IID]
    places = {alpha: math.log10(alpha) for alpha in finite}
    places[_IID] = places[finite[-1]] + max(0.5, (places[finite[-1]] - places[finite[0]]) / 5)
    texts = ["IID" if alpha == _IID else f"{alpha:g}" for alpha in alphas]
    handles: list[Any] = []
    for place, group in enumerate(groups):
        parts = group.split(alpha_of)
        points = {alpha: statistics(parts[alpha], options.metric) for alpha in alphas if alpha in parts}
        x = [places[alpha] for alpha in points]
        means, spread = [point[0] for point in points.values()], [point[2] for point in points.values()]
        handles.append(_points(axes, group, x, means, spread, axes.transData, 2.0 + place % 4))
    _finish(axes, options, "last evaluation")
    put_ticks(axes, [places[alpha] for alpha in alphas], texts)
    axes.set_xlabel(f"Dirichlet {_ALPHA} (to the right: clients more alike)")
    put_legend(figure, *by_right_end(handles, [group.name for group in groups]), _seeds(groups))


def _has_sweep(curves: Sequence[Curve], options: Options) -> bool:
    key = options.over or swept_key(curves)
    if key is None:
        return False
    groups = grouped(curves, followers(key))
    return any(_swept(group, key) for group in groups)


def _swept(group: Group, key: str) -> list[Run]:
    """The runs that have the key, if they have several values of it."""
    runs = [run for run in group.runs if key in run.flat]
    return runs if len({hashable(run.get(key)) for run in runs}) > 1 else []


@register(
    "ablation", "runs of a method that differ in one key, or in the one that `over` names", _has_sweep, charted=True
)
def ablation(figure: Figure, curves: Sequence[Curve], options: Options) -> None:
    """The final and the best metric against a swept key; methods that have one value of it, or none, are levels."""
    key = options.over or swept_key(curves)
    assert key is not None
    axes = figure.add_subplot()
    groups = grouped(curves, followers(key))
    having = [_swept(group, key) for group in groups]
    values = {hashable(run.get(key)): run.get(key) for runs in having for run in runs}
    cost = {
        name: float(np.mean([run.bytes()[-1] for runs in having for run in runs if hashable(run.get(key)) == name]))
        for name in values
    }
    # Names have no order of their own: the cheapest setting comes first, which puts sizes into theirs.
    scale = scale_of(list(values.values()), lambda value: (cost[hashable(value)], str(value)))
    handles: list[Any] = []
    for place, (group, runs) in enumerate(zip(groups, having, strict=True)):
        if not runs:
            mean, _, _ = statistics(group.runs, options.metric)
            handles.append(draw_level(axes, group.method, group.variant, mean, group.name))
            continue
        # A place says how much a number is, but only which one a name is.
        beside = axes.transData if scale.numeric else _beside(figure, axes, place, len(groups))
        parts = {name: [run for run in runs if hashable(run.get(key)) == name] for name in values}
        known = [value for value in scale.values if parts[hashable(value)]]
        points = [statistics(parts[hashable(value)], options.metric) for value in known]
        x = [scale.at(value) for value in known]
        means, spread = [point[0] for point in points], [point[2] for point in points]
        handles.append(_points(axes, group, x, means, spread, beside, 2.0 + place % 4))
        hollow = line_look(group.method, group.variant) | {"linestyle": "", "markerfacecolor": "none", "markersize": 7}
        best = [point[1] for point in points]
        axes.plot(x, best, **hollow, transform=beside)
        _reach(axes, x, best)
    _finish(axes, options)
    lines = put_ticks(axes, scale.positions, scale.texts)
    grow(figure, 0.17 * (lines - 1))
    axes.set_xlabel(axis_text(figure, key_label(key)))
    note = "filled: last evaluation, hollow: best one" + (f"; {_seeds(groups)}" if _seeds(groups) else "")
    names = [group.name + ("" if runs else ": not swept") for group, runs in zip(groups, having, strict=True)]
    put_legend(figure, *by_right_end(handles, names), note)


def _any_pair(curves: Sequence[Curve], _: Options) -> bool:
    return len(curves) > 1 and any(curve.sends for curve in curves)


@register("accuracy_scatter", "at least two runs, one of which communicates", _any_pair)
def accuracy_scatter(figure: Figure, curves: Sequence[Curve], options: Options) -> None:
    """The final metric against all bytes sent: a dot for each setting, the larger the larger Dirichlet alpha."""
    axes = figure.add_subplot()
    groups = grouped(curves, (ALPHA_KEY, DISTRIBUTION))
    parts = [group.split(lambda run: (run.distribution, alpha_of(run))) for group in groups]
    cost = [{key: _mean_bytes(runs, options) for key, runs in part.items()} for part in parts]
    size, unit = amount_axis(axes, [count for each in cost for count in each.values() if count > 0], bytes_unit)
    sizes = _dot_sizes([alpha for part in parts for _, alpha in part])
    handles: list[Any] = []
    logarithmic = axes.get_xscale() == "log"
    for group, part, counts in zip(groups, parts, cost, strict=True):
        style: dict[str, Any] = line_look(group.method, group.variant) | {"linestyle": ""}
        color = style["color"]
        style |= {"markerfacecolor": (color, 0.3), "markeredgecolor": color}
        # Large dots first, so that small ones lie on top of them.
        for key, runs in sorted(part.items(), key=lambda item: -sizes[item[0][1]]):
            mean, _, spread = statistics(runs, options.metric)
            # Nothing has no place on a logarithmic axis but its left end.
            edge = logarithmic and not counts[key]
            place: dict[str, Any] = {"transform": axes.get_yaxis_transform()} if edge else {}
            x = 0.02 if edge else counts[key] / size
            if len(runs) > 1:
                axes.plot([x, x], [mean - spread, mean + spread], color=color, linewidth=0.8, **place)
            axes.plot([x], [mean], **style, markersize=sizes[key[1]], **place)
        handles.append(Line2D([], [], **style, markersize=_PLAIN))
    if not logarithmic:
        top = max(count for each in cost for count in each.values()) / size
        axes.set_xlim(-0.04 * top, 1.06 * top)
    axes.margins(y=0.08)
    _finish(axes, options, "last evaluation")
    axes.set_xlabel(axis_text(figure, f"communication{without(options)}, whole run" + (f" ({unit})" if unit else "")))
    names = [
        group.name + ("" if any(each.values()) else ": sends nothing") for group, each in zip(groups, cost, strict=True)
    ]
    for alpha in sorted(alpha for alpha in sizes if alpha is not None):
        name = "IID" if alpha == _IID else f"{_ALPHA} = {alpha:g}"
        handles.append(Line2D([], [], color="#AAAAAA", marker="o", linestyle="", markersize=sizes[alpha]))
        names.append(name)
    put_legend(figure, handles, names, _seeds(groups))


def _dot_sizes(alphas: Sequence[float | None]) -> dict[float | None, float]:
    """Marker size in points by alpha: it grows with its logarithm, IID is largest."""
    finite = sorted({alpha for alpha in alphas if alpha is not None and alpha != _IID})
    sizes: dict[float | None, float] = dict.fromkeys(alphas, _PLAIN)
    top = _LARGEST if _IID not in alphas else _LARGEST - 2
    for alpha in finite if len(sizes) > 1 else ():
        span = math.log(finite[-1] / finite[0])
        share = math.log(alpha / finite[0]) / span if span else 0.0
        sizes[alpha] = _SMALLEST + (top - _SMALLEST) * share
    if finite and _IID in sizes:
        sizes[_IID] = _LARGEST
    return sizes


def _mean_bytes(runs: Sequence[Run], options: Options) -> float:
    return float(np.mean([run.bytes(options.without_fields)[-1] for run in runs]))


def _beside(figure: Figure, axes: Axes, place: int, count: int) -> Transform:
    """A little to the side of the true x, by the group's place among the others: points that coincide show."""
    step = min(3.5, 28 / count) / 72
    return axes.transData + ScaledTranslation((place - (count - 1) / 2) * step, 0, figure.dpi_scale_trans)


def _points(
    axes: Axes,
    group: Group,
    x: Sequence[float],
    means: Sequence[float],
    spread: Sequence[float],
    beside: Transform,
    cap: float,
) -> Any:
    """Points joined by a line, with bars of one standard deviation where there are several seeds.

    The ends of bars are `cap` points wide: those of several groups show on one place.
    """
    style = line_look(group.method, group.variant)
    if max(spread, default=0) > 0:
        axes.errorbar(
            x, means, yerr=spread, fmt="none", ecolor=style["color"], elinewidth=1, capsize=cap, transform=beside
        )
    (line,) = axes.plot(x, means, **style, label=group.name, transform=beside)
    _reach(axes, x, np.subtract(means, spread))
    _reach(axes, x, np.add(means, spread))
    return line


def _reach(axes: Axes, x: Sequence[float], y: Sequence[float] | Array) -> None:
    """Make the axes hold these points, which matplotlib does not see to for those that are drawn beside their place."""
    points = np.column_stack([x, y])
    axes.update_datalim(points[np.isfinite(points).all(axis=1)])
    axes.autoscale(axis="y")


def _finish(axes: Axes, options: Options, when: str = "") -> None:
    drawn = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()]
    metric_axis(axes, options.metric, drawn, when)
    if options.target is not None:
        draw_target(axes, options.metric, options.target)


def _seeds(groups: Sequence[Group]) -> str:
    several = any(len({str(run.get("seed")) for run in group.runs}) > 1 for group in groups)
    return "mean over seeds, bars: one standard deviation" if several else ""


def hashable(value: Any) -> str:
    return repr(value)
