"""Charts of a report that show what a setting does: a metric against Dirichlet alpha and against a swept key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cutlayer.plotting.curves import Curve
from cutlayer.plotting.figures.axes import line_look
from cutlayer.plotting.figures.base import FIGURES, Options
from cutlayer.plotting.figures.groups import (
    ALPHA_KEY,
    DISTRIBUTION,
    Group,
    followers,
    grouped,
    key_label,
    scale_of,
    statistics,
    swept_key,
)
from cutlayer.plotting.figures.settings import alpha_of, hashable, with_alpha
from cutlayer.plotting.report_charts import (
    GREY,
    HOVER_NAME,
    Axis,
    Chart,
    html_text,
    json_numbers,
    metric_layout,
    value_format,
)
from cutlayer.plotting.report_style import LegendEntry, hollow, level_style, line_style
from cutlayer.plotting.runs import Run
from cutlayer.plotting.style import metric_label

BEST = "best"
_POINTS = 50


@dataclass(frozen=True)
class _Sweep:
    """A swept setting: its name, the text of each of its values by the place [n] on the axis, rising, and the runs of
    each group by place; those of a group without the setting stand at no place (NaN)."""

    label: str
    texts: dict[float, str]
    groups: list[tuple[Group, dict[float, list[Run]]]]


def sweep_charts(curves: Sequence[Curve], options: Options) -> list[Chart]:
    """A chart against Dirichlet alpha and one against the swept key, where the runs differ in them."""
    charts: list[Chart] = []
    metric = metric_label(options.metric)
    for figure, name, sweep in (("metric_alpha", "alpha", _alpha_sweep), ("ablation", "ablation", _key_sweep)):
        if FIGURES[figure].applies(curves, options):
            found = sweep(curves, options)
            heading = f"{metric[0].upper()}{metric[1:]} against {found.label}"
            charts.append(_chart(name, heading, found, options))
    return charts


def _alpha_sweep(curves: Sequence[Curve], _: Options) -> _Sweep:
    groups = grouped(with_alpha(curves), (ALPHA_KEY, DISTRIBUTION))
    alphas = sorted({alpha for group in groups for run in group.runs if (alpha := alpha_of(run)) is not None})
    finite = [alpha for alpha in alphas if math.isfinite(alpha)]
    places = {alpha: math.log10(alpha) for alpha in finite}
    # Evenly spread data at the right end.
    places[math.inf] = places[finite[-1]] + max(0.5, (places[finite[-1]] - places[finite[0]]) / 5)
    texts = {places[alpha]: f"{alpha:g}" if math.isfinite(alpha) else "IID" for alpha in alphas}
    parts = [{places[alpha]: runs for alpha, runs in group.split(alpha_of).items()} for group in groups]
    return _Sweep("Dirichlet \N{GREEK SMALL LETTER ALPHA}", texts, list(zip(groups, parts, strict=True)))


def _key_sweep(curves: Sequence[Curve], options: Options) -> _Sweep:
    key = options.over or swept_key(curves)
    assert key is not None
    groups = grouped(curves, followers(key))
    values: dict[str, object] = {}
    costs: dict[str, list[int]] = {}
    for run in (run for group in groups for run in group.runs if key in run.flat):
        values[hashable(run.get(key))] = run.get(key)
        costs.setdefault(hashable(run.get(key)), []).append(run.bytes()[-1])
    scale = scale_of(list(values.values()), lambda value: (np.mean(costs[hashable(value)]), str(value)))
    parts = [group.split(lambda run: scale.at(run.get(key)) if key in run.flat else math.nan) for group in groups]
    return _Sweep(
        key_label(key), dict(zip(scale.positions, scale.texts, strict=True)), list(zip(groups, parts, strict=True))
    )


def _chart(name: str, heading: str, sweep: _Sweep, options: Options) -> Chart:
    ticks = {"tickvals": list(sweep.texts), "ticktext": [html_text(text) for text in sweep.texts.values()]}
    chart = Chart(
        name=name,
        heading=heading,
        description=f"{heading}: last and best evaluation, mean over seeds",
        axes={"x": Axis(sweep.label, sweep.label, "", {**ticks, "zeroline": False})},
        y=metric_layout(options.metric),
    )
    for number, (group, parts) in enumerate(sweep.groups):
        style = line_look(group.method, group.variant)
        chart.keys.append(LegendEntry(f"g{number}", group.name, **style))
        if all(math.isnan(place) for place in parts):
            _add_level(chart, f"g{number}", group, sweep, options)
        else:
            _add_points(chart, f"g{number}", group, parts, sweep, options)
    chart.keys.append(LegendEntry(BEST, "hollow: best evaluation; else the last one", GREY, marker="o", hollow=True))
    if any(len(runs) > 1 for _, parts in sweep.groups for runs in parts.values()):
        chart.note = "Means over seeds; bars: one standard deviation of the last evaluation."
    return chart


def _add_points(
    chart: Chart, at: str, group: Group, parts: dict[float, list[Run]], sweep: _Sweep, options: Options
) -> None:
    style = line_look(group.method, group.variant)
    places = [place for place in sweep.texts if place in parts]
    final, best, spread = zip(*(statistics(parts[place], options.metric) for place in places), strict=True)
    shown = value_format(options.metric)
    chart.columns[at] = {"x": json_numbers(places)}
    trace = {"type": "scatter", "name": html_text(group.name), "at": at}
    reported = [[html_text(sweep.texts[place]), len(parts[place])] for place in places]
    columns = [
        [*each, *json_numbers(pair)] for each, pair in zip(reported, zip(spread, best, strict=True), strict=True)
    ]
    place = f"{HOVER_NAME}{html_text(sweep.label)} %{{customdata[0]}}"
    hover = f"{place}<br>last %{{y:{shown}}} ± %{{customdata[2]:{shown}}}"
    line = {
        "mode": "lines+markers",
        "y": json_numbers(final),
        "customdata": columns,
        "groups": [at],
        **line_style(**style),
        "error_y": {"array": json_numbers(spread), "color": style["color"], "thickness": 1.2, "width": 3},
        "hovertemplate": f"{hover}<br>best %{{customdata[3]:{shown}}}<br>seeds: %{{customdata[1]}}",
    }
    marks = {
        "mode": "markers",
        "y": json_numbers(best),
        "customdata": columns,
        "groups": [at, BEST],
        **hollow(style["color"], style["marker"]),
        "hovertemplate": f"{place}<br>best %{{y:{shown}}}<br>seeds: %{{customdata[1]}}",
    }
    chart.traces += [trace | line, trace | marks]


def _add_level(chart: Chart, at: str, group: Group, sweep: _Sweep, options: Options) -> None:
    """A method that does not have the setting."""
    final, _, _ = statistics(group.runs, options.metric)
    chart.columns[at] = {"x": json_numbers(np.linspace(min(sweep.texts), max(sweep.texts), _POINTS))}
    chart.traces.append(
        {
            "type": "scatter",
            "name": html_text(group.name),
            "at": at,
            "groups": [at],
            "y": json_numbers([final] * _POINTS),
            **level_style(**line_look(group.method, group.variant)),
            "hovertemplate": f"{HOVER_NAME}%{{y:{value_format(options.metric)}}} without this setting",
        }
    )
