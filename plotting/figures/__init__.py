"""The figures: `FIGURES` lists those that `exp_configs.yaml` may name; each takes curves and fills a figure.

Every module of this package is imported, so that a new file registers itself.
"""

from cutlayer.plotting.figures.base import FIGURES, FigureKind, Options, make_figure, register
from cutlayer.plotting.figures.first import first_picture
from cutlayer.plotting.saving import FORMATS, save_figure
from cutlayer.runtime.ground.registry import import_modules

__all__ = [
    "FIGURES",
    "FORMATS",
    "FigureKind",
    "Options",
    "first_picture",
    "make_figure",
    "register",
    "save_figure",
]

import_modules(__name__, __path__)
