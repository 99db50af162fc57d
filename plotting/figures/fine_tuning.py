"""Personalisation: what clients gain from fine-tuning a model of their own, by epochs and from client to client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cutlayer.plotting.curves import Curve
from cutlayer.plotting.figures.axes import Percent, by_right_end, line_look
from cutlayer.plotting.figures.bars import ROWS_WIDTH, named_rows
from cutlayer.plotting.figures.base import Options, register
from cutlayer.plotting.figures.groups import put_ticks
from cutlayer.plotting.figures.layout import axis_text, grow, put_legend
from cutlayer.plotting.figures.tuned import Tuned, make_tuned, without_tuning
from cutlayer.plotting.personalized import Point
from cutlayer.plotting.style import metric_label

# Clients differ so much that more bands than these hide each other and the lines.
_BANDS = 3
_ROW, _BAR = 0.6, 0.5
"""Inches of a histogram with its margin, and of the highest bar."""
_GREY = "#444444"
_LABEL = f"{metric_label('local_acc')},\nmean over clients"


def banded(tuned: Sequence[Tuned]) -> bool:
    """Whether there is room for a band about each line."""
    return len(tuned) <= _BANDS


def _several_epochs(curves: Sequence[Curve], _: Options) -> bool:
    return any(len(each.points) > 1 for each in make_tuned(curves))


@register(
    "fine_tuning", "a run whose clients were evaluated after several numbers of epochs", _several_epochs, charted=True
)
def fine_tuning(figure: Figure, curves: Sequence[Curve], _: Options) -> None:
    """Mean accuracy of the clients' models against epochs of fine-tuning."""
    tuned = make_tuned(curves)
    axes = figure.add_subplot()
    handles: list[Line2D] = []
    for each in tuned:
        epochs = [point.epochs for point in each.points]
        mean, spread = (np.asarray([getattr(point, name) for point in each.points]) for name in ("mean", "std"))
        style = line_look(each.curve.method, each.variant)
        handles += axes.plot(epochs, mean, **style)
        if banded(tuned):
            low, high = np.clip(mean - spread, 0, 1), np.clip(mean + spread, 0, 1)
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.yaxis.set_major_formatter(Percent())
    axes.set_ylabel(_LABEL)
    ticks = sorted({point.epochs for each in tuned for point in each.points})
    grow(figure, 0.17 * (put_ticks(axes, ticks, [str(tick) for tick in ticks]) - 1))
    axes.set_xlabel(axis_text(figure, "epochs of fine-tuning", _missing(curves, tuned, "evaluation of fine-tuning")))
    notes = ["bands: one standard deviation over clients"] * banded(tuned) + _seeds(tuned)
    put_legend(figure, *by_right_end(handles, [each.name for each in tuned]), "; ".join(notes))


def _any_histogram(curves: Sequence[Curve], _: Options) -> bool:
    return any(_drawable(each) for each in make_tuned(curves))


def _drawable(tuned: Tuned) -> bool:
    return bool(tuned.points[-1].shares)


@register("client_histogram", "a run whose clients were evaluated with models of their own", _any_histogram)
def client_histogram(figure: Figure, curves: Sequence[Curve], _: Options) -> None:
    """How many clients have which accuracy before and after fine-tuning: one histogram above the other."""
    tuned = [each for each in make_tuned(curves) if _drawable(each)]
    axes = figure.add_subplot()
    ends = {each.after.epochs for each in tuned if each.after is not None}
    several = len(ends) > 1
    names = [each.name + (f", {_epochs(each.after.epochs)}" if each.after and several else "") for each in tuned]
    entries = [(name, each.curve.method, each.variant) for name, each in zip(names, tuned, strict=True)]
    rows = named_rows(figure, axes, entries, _ROW)
    shown = [point for each in tuned for point in (each.before, each.after) if point is not None and point.shares]
    highest = max(share for point in shown for share in point.shares)
    for row, each in zip(rows, tuned, strict=True):
        floor = row - _BAR / 2
        if each.after is not None:
            color = line_look(each.curve.method, each.variant)["color"]
            filled = {"facecolor": (color, 0.35), "edgecolor": color}
            _draw_shares(axes, each.after, floor, highest, color, {"fill": True, "linewidth": 0.8, **filled})
        if each.before is not None and each.before.shares:
            _draw_shares(axes, each.before, floor, highest, _GREY, {"color": _GREY, "linewidth": 1.1})
        axes.axhline(floor, color="#999999", linewidth=0.5)
    taken = [edge for point in shown for edge in _taken(point)]
    axes.set_xlim(min(taken), max(taken))
    axes.xaxis.set_major_formatter(Percent())
    note = _missing(curves, tuned, "histogram of clients")
    axes.set_xlabel(axis_text(figure, metric_label("local_acc"), note, width=ROWS_WIDTH))
    after = f"after {_epochs(next(iter(ends)))}" if len(ends) == 1 else "after fine-tuning"
    note = f"height: share of the clients, {100 * highest:.0f}% where it is highest"
    put_legend(figure, *_legend(tuned, after), "; ".join([note, *_seeds(tuned)]))


def _draw_shares(axes: Axes, point: Point, floor: float, highest: float, color: str, style: dict[str, Any]) -> None:
    """One histogram [bins] that stands on `floor`, and a line at the mean."""
    axes.stairs(floor + np.asarray(point.shares) / highest * _BAR, point.edges, baseline=floor, **style)
    dashes = "-" if "fill" in style else (0, (2, 1.5))
    axes.plot([point.mean] * 2, [floor, floor + _BAR], color=color, linewidth=1.4, linestyle=dashes)


def _taken(point: Point) -> list[float]:
    """The edges of the bins that hold a client."""
    held = [at for at, share in enumerate(point.shares) if share > 0]
    return [point.edges[held[0]], point.edges[held[-1] + 1]]


def _legend(tuned: Sequence[Tuned], after: str) -> tuple[list[Artist], list[str]]:
    handles: list[Artist] = []
    labels: list[str] = []
    if any(each.before is not None for each in tuned):
        handles += [Patch(fill=False, edgecolor=_GREY, linewidth=1.1), _upright((0, (2, 1.5)))]
        labels += ["before fine-tuning", "mean before"]
    if any(each.after is not None for each in tuned):
        handles += [Patch(facecolor=(_GREY, 0.35), edgecolor=_GREY, linewidth=0.8), _upright("-")]
        labels += [after, "mean after"]
    return handles, labels


def _upright(linestyle: Any) -> Line2D:
    return Line2D([], [], color=_GREY, linewidth=1.4, linestyle=linestyle)


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' if count > 1 else ''}"


def _seeds(tuned: Sequence[Tuned]) -> list[str]:
    return ["mean over seeds"] if any(len(each.runs) > 1 for each in tuned) else []


def _missing(curves: Sequence[Curve], tuned: Sequence[Tuned], what: str) -> str:
    missing = without_tuning(curves, tuned)
    return f"not drawn, as there is no {what}: {'; '.join(missing)}" if missing else ""
