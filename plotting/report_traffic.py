"""The chart of a report that shows what was sent: bytes of a whole run by kind and direction, stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cutlayer.plotting.curves import Curve
from cutlayer.plotting.figures.axes import label_of
from cutlayer.plotting.figures.bars import EDGE, kind_label, kind_looks, traffic_of
from cutlayer.plotting.figures.base import Options, without
from cutlayer.plotting.figures.layout import wrapped
from cutlayer.plotting.report_charts import HOVER_NAME, Chart, byte_axis, html_text, json_numbers
from cutlayer.plotting.report_style import LegendEntry

_ROOM, _LINE, _GAP = 100, 17, 14
"""Pixels: of the chart without bars, of a line of a bar's name, and between names."""
_NAME, _POINTS = 1.7, 9.0
"""Inches of a bar's name and the size of its letters: on a page of 400 pixels half is left to the bars."""


def traffic_charts(curves: Sequence[Curve], options: Options) -> list[Chart]:
    """What each setting sent in a whole run, mean over seeds; none where no run recorded its bytes by kind."""
    found = [(curve, traffic_of(curve, options.without_fields)) for curve in curves]
    bars = [(curve, sent) for curve, sent in found if sent]
    if not bars:
        return []
    # Two curves may have one name, and then two bars: a place is a number.
    names = [wrapped(label_of(curve), _NAME, _POINTS).split("\n") for curve, _ in bars]
    places = list(range(len(bars)))
    ticks = {"tickvals": places, "ticktext": ["<br>".join(html_text(line) for line in lines) for lines in names]}
    mean = " Means over seeds." if any(len(curve.runs) > 1 for curve, _ in bars) else ""
    chart = Chart(
        name="traffic",
        heading="Communication by kind",
        description="bytes of the whole run by kind of message and direction; their sums are in the table",
        axes={"x": byte_axis("communication", "communication")},
        y={"autorange": "reversed", "showgrid": False, "zeroline": False, **ticks},
        note=f"Of the whole run{without(options)}, by kind of message.{mean}",
        # Bars are equally far apart, so that the longest name decides.
        height=_ROOM + len(names) * (_GAP + _LINE * max(map(len, names))),
    )
    for name, look in kind_looks({name for _, sent in bars for name in sent}).items():
        chart.keys.append(
            LegendEntry(name, kind_label(name), look["facecolor"], marker="s", hatched=bool(look["hatch"]))
        )
        chart.columns[name] = {"x": json_numbers(sent.get(name, 0.0) for _, sent in bars)}
        chart.traces.append(_bars(name, look, places, [html_text(label_of(curve)) for curve, _ in bars]))
    return [chart]


def _bars(name: str, look: Mapping[str, Any], places: list[int], texts: list[str]) -> dict[str, Any]:
    """The trace of one kind of message: a bar for each setting."""
    hatched = bool(look["hatch"])
    fill = {"color": look["facecolor"], "line": {"color": EDGE, "width": 1}}
    pattern = {"shape": "/" if hatched else "", "fgcolor": EDGE, "fillmode": "overlay", "size": 7, "solidity": 0.2}
    return {
        "type": "bar",
        "orientation": "h",
        "name": html_text(kind_label(name)),
        "at": name,
        "groups": [name],
        "y": places,
        "marker": fill | {"pattern": pattern},
        "text": texts,
        "textposition": "none",
        "hovertemplate": f"{HOVER_NAME}%{{text}}{{x}}",
    }
