"""The main chart of a report: a metric against communication, rounds and simulated time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from cutlayer.plotting.content import METRIC_NAMES
from cutlayer.plotting.curves import Curve, final_values, higher_is_better
from cutlayer.plotting.figures.axes import line_look, measured_label
from cutlayer.plotting.figures.base import Options, without
from cutlayer.plotting.report_charts import (
    GREY,
    HOVER_NAME,
    LOG_RATIO,
    Axis,
    Chart,
    byte_axis,
    html_text,
    json_numbers,
    metric_layout,
    value_format,
)
from cutlayer.plotting.report_style import BAND, LegendEntry, faint, hollow, level_style, line_style
from cutlayer.plotting.style import format_metric, is_share, metric_label
from cutlayer.plotting.timing import Array, time_unit

TARGET = "target"
_MARKERS = 8
# Of a level: enough for the pointer to find one of them.
_POINTS = 50


@dataclass(frozen=True)
class _Costs:
    """Where curves and runs lie on the x axes that they have; times in the unit of `second` seconds."""

    options: Options
    second: float

    def of_curve(self, curve: Curve) -> dict[str, Array]:
        found = {"rounds": curve.rounds}
        if curve.sends:
            found["bytes"] = curve.bytes
            if curve.seconds is not None:
                found["seconds"] = curve.seconds / self.second
        return found


def curves_chart(curves: Sequence[Curve], options: Options) -> Chart:
    """The metric against each cost that the runs have; methods that send nothing are levels but by round."""
    longest = max(
        (float(curve.seconds[-1]) for curve in curves if curve.sends and curve.seconds is not None), default=0
    )
    second, unit = time_unit(longest)
    costs = _Costs(options, second)
    metric = metric_label(options.metric)
    chart = Chart(
        name="curves",
        heading=f"{metric[0].upper()}{metric[1:]} against cost",
        description=f"{metric} by communication, rounds or simulated time; the figures are in the table",
        axes=_axes(curves, costs, unit),
        y=metric_layout(options.metric),
        log_x=True,
        log_y=not is_share(options.metric),
        height=460,
    )
    for number, curve in enumerate(curves):
        _add_curve(chart, f"c{number}", curve, costs)
    _add_levels(chart, curves)
    if any(len(curve.runs) > 1 for curve in curves):
        chart.keys.append(LegendEntry(BAND, "± standard deviation over seeds", GREY, linestyle="-", band=True))
    if options.target is not None:
        _add_target(chart, curves, options.target, costs)
    return chart


def _axes(curves: Sequence[Curve], costs: _Costs, unit: str) -> dict[str, Axis]:
    options = costs.options
    ends = [{name: float(values[-1]) for name, values in costs.of_curve(curve).items()} for curve in curves]
    found = {name: [each[name] for each in ends if name in each] for name in ("bytes", "seconds")}
    far = {name: bool(values) and max(values) > LOG_RATIO * min(values) for name, values in found.items()}
    axes: dict[str, Axis] = {}
    if found["bytes"]:
        axes["bytes"] = byte_axis("communication", f"communication{without(options)}", far["bytes"])
    axes["rounds"] = Axis("rounds", "rounds", "", {"tickformat": ",", "rangemode": "tozero"})
    if found["seconds"]:
        title = f"simulated time ({unit})\nat {options.link.label}"
        layout = {"tickformat": "~g", "rangemode": "tozero"}
        axes["seconds"] = Axis("simulated time", title, f"%{{x:.5~g}} {unit}", layout, far["seconds"])
    return axes


def _add_curve(chart: Chart, group: str, curve: Curve, costs: _Costs) -> None:
    style = line_look(curve.method, curve.variant)
    chart.keys.append(LegendEntry(group, measured_label(curve), **style))
    chart.columns[group] = {
        name: json_numbers(each) for name, each in costs.of_curve(curve).items() if name in chart.axes
    }
    seeds = len(curve.runs)
    if seeds > 1:
        _add_band(chart, group, curve)
    shown = value_format(curve.metric)
    spread = f" ± %{{customdata[1]:{shown}}}, {seeds} seeds" if seeds > 1 else ""
    line = line_style(**style)
    line["marker"]["maxdisplayed"] = _MARKERS
    trace = {
        **_trace(curve, group, at=group, y=curve.value),
        **line,
        "mode": "lines+markers",
        "customdata": [
            list(pair) for pair in zip(json_numbers(curve.rounds), json_numbers(curve.deviation), strict=True)
        ],
        "hovertemplate": f"{HOVER_NAME}%{{y:{shown}}}{spread}<br>round %{{customdata[0]:,}}{{x}}",
    }
    chart.traces.append(trace)


def _add_band(chart: Chart, group: str, curve: Curve) -> None:
    """Between one standard deviation below the mean and one above."""
    color = line_look(curve.method, curve.variant)["color"]
    filled = {"fill": "tonexty", "fillcolor": faint(color)}
    for side, filling in ((-1.0, {}), (1.0, filled)):
        bound = curve.value + side * curve.deviation
        trace = {
            **_trace(curve, group, at=group, y=np.clip(bound, 0, 1) if is_share(curve.metric) else bound),
            "mode": "lines",
            "line": {"width": 0, "color": color},
            "hoverinfo": "skip",
            **filling,
            "groups": [group, BAND],
        }
        chart.traces.append(trace)


def _add_levels(chart: Chart, curves: Sequence[Curve]) -> None:
    """What sends nothing, on the axes where it has no place of its own: from the first to the last of the others."""
    for number, curve in enumerate(curves):
        group = f"c{number}"
        missing = [name for name in chart.axes if name not in chart.columns[group]]
        level = final_values(curve)
        if curve.sends or not missing or not np.isfinite(level).any():
            continue
        spans = {name: [column[name] for column in chart.columns.values() if name in column] for name in missing}
        chart.columns[f"{group}-level"] = {name: _span(found, chart.axes[name].log) for name, found in spans.items()}
        trace = {
            **_trace(curve, group, at=f"{group}-level", y=np.full(_POINTS, float(np.nanmean(level)))),
            **level_style(**line_look(curve.method, curve.variant)),
            "hovertemplate": f"{HOVER_NAME}%{{y:{value_format(curve.metric)}}} at the end, sends nothing",
        }
        chart.traces.append(trace)


def _span(columns: Sequence[list[Any]], log: bool) -> list[Any]:
    values = [value for column in columns for value in column if value]
    return json_numbers((np.geomspace if log else np.linspace)(min(values), max(values), _POINTS))


def _add_target(chart: Chart, curves: Sequence[Curve], target: float, costs: _Costs) -> None:
    """A line at the target, and on each curve the evaluation by which its seeds first reached it, on average."""
    metric = costs.options.metric
    name = f"target {format_metric(metric, target)}"
    text = f"{name}; hollow marks: first reached, mean over seeds"
    chart.keys.append(LegendEntry(TARGET, text, GREY, linestyle=":", marker="o", hollow=True))
    line = {"color": GREY, "dash": "dot", "width": 1.5}
    ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": target, "y1": target}
    chart.shapes.append({"type": "line", **ends, "line": line, "groups": [TARGET]})
    for number, curve in enumerate(curves):
        first = [_first_reached(run.series(metric), target, metric) for run in curve.runs]
        rounds = [run.results["rounds"][at] for run, at in zip(curve.runs, first, strict=True) if at is not None]
        if not curve.sends or not rounds or curve.rounds[-1] < fmean(rounds):
            continue
        marked = int(np.argmax(curve.rounds >= fmean(rounds)))
        found = costs.of_curve(curve)
        chart.columns[f"c{number}-target"] = {
            axis: json_numbers(found[axis][[marked]]) for axis in chart.axes if axis in found
        }
        style = line_look(curve.method, curve.variant)
        trace = {
            **_trace(curve, f"c{number}", at=f"c{number}-target", y=curve.value[[marked]]),
            "mode": "markers",
            **hollow(style["color"], style["marker"]),
            "customdata": [json_numbers([fmean(rounds)])],
            "hovertemplate": f"{HOVER_NAME}{name} first reached by {len(rounds)} of {len(first)} seeds<br>"
            "round %{customdata[0]:,}{x}",
            "groups": [f"c{number}", TARGET],
        }
        chart.traces.append(trace)


def _first_reached(values: Array, target: float, metric: str) -> int | None:
    reached = np.flatnonzero(values >= target if higher_is_better(metric) else values <= target)
    return int(reached[0]) if len(reached) else None


def _trace(curve: Curve, group: str, at: str, y: Array) -> dict[str, Any]:
    # A metric that is measured in some rounds only is drawn from each measurement to the next.
    gaps = {} if curve.metric in METRIC_NAMES else {"connectgaps": True}
    name = {"type": "scatter", "name": html_text(measured_label(curve)), "at": at, "groups": [group]}
    return {**name, "y": json_numbers(y), **gaps}
