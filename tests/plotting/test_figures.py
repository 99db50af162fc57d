"""Curves as they are drawn, how methods look, and the picture that a run draws of itself."""

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from cutlayer.plotting import first_picture
from cutlayer.plotting.curves import make_curves
from cutlayer.plotting.figures import Options, make_figure
from cutlayer.plotting.runs import find_runs
from cutlayer.plotting.style import METHODS, applied, method_style
from tests.places import ROOT
from tests.plotting.conftest import WriteRun


def test_methods_look_different_and_always_the_same() -> None:
    looks = [(style.color, style.marker) for style in METHODS.values()]
    assert len(set(looks)) == len(looks)
    assert len({style.label for style in METHODS.values()}) == len(METHODS)
    code = "from cutlayer.plotting import style; s = style.method_style('their_own'); print(s.label, s.color, s.marker)"
    reported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    style = method_style("their_own")
    assert reported.split() == ["their_own", style.color, style.marker]
    assert style.color not in {each.color for each in METHODS.values()}


def test_a_figure_shows_each_curve_in_its_unit(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run("fed_avg", sent=2_000_000, seed=seed)
    write_run("fsl_sage", sent=500_000)
    write_run("centralized", sent=0)
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    figure = make_figure("accuracy_communication", curves, Options("title", target=0.5))
    axes = figure.axes[0]
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert axes.get_xlabel() == "communication (MB)"
    np.testing.assert_allclose(lines["FedAvg"].get_xdata(), 2.0 * np.arange(1, 21))
    np.testing.assert_allclose(lines["FSL-SAGE"].get_xdata(), 0.5 * np.arange(1, 21))
    assert to_hex(lines["FSL-SAGE"].get_color()).upper() == METHODS["fsl_sage"].color
    np.testing.assert_allclose(lines["Centralized"].get_ydata(), 0.9 * (1 - np.exp(-4)))
    assert len(axes.collections) == 1  # a band for the one with two seeds
    assert any("50%" in text.get_text() for text in axes.texts)
    marks = sorted(line.get_xdata()[0] for line in axes.get_lines() if len(line.get_xdata()) == 1)
    # 0.9 (1 - exp(-t / 5)) reaches 0.5 in round 5; with the 0.01 more of seed 1 in round 4.
    np.testing.assert_allclose(marks, [0.5 * 5, 2.0 * (5 + 4) / 2])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("FedAvg: 9.00 MB", "Centralized: sends nothing", "FSL-SAGE: 2.50 MB")
    ]
    assert legend.get_title().get_text() == "sent when 50% is first reached, mean over seeds:"


@pytest.mark.parametrize(
    ("dear", "metric", "target"), [(1, "test_acc", 0.52), (90, "test_acc", 0.52), (90, "loss", 0.3)]
)
def test_marks_of_the_target_lie_on_their_curves(
    dear: int, metric: str, target: float, write_run: WriteRun, tmp_path: Path
) -> None:
    for seed, rounds in ((0, 20), (7, 12), (0, 9)):
        write_run("fed_avg", sent=dear * 1_000_000, seed=seed, rounds=rounds, lr=0.1 if rounds == 9 else 0.2)
    write_run("fsl_sage", sent=1_000_000)
    runs = find_runs(tmp_path / "saves").runs
    for run in runs:
        run.results["metrics"] = {"loss": [math.exp(-8 * value) for value in run.results["test_acc"]]}
    figure = make_figure("accuracy_communication", make_curves(runs, metric), Options(metric=metric, target=target))
    axes = figure.axes[0]
    figure.draw_without_rendering()
    assert axes.get_xscale() == ("log" if dear > 1 else "linear")
    assert axes.get_yscale() == ("log" if metric == "loss" else "linear")
    curves = [each for each in axes.get_lines() if len(each.get_xdata()) > 4]
    marks = [each for each in axes.get_lines() if len(each.get_xdata()) == 1]
    assert len(marks) == len(curves) == 3
    for mark in marks:
        (curve,) = [
            each for each in curves if (each.get_color(), each.get_marker()) == (mark.get_color(), mark.get_marker())
        ]
        # A path of straight pieces as it is on the screen: a point on it is no longer way round.
        path = curve.get_transform().transform(np.column_stack([curve.get_xdata(), curve.get_ydata()]))
        ((x, y),) = mark.get_transform().transform(np.column_stack([mark.get_xdata(), mark.get_ydata()]))
        ways = np.hypot(*(path[:-1] - (x, y)).T) + np.hypot(*(path[1:] - (x, y)).T)
        assert (ways - np.hypot(*np.diff(path, axis=0).T)).min() < 0.01


def test_rounds_end_with_a_tick_and_sends_nothing_is_no_matter_there(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("centralized", sent=0, rounds=97)
    write_run("sl", rounds=40)
    figure = make_figure("accuracy_rounds", make_curves(find_runs(tmp_path / "saves").runs), Options())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Centralized", "SL"]
    assert [round(tick) for tick in figure.axes[0].get_xticks()] == [0, 20, 40, 60, 80, 97]


def test_a_target_that_not_every_seed_reaches(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 5, 6):
        write_run("fed_avg", sent=1_000_000, seed=seed)
    write_run("sl", ceiling=0.5)
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    (legend,) = make_figure("accuracy_communication", curves, Options(target=0.92)).legends
    # 0.9 (1 - exp(-t / 5)) + 0.05 passes 0.92 in round 18, with 0.06 in round 16, and without either never.
    assert [text.get_text() for text in legend.get_texts()] == ["FedAvg: 17.0 MB (2 of 3 seeds)", "SL: not reached"]


def test_methods_of_very_different_cost_get_a_logarithmic_axis(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("fed_avg", sent=90_000_000)
    write_run("fsl_sage", sent=1_000_000)
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    figure = make_figure("accuracy_communication", curves, Options())
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    shown = [label.get_text() for label in axes.get_xticklabels() if label.get_text()]
    assert {"10 MB", "100 MB", "1 GB"} <= set(shown)


def test_settings_of_the_caller_come_back() -> None:
    before = mpl.rcParams["font.size"]
    with applied():
        assert mpl.rcParams["svg.fonttype"] == "none"
    assert mpl.rcParams["font.size"] == before


@pytest.mark.parametrize("sent", [0, 1_000_000])
def test_the_first_picture_is_not_empty(write_run: WriteRun, sent: int) -> None:
    folder = write_run("fsl_sage", sent=sent, rounds=200)
    results = json.loads((folder / "results.json").read_text())
    path = first_picture(folder, results, "fsl_sage mlp digits-iid")
    assert path == folder / "accuracy_communication.png"
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    assert len(pixels) > 500_000
    line = np.array([int(METHODS["fsl_sage"].color[at : at + 2], 16) for at in (1, 3, 5)])
    assert (np.abs(pixels.astype(int) - line).max(axis=1) < 8).sum() > 500
    text = path.with_suffix(".svg").read_text()
    assert ("communication (MB)" in text) == (sent > 0)


def test_a_picture_of_nothing_and_of_a_diverged_run(tmp_path: Path) -> None:
    for accuracies in ([], [None], [None, 0.5]):
        rounds = list(range(1, len(accuracies) + 1))
        results = {"rounds": rounds, "test_acc": accuracies, "comm_load": [100 * number for number in rounds]}
        assert first_picture(tmp_path, results, "sl").stat().st_size > 1000
