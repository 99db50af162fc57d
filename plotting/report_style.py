"""How `plotting.style` looks in a report: its markers and dashes for the chart library and for legends, and colours for
a dark page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.colors import to_hex, to_rgb
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

# The chart library's name for each of matplotlib's markers.
SYMBOLS = {
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "d": "diamond-tall",
    "p": "pentagon",
    "8": "octagon",
    "^": "triangle-up",
    "v": "triangle-down",
    "<": "triangle-left",
    ">": "triangle-right",
    "*": "star",
    "h": "hexagon",
    "H": "hexagon2",
    "P": "cross",
    "X": "x",
    "x": "x-thin-open",
    "+": "cross-thin-open",
    "": "circle",
}
# For each of matplotlib's line styles the chart library's name and the strokes and gaps in a legend, in pixels.
BAND = "band"
"""The legend's group of the bands of a standard deviation."""
DASHES = {"-": ("solid", ""), "--": ("dash", "6 3"), ":": ("dot", "2 2"), "-.": ("dashdot", "6 2 2 2")}

_DARK_PAGE = "#16181c"
# Ratio of luminances at which a line stands out from its background (WCAG 2.2, 1.4.11).
_CONTRAST = 3.0
# Lightened, black would be another method's grey.
_BLACK_ON_DARK = "#e8e8e8"
_LETTERS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}


@dataclass(frozen=True)
class LegendEntry:
    """One entry of a legend.

    Attributes:
        group: what its button shows and hides. label: its text. color: "#rrggbb" on a light page.
        linestyle: matplotlib's of its line, "" for no line. band: whether the line is broad and faint.
        marker: one of matplotlib's, or "". hollow, hatched: whether the marker has no inside, or one of
            slanting lines.
    """

    group: str
    label: str
    color: str
    linestyle: str = ""
    band: bool = False
    marker: str = ""
    hollow: bool = False
    hatched: bool = False

    @property
    def color_on_dark(self) -> str:
        """Its colour on a dark page."""
        return on_dark(self.color)

    @property
    def outline(self) -> str:
        """The marker as the data of an SVG path around (0, 0), within 8 pixels."""
        return _outline(self.marker) if self.marker else ""

    @property
    def strokes(self) -> str:
        """Strokes and gaps of the line as SVG wants them; "" for an unbroken one."""
        return DASHES[self.linestyle][1] if self.linestyle else ""

    @property
    def filled(self) -> bool:
        """Whether the marker has an inside."""
        return not self.hollow and bool(self.marker) and MarkerStyle(self.marker).is_filled()


def on_dark(color: str) -> str:
    """A colour lightened until it stands out from a dark page; one that does already, unchanged."""
    parts = to_rgb(color)
    if not any(parts):
        return _BLACK_ON_DARK
    shares = (step / 20 for step in range(20))
    share = next(share for share in shares if _contrast(_mixed(parts, share)) >= _CONTRAST)
    return to_hex(_mixed(parts, share)) if share else color


def faint(color: str) -> str:
    """A colour that lets through what lies behind it."""
    red, green, blue = (round(255 * part) for part in to_rgb(color))
    return f"rgba({red},{green},{blue},0.18)"


def line_style(color: str, linestyle: str, marker: str) -> dict[str, Any]:
    """A line with markers, as attributes of the chart library's trace; arguments as of matplotlib's `Axes.plot`."""
    return {
        "line": {"color": color, "dash": DASHES[linestyle][0], "width": 2},
        "marker": {"color": color, "symbol": SYMBOLS[marker], "size": 8, "line": {"color": color, "width": 1.5}},
    }


def level_style(color: str, linestyle: str, marker: str) -> dict[str, Any]:
    """As `line_style`, of a level: dashed whatever the method's line is, with two markers."""
    style = line_style(color, linestyle, marker)
    style["line"] |= {"dash": "6px,4px", "width": 1.6}
    style["marker"]["maxdisplayed"] = 2
    return {"mode": "lines+markers", **style}


def hollow(color: str, marker: str) -> dict[str, Any]:
    """A large marker without an inside, as attributes of the chart library's trace."""
    symbol = f"{SYMBOLS[marker].removesuffix('-open')}-open"
    return {"marker": {"color": color, "symbol": symbol, "size": 13, "line": {"color": color, "width": 2}}}


def _outline(marker: str) -> str:
    style = MarkerStyle(marker)
    # Matplotlib counts upwards, SVG downwards.
    place = style.get_transform() + Affine2D().scale(8, -8)
    words: list[str] = []
    for points, code in style.get_path().transformed(place).iter_segments(simplify=False):
        numbers = " ".join(f"{number:.2f}" for number in points)
        words.append("Z" if code == Path.CLOSEPOLY else f"{_LETTERS[code]}{numbers}")
    return "".join(words)


def _mixed(color: tuple[float, float, float], share: float) -> tuple[float, float, float]:
    red, green, blue = (part + (1 - part) * share for part in color)
    return red, green, blue


def _contrast(color: tuple[float, float, float]) -> float:
    return (_luminance(color) + 0.05) / (_luminance(to_rgb(_DARK_PAGE)) + 0.05)


def _luminance(color: tuple[float, float, float]) -> float:
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
