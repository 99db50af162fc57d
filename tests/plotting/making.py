"""Runs with any content that a figure may meet, and what is drawn of them."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from cutlayer.plotting.curves import make_curves
from cutlayer.plotting.figures import Options, make_figure
from cutlayer.plotting.runs import Run, read_run
from cutlayer.plotting.style import applied
from tests.plotting.conftest import config_of


def make_run(
    folder: Path,
    method: str = "fed_avg",
    *,
    accuracy: Sequence[float | None] = (0.5, 0.7, 0.8),
    load: Sequence[int] | int = 1_000_000,
    results: Mapping[str, Any] | None = None,
    partition: Sequence[Sequence[int]] = (),
    clients: Mapping[str, Sequence[float]] | None = None,
    personalized: Mapping[tuple[str, float], Mapping[int, Sequence[float]]] | None = None,
    **keys: Any,
) -> Run:
    """Write one run and read it.

    Args:
        load: bytes so far at each evaluated round, or bytes of one round.
        results: further keys of results.json, or other values for those that are there; None leaves a key out.
        partition: samples of each class, by client.
        clients: accuracies of the clients by metric.
        personalized: accuracies of the clients by part and learning rate of fine-tuning, and by epochs.
        keys: of the configuration, as in `config_of`; dotted ones in a mapping `more`.
    """
    more = keys.pop("more", {})
    config = config_of(method, **keys)
    for key, value in more.items():
        place = config
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    rounds = list(range(1, len(accuracy) + 1))
    sent = [load * number for number in rounds] if isinstance(load, int) else list(load)
    content: dict[str, Any] = {"rounds": rounds, "test_acc": list(accuracy)}
    content |= {
        "test_loss": [None if value is None else 1 - value for value in accuracy],
        "train_loss": [1.0] * len(sent),
    }
    content |= {"comm_load": sent, "comm_up": sent, "comm_down": [0] * len(sent), "comm_framed": sent}
    content |= {"round_trips": [2 * number for number in rounds], "client_rounds": [2 * number for number in rounds]}
    content |= {name: [0.5 * number for number in rounds] for name in ("time_wall", "time_client", "time_server")}
    content |= {"metrics": {}, "traffic": {"up/model/model": sent}, "in_turn": False, "finished": True}
    content |= dict(results or {})
    folder.mkdir(parents=True)
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "results.json").write_text(json.dumps(kept))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if partition:
        classes = range(len(partition[0]))
        rows = [["client", "samples", *classes], *([n, sum(row), *row] for n, row in enumerate(partition))]
        _write(folder / "partition.csv", rows)
    if clients:
        lines = [[name, n, 10, value] for name, values in clients.items() for n, value in enumerate(values)]
        _write(folder / "client_accuracy.csv", [["metric", "client", "samples", "accuracy"], *lines])
    for (part, lr), by_epochs in (personalized or {}).items():
        write_personalized(folder, part, lr, by_epochs)
    return read_run(folder)


def write_personalized(
    run: Path, part: str, lr: float, by_epochs: Mapping[int, Sequence[float]], /, **other: Any
) -> Path:
    """Write an evaluation into a run's folder, `other` values in its summary (None leaves one out); returns its own."""
    folder = run / "personalized" / f"part={part},lr={lr},epochs={'-'.join(map(str, by_epochs))}"
    folder.mkdir(parents=True)
    values = np.asarray(list(by_epochs.values()), dtype=np.float64)
    edges = np.linspace(0, 1, 21)
    worst = np.sort(values, axis=1)[:, : -(-values.shape[1] // 10)]
    summary = {"part": part, "lr": lr, "epochs": list(by_epochs), "round": 3, "clients": values.shape[1], "skipped": 0}
    summary |= {"mean": values.mean(1).tolist(), "std": values.std(1).tolist(), "loss": [1.0] * len(values)}
    summary |= {"worst_decile": worst.mean(1).tolist(), "finished": True}
    summary |= {"start": "final", "objective": "cross_entropy"}
    counts = [np.histogram(row, edges)[0].tolist() for row in values]
    summary |= {"histogram": {"edges": edges.tolist(), "counts": counts}} | other
    kept = {key: value for key, value in summary.items() if value is not None}
    (folder / "summary.json").write_text(json.dumps(kept))
    rows = [[n, 10, epochs, value, 1.0] for epochs, row in by_epochs.items() for n, value in enumerate(row)]
    _write(folder / "clients.csv", [["client", "samples", "epochs", "accuracy", "loss"], *rows])
    return folder


def _write(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def draw(name: str, runs: list[Run], options: Options | None = None) -> tuple[Figure, Axes]:
    options = options or Options("title")
    with applied():
        figure = make_figure(name, make_curves(runs, options.metric, options.without_fields, options.link), options)
    return figure, figure.axes[0]


def line(axes: Axes, label: str) -> Line2D:
    (found,) = [each for each in axes.get_lines() if each.get_label() == label]
    return found


def drawn_texts(figure: Figure, monkeypatch: Any) -> list[tuple[str, Bbox]]:
    """What a reader can read, with its place in pixels: every text that would be rendered, laid out as it is saved."""
    found: list[tuple[str, Bbox]] = []
    draw: Callable[..., None] = Text.draw

    def record(self: Text, renderer: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            found.append((self.get_text(), self.get_window_extent(renderer)))
        draw(self, renderer)

    with monkeypatch.context() as patch:
        FigureCanvasAgg(figure)
        if (engine := figure.get_layout_engine()) is not None:
            engine.execute(figure)
        figure.set_layout_engine("none")
        patch.setattr(Text, "draw", record)
        figure.draw_without_rendering()
    return found


def check_texts(figure: Figure, monkeypatch: Any) -> list[str]:
    """Assert that no two texts of a figure overlap and that none is cut off at its border; returns them."""
    texts = drawn_texts(figure, monkeypatch)
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in texts:
        assert box.x0 >= -0.5, f"{text!r} is cut off at the left: {box.x0:.1f}"
        assert box.x1 <= width + 0.5, f"{text!r} is cut off at the right: {box.x1:.1f} of {width:.1f}"
        assert box.y0 >= -0.5, f"{text!r} is cut off at the bottom: {box.y0:.1f}"
        assert box.y1 <= height + 0.5, f"{text!r} is cut off at the top: {box.y1:.1f} of {height:.1f}"
    for at, (text, box) in enumerate(texts):
        for other, place in texts[at + 1 :]:
            overlap = min(box.x1, place.x1) - max(box.x0, place.x0), min(box.y1, place.y1) - max(box.y0, place.y0)
            assert min(overlap) <= 1.0, f"{text!r} and {other!r} overlap by {overlap[0]:.1f} x {overlap[1]:.1f} pixels"
    return [text for text, _ in texts]
