"""How methods look: one colour and marker each, the same in every figure and distinguishable by the colour-blind."""

from __future__ import annotations

import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product

import matplotlib
from matplotlib.colors import to_hex, to_rgb

# Okabe and Ito's palette (2008) without yellow, which is too faint for a line on white, and three more that stay apart
# from it and from each other under red-green blindness.
_BLUE, _VERMILLION, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_ORANGE, _SKY, _BLACK = "#E69F00", "#56B4E9", "#000000"
_GREY, _NAVY, _INDIGO = "#595959", "#003E5C", "#4B0082"
# For methods of personalisation, found by a search: under red-green blindness too each is further than 15 in CIELAB
# from every other colour of this file.
_RED, _MAROON, _SAND, _FOREST = "#B81400", "#660A00", "#C2AD70", "#005229"
_BRIGHT_BLUE, _VIOLET, _PERIWINKLE, _INK = "#1F00F5", "#5C3DD6", "#7A85FF", "#010941"
# For methods of features, adapters and privacy, found likewise.
_LEAF, _SLATE, _MAGENTA, _OCHRE, _ULTRAMARINE, _PINK = "#338844", "#223333", "#AA0088", "#DD9944", "#3300CC", "#EE8899"
# Tol's muted palette (2021), for methods that are not listed: none of these looks like a listed one.
_SPARE = tuple(product(("#332288", "#882255", "#999933", "#44AA99", "#AA4499", "#117733"), ("<", ">", "p", "d", "8")))
_DASHES = ("-", "--", ":", "-.")
# Share of white (above 0) or black (below) that is mixed into a method's colour; their number has no common divisor
# with that of the dashes. Where there is no line, markers change after all shades were used.
_SHADES = (0.0, 0.45, -0.45)
_MARKERS = ("o", "^", "s", "X", "D", "*")
_OUTLINES = ("o8hHp", "^", "v", "<", ">", "s", "Dd", "xX", "+P", "*")

_METRICS = {
    "test_acc": "test accuracy",
    "test_loss": "test loss (nats)",
    "train_loss": "training loss (nats)",
    "val_acc": "validation accuracy",
    "val_loss": "validation loss (nats)",
    "client_acc": "accuracy of each client's own model",
    "local_acc": "accuracy on local test sets",
    "personal_acc": "accuracy through each client's own body",
    "personal_local_acc": "accuracy through each client's own body on local test sets",
}
_LONGEST = 120
_SPREADS = {"mean": "mean", "std": "standard deviation", "worst_decile": "worst tenth of clients"}

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
    "fed_prox": MethodStyle("FedProx", _NAVY, "P"),
    "scaffold": MethodStyle("SCAFFOLD", _SKY, "h"),
    "sl": MethodStyle("SL", _INDIGO, "X"),
    "sl_multi_server": MethodStyle("SplitFed v1 (multi-server)", _GREEN, "s"),
    "sl_single_server": MethodStyle("SplitFed v2 (single-server)", _PURPLE, "D"),
    "cse_fsl": MethodStyle("CSE-FSL", _ORANGE, "^"),
    "fsl_sage": MethodStyle("FSL-SAGE", _VERMILLION, "v"),
    "fed_babu": MethodStyle("FedBABU", _RED, "<"),
    "fed_per": MethodStyle("FedPer", _SAND, ">"),
    "fed_rep": MethodStyle("FedRep", _FOREST, "p"),
    "lg_fed_avg": MethodStyle("LG-FedAvg", _PERIWINKLE, "d"),
    "per_fed_avg": MethodStyle("Per-FedAvg", _MAROON, "+"),
    "ditto": MethodStyle("Ditto", _BRIGHT_BLUE, "8"),
    "mhmd": MethodStyle("MHMD", _VIOLET, "H"),
    "fsmkd": MethodStyle("FSMKD", _INK, "D"),
    "fl_moco": MethodStyle("FL-MoCo", _LEAF, "o"),
    "moco_sfl": MethodStyle("MocoSFL", _PINK, "P"),
    "flora": MethodStyle("FLoRA", _OCHRE, "X"),
    "fed_sa_lora": MethodStyle("FedSA-LoRA", _ULTRAMARINE, "^"),
    "ressfl": MethodStyle("ResSFL", _SLATE, "v"),
    "sl_u_shape": MethodStyle("SplitFed v2, U-shaped", _MAGENTA, "s"),
}


def method_style(name: str) -> MethodStyle:
    """The look of a method; one that is not listed gets a look that follows from its name alone, always the same."""
    if name in METHODS:
        return METHODS[name]
    color, marker = _SPARE[zlib.crc32(name.encode()) % len(_SPARE)]
    return MethodStyle(shortened(name), color, marker)


def shortened(text: str) -> str:
    """A name that fits into a legend: a long one is cut and gets a number that follows from it all."""
    number = f"\N{HORIZONTAL ELLIPSIS} #{zlib.crc32(text.encode()):08x}"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + number


def marker_of(marker: str, variant: int) -> str:
    """The marker of the n-th variant (from 0) of a method: its own for three shades, then one of another outline."""
    alike = next((each for each in _OUTLINES if marker in each), marker)
    others = [each for each in _MARKERS if each not in alike]
    return [marker, *others][variant // len(_SHADES) % (1 + len(others))]


def dashes(variant: int) -> str:
    """Line style of the n-th variant (from 0) of one method in a figure."""
    return _DASHES[variant % len(_DASHES)]


def shade(color: str, variant: int) -> str:
    """The colour of the n-th variant (from 0) of a method: its own, a lighter or a darker one."""
    share = _SHADES[variant % len(_SHADES)]
    # What is dark already is made lighter in two degrees.
    if sum(to_rgb(color)) < 1 and share < 0:
        share = 0.7
    end = 1.0 if share > 0 else 0.0
    red, green, blue = (value + abs(share) * (end - value) for value in to_rgb(color))
    return to_hex((red, green, blue))


def metric_label(metric: str) -> str:
    """A metric in plain words with its unit, e.g. "test accuracy"; one that is not known by its name."""
    name, _, spread = metric.partition("/")
    if name not in _METRICS:
        return shortened(metric)
    return f"{_METRICS[name]}, {_SPREADS.get(spread, shortened(spread))}" if spread else _METRICS[name]


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction that reads best in percent."""
    return metric.partition("/")[0].endswith("acc")


def format_metric(metric: str, value: float) -> str:
    """A value of a metric for people, e.g. "81.3%" or "0.275"."""
    return f"{100 * value:.4g}%" if is_share(metric) else f"{value:.4g}"


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
            # Markers without an inside, such as crosses, stand out from a line of their colour.
            "lines.markeredgewidth": 1.25,
            # Names of methods and settings are no formulas.
            "text.parse_math": False,
            "hatch.linewidth": 0.7,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "savefig.dpi": 200,
            # Letters stay letters in the files of vector figures, and the same figure gives the same bytes.
            "pdf.fonttype": 42,
            "svg.fonttype": "none",
            "svg.hashsalt": "cutlayer",
        }
    )
