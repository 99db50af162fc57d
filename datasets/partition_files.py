"""A partition as files: a table of clients by classes, and its picture."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from cutlayer.datasets.partition import Partition
from cutlayer.runtime.ground.files import written_whole
from cutlayer.runtime.ground.text import csv_text, one_line

# More clients than this are sorted by their main class and averaged into this many columns.
PICTURE_COLUMNS = 400
_NAMED_CLASSES = 40
_WRITTEN_CELLS = 250
_CELLS = 1 << 19  # of the table that are made at a time


def save_partition(
    folder: Path,
    parts: Partition,
    labels: np.ndarray | Tensor,
    classes: int,
    class_names: Sequence[str],
    drawn: Path | None = None,
) -> None:
    """Write partition.csv (client, samples, a column for each class) and partition.png into ``folder``.

    Args:
        drawn: a folder of pictures that were drawn before by the same program, to take from and to add to.
    """
    labels = np.asarray(labels)
    with written_whole(folder / "partition.csv") as path, path.open("wb") as file:
        file.write(csv_text([["client", "samples", *map(str, class_names)]]).encode())
        for first, last in _blocks(parts, classes):
            sizes = parts.sizes[first:last, None]
            rows = np.hstack([np.arange(first, last)[:, None], sizes, parts.table(labels, classes, first, last)])
            file.write(csv_lines(rows))
    with written_whole(folder / "partition.png") as path:
        if drawn is None:
            draw(path, parts, labels, class_names)
            return
        with (folder / "partition.csv").open("rb") as table:  # which the picture follows from
            known = drawn / f"partition-{hashlib.file_digest(table, 'sha256').hexdigest()}.png"
        if not known.exists():
            drawn.mkdir(exist_ok=True)
            with written_whole(known) as picture:
                draw(picture, parts, labels, class_names)
        shutil.copyfile(known, path)


def draw(file: Path, parts: Partition, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Write a PNG: above the size of each client, below its share of each class by shade.

    Up to 400 clients have a column each, in order; more are sorted by their most frequent class, and a column is the
    mean of neighbours.
    """
    shares, sizes = columns(parts, labels, len(class_names))
    classes, width = shares.shape
    figure = Figure(figsize=(9, 2.6 + min(max(classes, 6), 50) * 0.13), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2.6])
    _draw_sizes(upper, sizes, parts)
    image = lower.imshow(
        shares,
        aspect="auto",
        interpolation="nearest",
        cmap="Blues",
        vmin=0,
        vmax=_darkest(shares),
    )
    if classes <= _NAMED_CLASSES:
        lower.set_yticks(range(classes), [_short(name) for name in class_names], fontsize=7)
    lower.set_ylabel("class")
    binned = width < len(parts)
    if binned:
        lower.set_xticks([])
        lower.set_xlabel(
            f"{len(parts):,} clients, sorted by main class; a column is the mean of {len(parts) / width:.0f}"
        )
    else:
        if width > 20:
            lower.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
        else:
            lower.set_xticks(range(width))
        lower.set_xlabel("client")
        if shares.size <= _WRITTEN_CELLS:
            _write_counts(lower, shares, sizes)
    for inside in (*upper.patches, image, *lower.texts):
        inside.set_in_layout(False)  # measured one by one, they would take half of the time
    figure.colorbar(image, ax=lower, label="share of the client's samples", pad=0.01)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")  # else it would be laid out twice more
    canvas.print_png(str(file), pil_kwargs={"compress_level": 1})


def columns(parts: Partition, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Class shares [classes, columns] and mean sizes [columns], a column for a client or for several alike.

    Works on blocks of clients, so that a table of all clients by all classes never exists.
    """
    clients = len(parts)
    if clients <= PICTURE_COLUMNS:
        table = parts.table(labels, classes).astype(float)
        return (table / np.maximum(table.sum(axis=1, keepdims=True), 1)).T, table.sum(axis=1)
    main = np.empty(clients)
    for first, last in _blocks(parts, classes):
        table = parts.table(labels, classes, first, last)
        # By main class first, within it by how much of it the client has.
        main[first:last] = table.argmax(axis=1) - table.max(axis=1) / np.maximum(table.sum(axis=1), 1) * 0.999
    column = np.empty(clients, dtype=np.int64)
    column[np.argsort(main, kind="stable")] = np.arange(clients) * PICTURE_COLUMNS // clients
    counts = np.zeros(PICTURE_COLUMNS * classes)
    for first, last in _blocks(parts, classes):
        cells = column[first:last, None] * classes + np.arange(classes)
        counts += np.bincount(cells.ravel(), parts.table(labels, classes, first, last).ravel(), len(counts))
    counts = counts.reshape(PICTURE_COLUMNS, classes)
    sizes = counts.sum(axis=1) / np.bincount(column, minlength=PICTURE_COLUMNS)
    return (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).T, sizes


def csv_lines(rows: np.ndarray) -> bytes:
    """Lines of integers >= 0, [lines, columns]; a million of them in a fraction of the time that ``str`` takes."""
    width = len(str(int(rows.max())))
    text = np.full((*rows.shape, width + 1), ord(","), dtype=np.uint8)
    written = np.ones(text.shape, dtype=bool)
    left = rows
    for place in reversed(range(width)):
        text[..., place] = left % 10 + ord("0")
        written[..., place] = (left > 0) | (place == width - 1)
        left = left // 10
    text[:, -1, -1] = ord("\n")
    return text[written].tobytes()


def _blocks(parts: Partition, classes: int) -> Iterator[tuple[int, int]]:
    """Ranges of clients whose part of the table fits in a little memory."""
    step = max(1, _CELLS // classes)
    for first in range(0, len(parts), step):
        yield first, min(first + step, len(parts))


def _draw_sizes(axes: Axes, sizes: np.ndarray, parts: Partition) -> None:
    axes.bar(np.arange(len(sizes)), sizes, width=1.0 if len(sizes) > 60 else 0.8, color="#4878a8")
    all_sizes = parts.sizes
    low, high = int(all_sizes.min()), int(all_sizes.max())
    held = f"{low:,} each" if low == high else f"{low:,} to {high:,} each, median {np.median(all_sizes):,.0f}"
    clients = "1 client" if len(parts) == 1 else f"{len(parts):,} clients"
    axes.set_title(f"{clients}, {int(all_sizes.sum()):,} samples: {held}", fontsize=9)
    axes.set_ylabel("samples")
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _darkest(shares: np.ndarray) -> float:
    """The share that the darkest colour stands for: shares are [classes, clients]."""
    return min(1.0, max(float(shares.max()), 3 / len(shares)))


def _write_counts(axes: Axes, shares: np.ndarray, sizes: np.ndarray) -> None:
    strong = 0.6 * _darkest(shares)
    for (row, column), share in np.ndenumerate(shares):
        if share > 0:
            colour = "white" if share > strong else "#333333"
            axes.text(column, row, f"{share * sizes[column]:.0f}", ha="center", va="center", fontsize=6, color=colour)


def _short(name: str) -> str:
    # A dollar sign would start a formula.
    return one_line(name, 18).replace("$", r"\$")
