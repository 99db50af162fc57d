"""Personalisation to compare: evaluations of one method and one way to fine-tune, averaged over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from cutlayer.plotting.curves import Curve
from cutlayer.plotting.figures.axes import label_of
from cutlayer.plotting.personalized import FineTuning, Point
from cutlayer.plotting.style import method_style


@dataclass(frozen=True)
class Tuned:
    """The models of a curve's clients, fine-tuned in one way.

    Attributes:
        curve: what was trained. part, lr: what was fine-tuned, and at which learning rate.
        label: what distinguishes it from the others of its method, or "".
        variant: as in `Curve`; the first way to fine-tune looks like the curve.
        runs: what was averaged, the evaluation of each seed that has one.
        points: by rising number of epochs, those that every seed has. Each figure, the standard deviation over clients
            too, is the mean over seeds.
    """

    curve: Curve
    part: str
    lr: float
    label: str
    variant: int
    runs: tuple[FineTuning, ...]
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        """For a legend."""
        name = method_style(self.curve.method).label
        return f"{name}, {self.label}" if self.label else name

    @property
    def before(self) -> Point | None:
        """Without fine-tuning; None where that was not evaluated."""
        return self.points[0] if self.points[0].epochs == 0 else None

    @property
    def after(self) -> Point | None:
        """After most epochs; None where nothing was fine-tuned."""
        return self.points[-1] if self.points[-1].epochs else None

    def at(self, epochs: int) -> Point | None:
        """After so many epochs; None where that was not evaluated."""
        return next((point for point in self.points if point.epochs == epochs), None)


def make_tuned(curves: Sequence[Curve]) -> list[Tuned]:
    """Every way to fine-tune of every curve, in the order of the curves; of curves without any evaluation none.

    Where not all are of the same part and learning rate, their names give what differs. Seeds of which no
    two numbers of epochs are the same are kept apart by them.
    """
    found = [(curve, *group) for curve in curves for group in _groups(curve)]
    parts, rates = {part for _, part, *_ in found}, {lr for _, _, lr, *_ in found}
    tuned: list[Tuned] = []
    for curve, part, lr, apart, seeds in found:
        reported = [curve.label, f"part={part}" * (len(parts) > 1), f"fine-tuning lr={lr:g}" * (len(rates) > 1), apart]
        label = ", ".join(filter(None, reported))
        ways = sorted({tuple(way) for other, *way, _ in found if other.method == curve.method})
        settings = 1 + max(each.variant for each in curves if each.method == curve.method)
        variant = curve.variant + settings * ways.index((part, lr, apart))
        tuned.append(Tuned(curve, part, lr, label, variant, tuple(seeds), _mean(seeds)))
    return tuned


def without_tuning(curves: Sequence[Curve], tuned: Sequence[Tuned]) -> list[str]:
    """Names of the curves that have no evaluation among these."""
    return [label_of(curve) for curve in curves if all(each.curve is not curve for each in tuned)]


def _groups(curve: Curve) -> list[tuple[str, float, str, list[FineTuning]]]:
    """The evaluations of a curve's seeds by part and learning rate, and by their epochs where they share none."""
    by_setting: dict[tuple[str, float], list[FineTuning]] = {}
    for run in curve.runs:
        for each in run.personalized.found:
            by_setting.setdefault((each.part, each.lr), []).append(each)
    groups: list[tuple[str, float, str, list[FineTuning]]] = []
    for (part, lr), seeds in sorted(by_setting.items()):
        if _shared(seeds):
            groups.append((part, lr, "", seeds))
            continue
        alike: dict[tuple[int, ...], list[FineTuning]] = {}
        for each in seeds:
            alike.setdefault(tuple(each.points), []).append(each)
        groups += [(part, lr, f"epochs={'-'.join(map(str, epochs))}", alike[epochs]) for epochs in sorted(alike)]
    return groups


def _shared(seeds: Sequence[FineTuning]) -> list[int]:
    return sorted(set.intersection(*(set(each.points) for each in seeds)))


def _mean(seeds: Sequence[FineTuning]) -> tuple[Point, ...]:
    return tuple(_mean_point([each.points[epochs] for each in seeds]) for epochs in _shared(seeds))


def _mean_point(points: Sequence[Point]) -> Point:
    first = points[0]
    alike = all(point.edges == first.edges for point in points)
    return Point(
        first.epochs,
        fmean(point.mean for point in points),
        fmean(point.std for point in points),
        fmean(point.worst for point in points),
        first.edges if alike else (),
        tuple(map(fmean, zip(*(point.shares for point in points), strict=True))) if alike else (),
    )
