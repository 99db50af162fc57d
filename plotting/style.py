"""How methods look: one colour and marker each, the same in every figure and distinguishable by the colour-blind."""

from __future__ import annotations

import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product

import matplotlib

# Okabe and Ito's palette (2008) without yellow, which is too faint for a line on white.
_BLUE, _VERMILLION, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_ORANGE, _SKY, _BLACK, _GREY = "#E69F00", "#56B4E9", "#000000", "#7F7F7F"
# Tol's muted palette (2021), for methods that are not listed: none of these looks like a listed one.
_SPARE = tuple(product(("#332288", "#882255", "#999933", "#44AA99", "#AA4499", "#117733"), ("<", ">", "p", "d", "8")))
_DASHES = ("-", "--", ":", "-.")

TEXT_WIDTH = 6.4
"""Inches: a figure of this width keeps its letters readable in one column of a page or on a slide."""


@dataclass(frozen=True)
class MethodStyle:
    """A method's name in legends, its colour and its marker."""

    label: str
    color: str
    marker: str


METHODS = {
    "centralized": MethodStyle("Centralized", _BLACK, "*"),
    "local_only": MethodStyle("Local only", _GREY, "x"),
    "fed_avg": MethodStyle("FedAvg", _BLUE, "o"),
    "fed_prox": MethodStyle("FedProx", _BLUE, "P"),
    "scaffold": MethodStyle("SCAFFOLD", _SKY, "h"),
    "sl": MethodStyle("SL", _PURPLE, "X"),
    "sl_multi_server": MethodStyle("SplitFed v1 (multi-server)", _GREEN, "s"),
    "sl_single_server": MethodStyle("SplitFed v2 (single-server)", _PURPLE, "D"),
    "cse_fsl": MethodStyle("CSE-FSL", _ORANGE, "^"),
    "fsl_sage": MethodStyle("FSL-SAGE", _VERMILLION, "v"),
}


def method_style(name: str) -> MethodStyle:
    """The look of a method; one that is not listed gets a look that follows from its name alone, always the same."""
    if name in METHODS:
        return METHODS[name]
    color, marker = _SPARE[zlib.crc32(name.encode()) % len(_SPARE)]
    return MethodStyle(name, color, marker)


def dashes(variant: int) -> str:
    """Line style of the n-th variant (from 0) of one method in a figure."""
    return _DASHES[variant % len(_DASHES)]


def applied() -> AbstractContextManager[None]:
    """Settings that every figure is drawn and saved under; the caller's own come back afterwards."""
    return matplotlib.rc_context(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.6,
            "lines.markersize": 5,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "savefig.dpi": 200,
            # Letters stay letters in the files of vector figures, and the same figure gives the same bytes.
            "pdf.fonttype": 42,
            "svg.fonttype": "none",
            "svg.hashsalt": "cutlayer",
        }
    )
