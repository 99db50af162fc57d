"""What holds for every kind of figure: same look, same bytes, and no run that it cannot bear."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from cutlayer.plotting.curves import make_curves
from cutlayer.plotting.figures import FIGURES, FORMATS, Options, make_figure, save_figure
from cutlayer.plotting.runs import Run
from cutlayer.plotting.style import METHODS, applied, method_style
from tests.plotting.making import draw, line, make_run


def everything(folder: Path) -> list[Run]:
    """Runs that every kind of figure applies to."""
    keys: dict[str, Any] = {"partition": [[1, 2], [3, 4]], "clients": {"local_acc": [0.3, 0.9]}}
    keys["personalized"] = {("full", 0.1): {0: [0.3, 0.9], 1: [0.4, 0.9]}}
    shape: dict[str, Any] = {"distribution": "noniid_dirichlet"}
    return [
        make_run(folder / "1", "fed_avg", **keys, **shape, alpha=0.1),
        make_run(folder / "2", "fed_avg", **keys, **shape, alpha=1),
        make_run(folder / "3", "fed_avg", **keys, **shape, alpha=1, lr=0.5),
        make_run(folder / "4", "a $strange$ <method>", **keys, **shape, alpha=1, accuracy=(None, math.nan, 0.5)),
    ]


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_files_hold_text_as_text_and_are_the_same_each_time(name: str, tmp_path: Path) -> None:
    runs = everything(tmp_path / "runs")
    with applied():
        first, second = (
            save_figure(make_figure(name, make_curves(runs), Options("A title", over="lr")), tmp_path / f"{at}" / name)
            for at in range(2)
        )
    assert [path.name for path in first] == [f"{name}.{ending}" for ending in FORMATS]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert a.stat().st_size > 3000
    text = first[0].read_text()
    assert "A title" in text
    if name != "partition":
        assert "a $strange$ &lt;method&gt;" in text


@pytest.mark.parametrize("name", sorted(FIGURES))
@pytest.mark.parametrize(
    "missing",
    [
        *(("traffic",), ("round_trips", "client_rounds"), ("time_client",), ("metrics", "train_loss", "comm_framed")),
        ("traffic", "round_trips", "client_rounds", "comm_framed", "time_client", "time_server", "metrics", "in_turn"),
    ],
    ids=str,
)
def test_whatever_a_run_lacks_the_rest_is_drawn(name: str, missing: tuple[str, ...], tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare", results=dict.fromkeys(missing))
    for runs in ([bare], [bare, *everything(tmp_path / "runs")]):
        curves = make_curves(runs)
        if FIGURES[name].applies(curves, Options(over="lr")):
            assert draw(name, runs, Options(over="lr"))[0].axes
        else:
            with pytest.raises(ValueError, match=f"{name} needs "):
                draw(name, runs, Options(over="lr"))
    assert not FIGURES[name].applies([], Options())


START = "start of own models"


@pytest.mark.parametrize("name", ["accuracy_communication", "accuracy_rounds", "accuracy_time", "metric_alpha"])
def test_a_method_looks_the_same_wherever_it_is_drawn(name: str, tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{method}-{alpha}", method, distribution="noniid_dirichlet", alpha=alpha)
        for method in (*METHODS, "of_ones_own")
        for alpha in (0.1, 1)
    ]
    some = runs if name == "metric_alpha" else [run for run in runs if run.get("dataset.alpha") == 1]
    _, axes = draw(name, some)
    for method in (*METHODS, "of_ones_own"):
        style = method_style(method)
        (drawn,) = [each for each in axes.get_lines() if each.get_label() in (style.label, f"{style.label} ({START})")]
        assert (drawn.get_color(), drawn.get_marker()) == (style.color.lower(), style.marker)


def test_every_single_point_bears_a_marker(tmp_path: Path) -> None:
    values = [0.1 if number % 3 == 0 else None for number in range(40)]
    run = make_run(tmp_path / "run", accuracy=values)
    _, axes = draw("accuracy_rounds", [run])
    marked = line(axes, "FedAvg").get_markevery()
    assert {number for number, value in enumerate(values) if value is not None} <= set(marked)


@pytest.mark.parametrize(
    ("limits", "texts"),
    [
        ((0.0, 1.0), ["0%", "20%", "40%", "60%", "80%", "100%"]),
        ((0.7, 0.95), ["70%", "75%", "80%", "85%", "90%", "95%"]),
        ((0.9, 1.0), ["90%", "92%", "94%", "96%", "98%", "100%"]),
        ((0.9, 0.925), ["90.0%", "90.5%", "91.0%", "91.5%", "92.0%", "92.5%"]),
    ],
    ids=str,
)
def test_percents_have_as_many_digits_as_they_need(
    limits: tuple[float, float], texts: list[str], tmp_path: Path
) -> None:
    _, axes = draw("accuracy_rounds", [make_run(tmp_path / "run")])
    axes.set_yticks(np.linspace(*limits, 6))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == texts


def test_metrics_of_some_rounds_are_joined(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", accuracy=(0.1,) * 5, results={"metrics": {"align/error": [None, 4.0, None, None, 2.0]}}
    )
    _, axes = draw("accuracy_rounds", [run], Options(metric="align/error", target=3.0))
    np.testing.assert_allclose(line(axes, "FedAvg").get_xdata(), [2, 5])
    np.testing.assert_allclose(line(axes, "FedAvg").get_ydata(), [4, 2])
    assert axes.get_ylabel() == "align/error"


def test_a_loss_is_neither_in_percent_nor_squeezed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", results={"test_loss": [500.0, 3.0, 0.5]})
    figure, axes = draw("accuracy_rounds", [run], Options(metric="test_loss"))
    figure.draw_without_rendering()
    assert axes.get_ylabel() == "test loss (nats)"
    assert axes.get_yscale() == "log"
    reported = [tick.get_text() for tick in axes.get_yticklabels()]
    assert "100" in reported
    assert not any("%" in text for text in reported)


LEGENDS = ("accuracy_communication", "accuracy_rounds", "accuracy_time", "accuracy_scatter", "metric_alpha", "ablation")
ROWS = ("latency", "traffic_kinds", "client_accuracy")


@pytest.mark.parametrize("name", [*LEGENDS, *ROWS])
def test_nine_settings_of_a_method_are_drawn_in_nine_ways(name: str, tmp_path: Path) -> None:
    clients, keys = {"local_acc": [0.5, 0.75]}, {"distribution": "noniid_dirichlet"}
    runs = [
        make_run(tmp_path / f"{batch}-{alpha}", batch_size=batch, alpha=alpha, clients=clients, lr=lr, **keys)
        for batch in range(1, 10)
        for alpha, lr in ([(0.1, 0.1), (1.0, 0.1)] if name == "metric_alpha" else [(1.0, 0.1)])
    ]
    if name == "ablation":
        runs += [make_run(tmp_path / f"{batch}", batch_size=batch, alpha=1.0, lr=1, **keys) for batch in range(1, 10)]
    figure, axes = draw(name, runs, Options(over="lr" if name == "ablation" else None))
    if name in LEGENDS:
        (legend,) = figure.legends
        marked = [each for each in legend.legend_handles if isinstance(each, Line2D) and each.get_color() != "#AAAAAA"]
    else:
        marked = [each for each in axes.get_lines() if not each.get_clip_on()]
    assert len(marked) == 9
    assert len({(to_hex(each.get_color()), str(each.get_marker())) for each in marked}) == 9


@pytest.mark.parametrize("name", ["accuracy_communication", "accuracy_rounds", "accuracy_time", "metric_alpha"])
def test_a_legend_has_the_order_of_the_curves_at_their_right_end(name: str, tmp_path: Path) -> None:
    ends = {"fed_avg": 0.4, "scaffold": 0.9, "sl": 0.2, "fed_prox": 0.6}
    runs = [
        make_run(tmp_path / f"{method}{alpha}", method, accuracy=(1 - end, end), **keys, alpha=alpha)
        for method, end in ends.items()
        for alpha in ([0.1, 1.0] if name == "metric_alpha" else [1.0])
        for keys in [{"distribution": "noniid_dirichlet"}]
    ]
    figure, _ = draw(name, runs)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["SCAFFOLD", "FedProx", "FedAvg", "SL"]
