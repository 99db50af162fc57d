"""Text that fits: wrapped titles and labels, and a legend below the axes for which the figure grows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from cutlayer.plotting.style import TEXT_WIDTH

AXES_HEIGHT = 3.2
"""Inches of a figure of curves without title and legend."""
_MARGIN = 0.1
_TITLE, _LABEL, _LEGEND = 10.0, 9.0, 8.0
_MEASURE = TextToPath()


def new_figure(height: float = AXES_HEIGHT) -> Figure:
    """An empty figure of the house's width."""
    figure = Figure(figsize=(TEXT_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def grow(figure: Figure, inches: float) -> None:
    """Make a figure higher."""
    figure.set_figheight(figure.get_figheight() + inches)


def new_height(figure: Figure, inches: float) -> None:
    """Set the height that the axes with their labels take; to be called before anything that grows the figure."""
    figure.set_figheight(inches)


@lru_cache(maxsize=4096)
def text_width(text: str, size: float) -> float:
    """Inches that a line of text takes at a font size in points."""
    return _MEASURE.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0] / 72


def wrapped(text: str, inches: float, size: float) -> str:
    """The text broken into lines that are no wider than `inches`, between words where that is possible.

    No more than a line or two is measured at a time: the time is that of the text's length.
    """
    lines = [""]
    for word in re.findall(r"\S+\s*", text):
        if lines[-1] and _fits(lines[-1] + word, inches, size) < len((lines[-1] + word).rstrip()):
            lines.append("")
        line = lines.pop() + word
        while (fits := _fits(line, inches, size)) < len(line.rstrip()) and len(line) > 1:
            cut = max(line[:fits].rfind(sign) for sign in "/-_.=,") + 1
            lines.append(line[: cut or fits])
            line = line[cut or fits :]
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


def _fits(text: str, inches: float, size: float) -> int:
    """Characters of a text, without space at its end, that are no wider than `inches`; at least one."""
    text = text.rstrip()
    low, high = 1, min(16, len(text))
    while high < len(text) and text_width(text[:high], size) <= inches:
        low, high = high, min(2 * high, len(text))
    if text_width(text[:high], size) <= inches:
        return max(high, 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if text_width(text[:middle], size) <= inches else (low, middle)
    return low


def put_title(figure: Figure, title: str) -> None:
    """A title above everything; the figure grows for it."""
    if title:
        lines = wrapped(title, TEXT_WIDTH - 2 * _MARGIN, _TITLE)
        figure.suptitle(lines, fontsize=_TITLE)
        grow(figure, (lines.count("\n") + 1) * 1.3 * _TITLE / 72 + 0.05)


def axis_text(figure: Figure, *lines: str, width: float = 4.6) -> str:
    """Lines below an axis, e.g. its label and a remark, each wrapped; the figure grows for all but the first."""
    text = "\n".join(wrapped(line, width, _LABEL) for line in lines if line)
    grow(figure, text.count("\n") * 1.3 * _LABEL / 72)
    return text


def put_legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], title: str = "") -> None:
    """A legend below the axes, in as many columns as fit side by side; the figure grows for it."""
    if not handles:
        return
    # As matplotlib lays it out by default: a handle of 2 font sizes, 0.8 to its text, 2 between columns.
    handle, gap = 2.8 * _LEGEND / 72, 2.0 * _LEGEND / 72
    room = TEXT_WIDTH - 4 * _MARGIN
    texts = [wrapped(label, room - handle, _LEGEND) for label in labels]
    widths = [max(text_width(line, _LEGEND) for line in text.split("\n")) + handle for text in texts]
    columns = next((n for n in range(min(4, len(texts)), 1, -1) if _breadth(widths, n, gap) <= room), 1)
    options: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "alignment": "left"}
    if title:
        options |= {"title": wrapped(title, room, _LEGEND), "title_fontsize": _LEGEND}
    legend = figure.legend(handles, texts, **options)
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    grow(figure, legend.get_window_extent(canvas.get_renderer()).height / figure.dpi + 0.05)


def _breadth(widths: Sequence[float], columns: int, gap: float) -> float:
    """Inches of a legend whose entries fill one column after the other, as even as matplotlib makes them."""
    long, rest = divmod(len(widths), columns)
    ends = [0]
    for column in range(columns):
        ends.append(ends[-1] + long + (column < rest))
    parts = [widths[start:end] for start, end in pairwise(ends)]
    return sum(max(part) for part in parts if part) + gap * (columns - 1)
