"""The chart of a report that shows how fast fine-tuning works: accuracy of clients' models by epochs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from cutlayer.plotting.curves import Curve
from cutlayer.plotting.figures.axes import line_look
from cutlayer.plotting.figures.fine_tuning import banded
from cutlayer.plotting.figures.tuned import Tuned, make_tuned
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
from cutlayer.plotting.report_style import BAND, LegendEntry, faint, line_style

_METRIC = "local_acc/mean"
_TICKS = 12
"""That have room on a narrow page."""


def tuning_charts(curves: Sequence[Curve]) -> list[Chart]:
    """Mean accuracy over clients against epochs of fine-tuning; none where no run was evaluated after several."""
    tuned = make_tuned(curves)
    if not any(len(each.points) > 1 for each in tuned):
        return []
    ticks = sorted({point.epochs for each in tuned for point in each.points})
    # Only of ticks that it chose itself the library leaves out those that have no room.
    room = _TICKS * min(b - a for a, b in pairwise(ticks)) >= ticks[-1] - ticks[0]
    marks = {"tickvals": ticks, "ticktext": [str(tick) for tick in ticks]} if room else {"tickformat": ","}
    seeds = " Means over seeds." if any(len(each.runs) > 1 for each in tuned) else ""
    chart = Chart(
        name="fine_tuning",
        heading="Accuracy of clients' models against fine-tuning",
        description="mean accuracy on local test sets by epochs of fine-tuning; the figures are in the table",
        axes={
            "epochs": Axis(
                "epochs", "epochs of fine-tuning", "epochs of fine-tuning: %{x}", marks | {"zeroline": False}
            )
        },
        y=metric_layout(_METRIC),
        note=f"Mean over clients of the accuracy on their own test sets.{seeds}",
    )
    for number, each in enumerate(tuned):
        _add(chart, f"t{number}", each, banded(tuned))
    if banded(tuned):
        chart.keys.append(LegendEntry(BAND, "± standard deviation over clients", GREY, linestyle="-", band=True))
    return [chart]


def _add(chart: Chart, group: str, tuned: Tuned, with_band: bool) -> None:
    style = line_look(tuned.curve.method, tuned.variant)
    chart.keys.append(LegendEntry(group, tuned.name, **style))
    chart.columns[group] = {"epochs": json_numbers(point.epochs for point in tuned.points)}
    mean, spread = (np.asarray([getattr(point, name) for point in tuned.points]) for name in ("mean", "std"))
    trace: dict[str, Any] = {"type": "scatter", "name": html_text(tuned.name), "at": group, "groups": [group]}
    if with_band:
        for side, filling in ((-1.0, {}), (1.0, {"fill": "tonexty", "fillcolor": faint(style["color"])})):
            line = {"mode": "lines", "line": {"width": 0, "color": style["color"]}, "hoverinfo": "skip", **filling}
            bound = json_numbers(np.clip(mean + side * spread, 0, 1))
            chart.traces.append(trace | line | {"y": bound, "groups": [group, BAND]})
    shown = value_format(_METRIC)
    reported = f"{HOVER_NAME}mean %{{y:{shown}}} ± %{{customdata[0]:{shown}}} over clients"
    details = {
        "mode": "lines+markers",
        "y": json_numbers(mean),
        "customdata": [json_numbers([point.std, point.worst]) for point in tuned.points],
        "hovertemplate": f"{reported}<br>worst tenth %{{customdata[1]:{shown}}}{{x}}<br>seeds: {len(tuned.runs)}",
    }
    chart.traces.append(trace | line_style(**style) | details)
