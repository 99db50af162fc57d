"""The figures: `FIGURES` lists those that `exp_configs.yaml` may name; each takes curves and fills a figure."""

from cutlayer.plotting.figures import bars, clients, fine_tuning, lines, settings
from cutlayer.plotting.figures.base import FIGURES, FigureKind, Options, make_figure, register
from cutlayer.plotting.figures.first import first_picture
from cutlayer.plotting.saving import FORMATS, save_figure

__all__ = [
    "FIGURES",
    "FORMATS",
    "FigureKind",
    "Options",
    "bars",
    "clients",
    "fine_tuning",
    "first_picture",
    "lines",
    "make_figure",
    "register",
    "save_figure",
    "settings",
]
