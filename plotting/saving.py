"""Saving figures in several formats: laid out once, and with a font that vector files need not cut down each time."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager

from cutlayer.runtime.ground.files import written_whole

FORMATS = ("svg", "pdf", "png")
_DOTS = 20_000
"""Of a side of a picture."""
_FAMILY = "Cutlayer Figures"
# Latin, Greek, punctuation, arrows and mathematical signs.
_CHARACTERS = (*range(0x20, 0x250), *range(0x370, 0x400), *range(0x2010, 0x2060), *range(0x2190, 0x2270))


def save_figure(figure: Figure, stem: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Save as `stem` plus each format's ending; the same figure gives the same bytes. Returns the paths.

    To be called within `style.applied()`.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    engine, dpi = figure.get_layout_engine(), figure.dpi
    if engine is not None:
        engine.execute(figure)
    # `savefig` would lay it out for each format again, and draw it twice.
    figure.set_layout_engine("none")
    paths: list[Path] = []
    try:
        for ending in formats:
            paths.append(stem.with_name(f"{stem.name}.{ending}"))
            with written_whole(paths[-1]) as path:
                _SAVERS[ending](figure, path)
    finally:
        figure.dpi = dpi
        figure.set_layout_engine(engine)
    return paths


def as_svg(figure: Figure) -> bytes:
    """The figure as the content of an SVG file, as `save_figure` saves it."""
    with tempfile.TemporaryDirectory(prefix="cutlayer-figure-") as folder:
        return save_figure(figure, Path(folder) / "figure", ("svg",))[0].read_bytes()


def _svg(figure: Figure, path: Path) -> None:
    FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None})


def _pdf(figure: Figure, path: Path) -> None:
    families = [_small_font(), *matplotlib.rcParams["font.sans-serif"]]
    with matplotlib.rc_context({"font.sans-serif": families}):
        FigureCanvasPdf(figure).print_pdf(str(path), metadata={"CreationDate": None})


def _png(figure: Figure, path: Path) -> None:
    # A figure of hundreds of rows has fewer dots to an inch: all of them are in memory at once.
    figure.dpi = min(matplotlib.rcParams["savefig.dpi"], _DOTS / max(figure.get_size_inches()))
    FigureCanvasAgg(figure).print_png(str(path), pil_kwargs={"compress_level": 1})


_SAVERS: dict[str, Callable[[Figure, Path], None]] = {"svg": _svg, "pdf": _pdf, "png": _png}


@cache
def _small_font() -> str:
    """Family of a copy of the sans-serif font with the usual characters only.

    A vector file holds the part of the font that it uses. Cutting that out of the whole font takes longer than all the
    rest of drawing; out of this copy, which is as good for all but rare characters, a fraction of it.
    """
    from fontTools.subset import Options, Subsetter
    from fontTools.ttLib import TTFont

    font = TTFont(findfont(FontProperties(family=["sans-serif"])))
    options = Options(layout_features=[], name_IDs=["*"], notdef_outline=True)
    options.drop_tables += ["FFTM"]
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=_CHARACTERS)
    subsetter.subset(font)
    names = {1: _FAMILY, 2: "Regular", 4: _FAMILY, 6: _FAMILY.replace(" ", "")}
    for name in list(font["name"].names):
        if name.nameID in names:
            font["name"].setName(names[name.nameID], name.nameID, name.platformID, name.platEncID, name.langID)
    folder = Path(tempfile.mkdtemp(prefix="cutlayer-font-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    font.save(folder / "font.ttf")
    fontManager.addfont(str(folder / "font.ttf"))
    return _FAMILY
