"""Bars: where the time of a round goes, and what kinds of messages carry the bytes of a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation, Transform

from cutlayer.plotting.curves import Curve
from cutlayer.plotting.figures.axes import Unit, bytes_unit, label_of, line_look, seconds_unit
from cutlayer.plotting.figures.base import Options, register, without
from cutlayer.plotting.figures.layout import axis_text, new_height, put_legend, text_width, wrapped
from cutlayer.plotting.timing import ROUND_PARTS, Link, format_in_unit, time_parts
from cutlayer.runtime.ground.units import format_bytes

_PART_LABELS = {
    "client": "clients' computing",
    "server": "server's computing",
    "transfer": "transfer",
    "waiting": "waiting for round trips",
}
# Parts of a round and kinds of message are no methods: greys, or Tol's light colours (2021), and hatches.
EDGE = "#3B4A5A"
_PARTS: dict[str, dict[str, Any]] = {
    "client": {"facecolor": "#3B4A5A"},
    "server": {"facecolor": "#8FA3B8"},
    "transfer": {"facecolor": "#DCE3EA", "hatch": "////"},
    "waiting": {"facecolor": "#FFFFFF", "hatch": ".."},
}
_KINDS = ("#77AADD", "#EEDD88", "#EE8866", "#44BB99", "#FFAABB", "#BBCC33", "#99DDFF", "#AAAA00")
_NOUNS = {"smashed": "activations", "gradient": "gradients", "align": "alignment"}
_ANSWERED = ("smashed", "gradient")
BAR = 0.2
"""Height of a bar in the units of `named_rows`."""
_NAMES_WIDTH = 2.1
ROWS_WIDTH = 3.7
"""Inches that the axes beside the names of `named_rows` have at least, and so the text below them."""
_TICK, _NUMBER = 9.0, 8.0


def _parts(curve: Curve, link: Link) -> dict[str, float] | None:
    """Seconds of a round by part, mean over seeds."""
    found = [parts for run in curve.runs if (parts := time_parts(run.results, link)) is not None]
    return {name: float(np.mean([parts[name] for parts in found])) for name in ROUND_PARTS} if found else None


def _any_parts(curves: Sequence[Curve], options: Options) -> bool:
    return any((parts := _parts(curve, options.link)) and sum(parts.values()) > 0 for curve in curves)


@register("latency", "a run that recorded its seconds, bytes and round trips", _any_parts)
def latency(figure: Figure, curves: Sequence[Curve], options: Options) -> None:
    """Seconds of one round by what takes them, for each method, at the given link."""
    found = [(curve, _parts(curve, options.link)) for curve in curves]
    bars = [(curve, parts) for curve, parts in found if parts is not None]
    missing = [label_of(curve) for curve, parts in found if parts is None]
    axes = figure.add_subplot()
    unit = _stack(figure, axes, bars, _PARTS, seconds_unit, format_in_unit)
    note = f"not drawn, as no time was recorded: {'; '.join(missing)}" if missing else ""
    link = f"each client's link: {options.link.label}"
    axes.set_xlabel(axis_text(figure, f"simulated time of one round ({unit})", link, note, width=ROWS_WIDTH))
    put_legend(figure, _patches(_PARTS), [_PART_LABELS[name] for name in _PARTS])


def traffic_of(curve: Curve, without_fields: Sequence[str]) -> dict[str, float]:
    """Bytes of the whole run by "direction, kind", mean over seeds; what clients report of themselves left out."""
    total: dict[str, float] = {}
    for run in curve.runs:
        for name, counts in dict(run.results.get("traffic") or {}).items():
            direction, kind, field = name.split("/", 2)
            if kind != "metrics" and field not in without_fields:
                key = f"{kind}, {direction}"
                total[key] = total.get(key, 0.0) + counts[-1] / len(curve.runs)
    return {key: count for key, count in total.items() if count > 0}


def _any_traffic(curves: Sequence[Curve], options: Options) -> bool:
    return any(traffic_of(curve, options.without_fields) for curve in curves)


@register("traffic_kinds", "a run that recorded its bytes by kind", _any_traffic, charted=True)
def traffic_kinds(figure: Figure, curves: Sequence[Curve], options: Options) -> None:
    """Bytes of the whole run by kind of message and direction, for each method."""
    found = [(curve, traffic_of(curve, options.without_fields)) for curve in curves]
    bars = [(curve, parts) for curve, parts in found if parts or not curve.sends]
    missing = [label_of(curve) for curve, parts in found if not parts and curve.sends]
    looks = kind_looks({name for _, parts in bars for name in parts})
    axes = figure.add_subplot()
    unit = _stack(figure, axes, bars, looks, bytes_unit, lambda count: format_bytes(count) if count else "nothing")
    note = f"not drawn, as no kinds were recorded: {'; '.join(missing)}" if missing else ""
    axes.set_xlabel(axis_text(figure, f"communication{without(options)}, whole run ({unit})", note, width=ROWS_WIDTH))
    put_legend(figure, _patches(looks), [kind_label(name) for name in looks], "kind of message")


def kind_label(name: str) -> str:
    """A kind of message and its direction in plain words: "activations, to the server" for "smashed, up"."""
    kind, _, direction = name.rpartition(", ")
    noun = _NOUNS.get(kind, kind)
    if direction == "up":
        return f"{noun}, to the server"
    return f"{f'answers to {noun}' if kind in _ANSWERED else noun}, to clients"


def kind_looks(names: Collection[str]) -> dict[str, dict[str, Any]]:
    """A colour for each kind, hatched on the way down."""
    kinds = sorted({name.rpartition(", ")[0] for name in names})
    looks: dict[str, dict[str, Any]] = {}
    for name in sorted(names):
        kind, _, direction = name.rpartition(", ")
        hatch = "////" if direction == "down" else None
        looks[name] = {"facecolor": _KINDS[kinds.index(kind) % len(_KINDS)], "hatch": hatch}
    return looks


def _patches(looks: Mapping[str, dict[str, Any]]) -> list[Patch]:
    return [Patch(edgecolor=EDGE, linewidth=0.6, **look) for look in looks.values()]


def _stack(
    figure: Figure,
    axes: Axes,
    bars: Sequence[tuple[Curve, Mapping[str, float]]],
    looks: Mapping[str, dict[str, Any]],
    unit: Unit,
    reported: Callable[[float], str],
) -> str:
    """Horizontal stacked bars with their sums beside them; returns the unit of the axis."""
    totals = [sum(parts.values()) for _, parts in bars]
    size, name = unit(max(totals))
    rows = method_rows(figure, axes, [curve for curve, _ in bars])
    left = np.zeros(len(bars))
    for part, style in looks.items():
        widths = np.asarray([parts.get(part, 0.0) for _, parts in bars]) / size
        axes.barh(rows, widths, BAR, left=left, edgecolor=EDGE, linewidth=0.4, **style)
        left += widths
    texts = [reported(total) for total in totals]
    for row, total, text in zip(rows, left, texts, strict=True):
        axes.annotate(text, (total, row), (4, 0), textcoords="offset points", va="center", fontsize=_NUMBER)
    # Room for the longest sum beyond the longest bar, on axes of no less than four inches.
    room = max(text_width(text, _NUMBER) for text in texts) + 0.15
    axes.set_xlim(0, max(left) * 4 / (4 - room))
    return name


def method_rows(figure: Figure, axes: Axes, curves: Sequence[Curve]) -> list[float]:
    """One row for each curve, as `named_rows`."""
    return named_rows(figure, axes, [(label_of(curve), curve.method, curve.variant) for curve in curves])


def named_rows(figure: Figure, axes: Axes, entries: Sequence[tuple[str, str, int]], least: float = 0.0) -> list[float]:
    """One row for each entry, the first on top, named at the left beside its marker; sets the figure's height.

    Args:
        entries: of each row the name, the method and the variant that it looks like.
        least: inches that a row is high at least.

    Returns:
        The places of the rows' middles on the y axis, in inches.
    """
    names = [wrapped(name, _NAMES_WIDTH, _TICK) for name, *_ in entries]
    edges = np.cumsum([0.0, *(max(least, 0.14 + 0.17 * (name.count("\n") + 1)) for name in names)])
    rows = [float(-(a + b) / 2) for a, b in pairwise(edges)]
    axes.set_ylim(-edges[-1] - 0.05, 0.05)
    axes.set_yticks(rows, names)
    axes.tick_params(axis="y", length=0, pad=14)
    axes.grid(visible=False, axis="y")
    for row, (_, method, variant) in zip(rows, entries, strict=True):
        style = line_look(method, variant) | {"linestyle": "", "clip_on": False, "markersize": 6}
        axes.plot([0], [row], transform=_beside_axis(figure, axes), **style)
    new_height(figure, max(1.4, float(edges[-1]) + 0.75))
    return rows


def _beside_axis(figure: Figure, axes: Axes) -> Transform:
    return axes.get_yaxis_transform() + ScaledTranslation(-9 / 72, 0, figure.dpi_scale_trans)
