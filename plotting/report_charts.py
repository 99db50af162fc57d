"""Charts of a report as plain data: what the script in the page hands to the chart library."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import Any

from cutlayer.plotting.report_style import LegendEntry, faint, on_dark
from cutlayer.plotting.style import is_share, metric_label

GREY = "#6b6f76"
HOVER_NAME = "<extra></extra><b>%{fullData.name}</b><br>"
"""A curve's name in the first line of what the pointer shows, and not beside it, where a narrow page has no room."""
# Beyond this ratio between the dearest and the cheapest method, the cheap one is lost in the corner of a linear axis.
LOG_RATIO = 12.0
_DIGITS = 9


@dataclass(frozen=True)
class Axis:
    """One x axis of a chart.

    Attributes:
        label: in the list to choose from. title: beside the axis, in one or more
            lines, with the unit. hover: how a value on it is shown, in
            the library's words. layout: further properties of the axis. log: whether it starts logarithmic.
    """

    label: str
    title: str
    hover: str = "%{x}"
    layout: dict[str, Any] = field(default_factory=dict[str, Any])
    log: bool = False

    def spec(self) -> dict[str, Any]:
        """What the page's script draws from."""
        title = {"text": html_text(self.title).replace("\n", "<br>"), "standoff": 8}
        layout = {"automargin": True, "title": title, "tickangle": 0, **self.layout}
        return {"layout": layout, "hover": self.hover, "log": self.log}


@dataclass
class Chart:
    """One chart and its controls.

    Attributes:
        name: its id in the page. heading: above it. description: what it shows, for those who cannot see it.
        axes: by name the x axes to choose from. y: layout of the y axis.
        log_x, log_y: whether the reader may make these axes logarithmic.
        keys: its legend. note: below it. height: pixels.
        columns: by name for each axis the values [n] of the traces that name it under `at`; a trace without a column
            for an axis is not drawn on it.
        traces, shapes: of the library; `groups` of each are the keys that show and hide it.
    """

    name: str
    heading: str
    description: str
    axes: dict[str, Axis]
    y: dict[str, Any]
    log_x: bool = False
    log_y: bool = False
    note: str = ""
    height: int = 420
    keys: list[LegendEntry] = field(default_factory=list[LegendEntry])
    columns: dict[str, dict[str, list[Any]]] = field(default_factory=dict[str, dict[str, list[Any]]])
    traces: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    shapes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def spec(self) -> dict[str, Any]:
        """What the page's script draws from."""
        layout = {
            "height": self.height,
            "margin": {"l": 10, "r": 14, "t": 30, "b": 10},
            "showlegend": False,
            "hovermode": "closest",
            "hoverlabel": {"align": "left", "namelength": -1},
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "barmode": "stack",
            "bargap": 0.3,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "shapes": self.shapes,
            "yaxis": {"automargin": True, **self.y},
        }
        axes = {name: axis.spec() for name, axis in self.axes.items()}
        return {"axes": axes, "columns": self.columns, "traces": self.traces, "layout": layout}

    def colors_on_dark(self) -> dict[str, str]:
        """By colour that is another on a dark page that other one."""
        found = {key.color: key.color_on_dark for key in self.keys} | {GREY: on_dark(GREY)}
        found |= {faint(color): faint(other) for color, other in found.items()}
        return {color: other for color, other in found.items() if color != other}


def html_text(value: object) -> str:
    """A value as a text of the library, in which tags would be marks."""
    return escape(str(value), quote=False)


def json_numbers(values: Iterable[float]) -> list[float | int | None]:
    """Values as JSON's numbers of nine digits, whole ones of any length; what is not finite as null."""
    return [_number(float(value)) for value in values]


def _number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.{_DIGITS}g}")


def byte_axis(label: str, title: str, log: bool = False) -> Axis:
    """An axis of bytes: each tick with the unit that fits it, values to the byte."""
    layout = {"tickformat": "~s", "ticksuffix": "B", "rangemode": "tozero"}
    return Axis(label, title, "%{x:.5~s}B (%{x:,} bytes)", layout, log)


def metric_layout(metric: str) -> dict[str, Any]:
    """Layout of a y axis that shows a metric."""
    return {
        "title": {"text": html_text(metric_label(metric)), "standoff": 8},
        "tickformat": "~%" if is_share(metric) else "~g",
    }


def value_format(metric: str) -> str:
    """How the library shows a metric's value."""
    return ".3~%" if is_share(metric) else ".6~g"
