"""The clients: how many samples of each class each one has, and how accurate each one is."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from cutlayer.plotting.curves import Curve
from cutlayer.plotting.figures.axes import Percent, label_of, line_look
from cutlayer.plotting.figures.bars import BAR, ROWS_WIDTH, method_rows
from cutlayer.plotting.figures.base import Options, register
from cutlayer.plotting.figures.layout import axis_text, grow, new_height, put_legend, text_width, wrapped
from cutlayer.plotting.runs import Run
from cutlayer.plotting.style import metric_label, shortened
from cutlayer.plotting.timing import Array
from cutlayer.runtime.ground.files import CLIENT_ACCURACY
from cutlayer.runtime.ground.reading import UnreadableError, read_text
from cutlayer.runtime.ground.text import printable

PARTITION = "partition.csv"
_BYTES = 64 << 20
_MOST_SAMPLES = 1e15
_PANELS = 6
_DOTS = 150
_TITLE, _TICK = 9.0, 8.0
_WHISKERS = (5, 25, 50, 75, 95)


def partition_of(run: Run) -> tuple[list[str], Array] | None:
    """Names of the classes, and samples by class and client [classes, clients]; None where the run has none to read."""
    rows = _rows(run.folder, PARTITION)
    classes = [shortened(printable(name)) for name in next(rows, [])[2:]]
    try:
        counts = [np.asarray(row[2:], dtype=np.float64) for row in rows]
    except ValueError:
        return None
    if not classes or not counts or any(len(each) != len(classes) for each in counts):
        return None
    table = np.asarray(counts).T
    # Also what a spreadsheet or another program has left there: NaN is not in between either.
    return (classes, table) if ((table >= 0) & (table <= _MOST_SAMPLES)).all() else None


def _partitions(curves: Sequence[Curve]) -> dict[str, tuple[list[str], Array]]:
    """One partition for each dataset, distribution and number of clients, by its title."""
    runs = [run for curve in curves for run in curve.runs]
    datasets = {str(run.get("dataset.name")) for run in runs}
    found: dict[str, tuple[list[str], Array]] = {}
    for run in runs:
        name = f"{run.get('dataset.name')}, {run.distribution_label}" if len(datasets) > 1 else run.distribution_label
        # Methods that pool all data have one client; the others' partition is the one to see.
        key = f"{name}\n{run.get('num_clients')} clients"
        if key in found and found[key][1].shape[1] > 1:
            continue
        partition = partition_of(run)
        if partition is not None and (key not in found or partition[1].shape[1] > 1):
            found[key] = partition
    return found


def _any_partition(curves: Sequence[Curve], _: Options) -> bool:
    return bool(_partitions(curves))


@register("partition", "a run with a partition.csv", _any_partition)
def partition_maps(figure: Figure, curves: Sequence[Curve], options: Options) -> None:
    """Samples of each class at each client, as one heat map for each way in which the data is spread."""
    found = _partitions(curves)
    shown = dict(list(found.items())[:_PANELS])
    columns = min(2 if len(shown) < 5 else 3, len(shown))
    rows = -(-len(shown) // columns)
    new_height(figure, 0.6 + rows * (2.6 if columns == 1 else 2.2))
    largest = max(float(counts.max()) for _, counts in shown.values())
    panels = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    width = (6.4 - 1.0) / columns - 0.6
    for axes, (title, (classes, counts)) in zip(panels.flat, shown.items(), strict=False):
        image = axes.imshow(counts, "Blues", aspect="auto", interpolation="nearest", vmin=0, vmax=max(largest, 1))
        axes.grid(visible=False)
        name, clients = title.split("\n")
        told = len(found) == 1 and name in options.title
        axes.set_title(clients if told else f"{wrapped(name, width, _TITLE)}\n{clients}", fontsize=_TITLE)
        _class_ticks(axes, classes, 1.4)
        axes.xaxis.set_major_locator(MaxNLocator(4 if columns > 1 else 8, integer=True, min_n_ticks=1))
        axes.tick_params(labelsize=_TICK)
        axes.set_xlabel("client")
    assert image is not None
    bar = figure.colorbar(image, ax=panels.ravel().tolist(), label="samples of a class", fraction=0.04, pad=0.02)
    bar.ax.grid(visible=False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(found) > len(shown):
        figure.supxlabel(axis_text(figure, f"{len(found) - len(shown)} more not shown"), fontsize=_TITLE)
        grow(figure, 0.2)


def _class_ticks(axes: Axes, classes: Sequence[str], height: float) -> None:
    """Names of as many classes as have room above each other, shortened to less than an inch."""
    step = max(1, round(len(classes) * 1.4 * _TICK / 72 / height))
    places = list(range(0, len(classes), step))
    names = [classes[at] for at in places]
    short = [name if text_width(name, _TICK) < 0.8 else f"{name[:9]}\N{HORIZONTAL ELLIPSIS}" for name in names]
    axes.yaxis.set_major_locator(FixedLocator(places))
    axes.set_yticks(places, short)
    axes.set_ylabel("class")


def client_accuracies(curve: Curve) -> dict[str, Array]:
    """Accuracy of every client of every seed [clients], by metric."""
    found: dict[str, list[float]] = {}
    for run in curve.runs:
        for row in islice(_rows(run.folder, CLIENT_ACCURACY), 1, None):
            try:
                metric, accuracy = row[0], float(row[3])
            except (IndexError, ValueError):
                continue
            if 0 <= accuracy <= 1:
                found.setdefault(printable(metric), []).append(accuracy)
    return {metric: np.sort(values) for metric, values in found.items()}


def _measured(curves: Sequence[Curve], options: Options) -> tuple[str, list[tuple[Curve, Array]]]:
    """The metric to draw (the one asked for, else the one that most curves have) and the curves that have it."""
    found = [(curve, client_accuracies(curve)) for curve in curves]
    names = [name for _, each in found for name in each]
    asked = options.metric.partition("/")[0]
    metric = asked if asked in names else max(sorted(set(names), reverse=True), key=names.count, default="")
    return metric, [(curve, each[metric]) for curve, each in found if metric in each]


def _any_client(curves: Sequence[Curve], options: Options) -> bool:
    return bool(_measured(curves, options)[1])


@register("client_accuracy", "a run that measured its clients, with dataset.local_test=true for instance", _any_client)
def client_accuracy(figure: Figure, curves: Sequence[Curve], options: Options) -> None:
    """How accuracy is distributed over clients, for each method: a box over the middle half, and a dot a client."""
    metric, found = _measured(curves, options)
    axes = figure.add_subplot()
    rows = method_rows(figure, axes, [curve for curve, _ in found])
    subset = False
    for row, (curve, values) in zip(rows, found, strict=True):
        style = line_look(curve.method, curve.variant)
        low, first, middle, third, high = np.percentile(values, _WHISKERS)
        axes.plot([low, high], [row, row], color=style["color"], linewidth=1)
        axes.barh(row, third - first, 0.8 * BAR, left=first, facecolor=(style["color"], 0.25), edgecolor=style["color"])
        axes.plot([middle, middle], [row - 0.4 * BAR, row + 0.4 * BAR], color=style["color"], linewidth=2.2)
        dots = values
        if len(values) > _DOTS:
            # Every n-th of the sorted values: their distribution is that of all.
            dots = values[np.linspace(0, len(values) - 1, _DOTS).round().astype(int)]
            subset = True
        # Spread over the row by the golden ratio, which is even and the same each time.
        shift = (np.arange(len(dots)) * 0.618034) % 1 - 0.5
        axes.plot(dots, row + 0.7 * BAR * shift, ".", color=style["color"], markersize=3, alpha=0.7)
    axes.xaxis.set_major_formatter(Percent())
    missing = [label_of(curve) for curve in curves if all(curve is not each for each, _ in found)]
    note = f"not drawn, as clients were not measured: {'; '.join(missing)}" if missing else ""
    axes.set_xlabel(axis_text(figure, metric_label(metric), note, width=ROWS_WIDTH))
    dot = f"a client (of every {_DOTS} or more, {_DOTS} are drawn)" if subset else "a client"
    handles = [
        Line2D([], [], color="#555555", linewidth=7, alpha=0.35),
        Line2D([], [], color="#555555", linewidth=2.2, marker="|", markersize=8, linestyle=""),
        Line2D([], [], color="#555555", linewidth=1),
        Line2D([], [], color="#555555", marker=".", markersize=3, linestyle=""),
    ]
    seeds = "all seeds together" if any(len(curve.runs) > 1 for curve, _ in found) else ""
    put_legend(figure, handles, ["middle half of the clients", "median", "5% to 95%", dot], seeds)


def _rows(folder: Path, name: str) -> Iterator[list[str]]:
    """The rows of a csv file of a run, until one that is none; none of a file that cannot be read."""
    try:
        text = read_text(folder, name, _BYTES)
    except UnreadableError:
        return
    try:
        yield from csv.reader(text.splitlines())
    except csv.Error:
        return
