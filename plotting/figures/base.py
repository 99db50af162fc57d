"""What figures are made of: their options, their registry, and how one is put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from cutlayer.plotting.curves import Curve
from cutlayer.plotting.figures.layout import new_figure, put_title
from cutlayer.plotting.timing import Link
from cutlayer.runtime.ground.registry import Registry

_FIELDS = {"y": "labels", "z": "activations", "grad": "gradients"}


@dataclass(frozen=True)
class Options:
    """What a figure may need besides its curves.

    title: above it. metric: what is drawn, a name as in `Run.series`. target: value of the metric whose cost is
    marked, or None. without_fields: as in `Run.bytes`. link: of every client, for simulated time. budget: bytes at
    which methods are compared in tables, or None. over: dotted key of the configuration that an ablation is drawn
    against; None: the one key in which the runs of a method differ.
    """

    title: str = ""
    metric: str = "test_acc"
    target: float | None = None
    without_fields: tuple[str, ...] = ()
    link: Link = field(default_factory=Link)
    budget: float | None = None
    over: str | None = None


def without(options: Options) -> str:
    """What an axis of bytes adds for the fields that are left out: " without labels", or ""."""
    names = [_FIELDS.get(name, name) for name in options.without_fields]
    return f" without {', '.join(names)}" if names else ""


Draw = Callable[[Figure, Sequence[Curve], Options], None]
Applies = Callable[[Sequence[Curve], Options], bool]


@dataclass(frozen=True)
class FigureKind:
    """One kind of figure.

    draw: fills an empty figure, its legend included. applies: whether the curves have what it shows; never raises.
    needs: in a few words, what that is. charted: whether the report draws it itself; the others are pictures there.
    """

    draw: Draw
    applies: Applies
    needs: str
    charted: bool = False

    @property
    def caption(self) -> str:
        """What it shows, in one line: the first of its function's documentation."""
        return (self.draw.__doc__ or "").strip().partition("\n")[0]


FIGURES: Registry[FigureKind] = Registry("figure")


def register(name: str, needs: str, applies: Applies, *, charted: bool = False) -> Callable[[Draw], Draw]:
    """Make a figure available under `figures` in `exp_configs.yaml`; the name is its file's name too.

    The first line of the function's documentation is its caption in the report and in the program's help.
    """

    def decorate(draw: Draw) -> Draw:
        FIGURES.add(name, FigureKind(draw, applies, needs, charted))
        return draw

    return decorate


def make_figure(name: str, curves: Sequence[Curve], options: Options) -> Figure:
    """Draw one registered figure; to be called and saved within `style.applied()`.

    Raises:
        ValueError: the curves do not have what it needs.
    """
    kind = FIGURES[name]
    if not kind.applies(curves, options):
        raise ValueError(f"{name} needs {kind.needs}")
    figure = new_figure()
    kind.draw(figure, curves, options)
    put_title(figure, options.title)
    return figure
