"""The picture that a run draws of itself at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cutlayer.plotting.figures.axes import bytes_unit, metric_axis
from cutlayer.plotting.figures.layout import AXES_HEIGHT, new_figure, put_title
from cutlayer.plotting.saving import save_figure
from cutlayer.plotting.style import applied, method_style
from cutlayer.runtime.ground.units import format_bytes

_MARKERS = 8


def first_picture(folder: Path, results: dict[str, Any], title: str, method: str = "") -> Path:
    """Draw a run's accuracy against its communication, as `accuracy_communication.png` and `.svg` in its folder.

    Args:
        folder: the run's folder.
        results: content of `results.json`.
        title: what ran.
        method: registered name of the algorithm, for its colour.

    Returns:
        The path of the PNG.
    """
    style = method_style(method or title.split(" ")[0])
    accuracy = np.asarray([np.nan if value is None else value for value in results["test_acc"]], dtype=np.float64)
    load = np.asarray(results["comm_load"], dtype=np.float64)
    sends = len(load) > 0 and load[-1] > 0
    size, unit = bytes_unit(load[-1]) if sends else (1.0, "")
    x = load / size if sends else np.asarray(results["rounds"], dtype=np.float64)
    with applied():
        figure = new_figure(AXES_HEIGHT)
        axes = figure.add_subplot()
        axes.plot(x, accuracy, color=style.color, marker=style.marker, markevery=max(1, len(x) // _MARKERS))
        reported = ""
        if np.isfinite(accuracy).any():
            best = int(np.nanargmax(accuracy))
            where = f"after {format_bytes(load[best])}" if sends else f"in round {results['rounds'][best]}"
            axes.plot(x[best], accuracy[best], "o", markersize=10, markerfacecolor="none", markeredgecolor="black")
            reported = f"\nbest (circle): {accuracy[best]:.2%} {where}"
        axes.set_xlim(left=0)
        axes.set_xlabel((f"communication ({unit})" if sends else "rounds (this method sends nothing)") + reported)
        metric_axis(axes, "test_acc", [accuracy])
        put_title(figure, title)
        return save_figure(figure, folder / "accuracy_communication", ("svg", "png"))[-1]
