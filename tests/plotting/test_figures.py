"""What is drawn, and what a user of `plot_results.py` gets."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.colors import to_hex
from PIL import Image

import plot_results
from plotting import first_picture
from plotting.compose import Comparison, PlotConfig, compose, read_config
from plotting.curves import make_curves
from plotting.figures import FIGURES, Options, make_figure
from plotting.runs import find_runs
from plotting.style import METHODS, applied, method_style
from runtime.config import ConfigError
from tests.plotting.conftest import WriteRun

ROOT = Path(__file__).resolve().parents[2]


def test_methods_look_different_and_always_the_same() -> None:
    looks = [(style.color, style.marker) for style in METHODS.values()]
    assert len(set(looks)) == len(looks)
    assert len({style.label for style in METHODS.values()}) == len(METHODS)
    code = "from plotting.style import method_style; s = method_style('their_own'); print(s.label, s.color, s.marker)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    style = method_style("their_own")
    assert told.split() == ["their_own", style.color, style.marker]
    assert style.color not in {each.color for each in METHODS.values()}


def test_a_figure_shows_each_curve_in_its_unit(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run("fed_avg", sent=2_000_000, seed=seed)
    write_run("fsl_sage", sent=500_000)
    write_run("centralized", sent=0)
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    axes = make_figure("accuracy_communication", curves, Options("title", 0.5)).axes[0]
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert axes.get_xlabel() == "communication (MB)"
    np.testing.assert_allclose(lines["FedAvg"].get_xdata(), 2.0 * np.arange(1, 21))
    np.testing.assert_allclose(lines["FSL-SAGE"].get_xdata(), 0.5 * np.arange(1, 21))
    assert to_hex(lines["FSL-SAGE"].get_color()).upper() == METHODS["fsl_sage"].color
    assert "Centralized, sends nothing" in lines
    assert len(axes.collections) == 1  # a band for the one with two seeds
    assert any("50%" in text.get_text() for text in axes.texts)
    marks = sorted(
        line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "o" and len(line.get_xdata()) == 1
    )
    # 0.9 (1 - exp(-t / 5)) reaches 0.5 in round 5; with the 0.01 more of seed 1 in round 4.
    np.testing.assert_allclose(marks, [0.5 * 5, 2.0 * (5 + 4) / 2])


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


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_figures_bear_odd_runs(write_run: WriteRun, tmp_path: Path, name: str) -> None:
    write_run("sl", ceiling=float("nan"))
    write_run("local_only", sent=0, rounds=1)
    write_run("a $strange_method", rounds=1)
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    with applied():
        for chosen in (curves, [curve for curve in curves if not curve.sends]):
            make_figure(name, chosen, Options("all", 0.8)).savefig(tmp_path / "figure.svg")
    assert "strange_method" in (tmp_path / "figure.svg").read_text() or len(chosen) == 1


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


def test_a_folder_that_cannot_be_written_is_one_line(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("fed_avg")
    (tmp_path / "file").touch()
    assert plot_results.main(["--saves", str(tmp_path / "saves"), "--out", str(tmp_path / "file" / "out")]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"--out: {tmp_path / 'file'}")
    assert told.err.count("\n") == 1


def test_without_any_edit_runs_are_grouped_and_drawn(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("fed_avg", "fsl_sage"):
        for seed in (0, 1):
            write_run(method, seed=seed)
    write_run("fed_avg", distribution="noniid_dirichlet", alpha=0.5)
    broken = write_run("sl")
    (broken / "results.json").write_text("{")
    assert plot_results.main(["--saves", str(tmp_path / "saves"), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert f"left out, damaged: {broken}: results.json" in told.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"cifar10-resnet18-iid", "cifar10-resnet18-noniid_dirichlet-alpha=0.5"}
    folder = tmp_path / "out" / "cifar10-resnet18-iid"
    stems = [f"{name}.{ending}" for name in FIGURES for ending in ("svg", "pdf", "png")]
    assert {path.name for path in folder.iterdir()} == {*stems, "table.md", "table.csv"}
    assert all(str(folder / name) in told.out for name in stems)
    table = pd.read_csv(folder / "table.csv")
    assert table["method"].tolist() == ["fed_avg", "fsl_sage"]
    assert table["seeds"].tolist() == [2, 2]
    assert table["comm_load_bytes"].tolist() == [20_000, 20_000]
    text = (folder / "table.md").read_text()
    assert "| FSL-SAGE | 2 | 20 | 88.85 ± 0.50 % | 88.85 ± 0.50 % | 20.0 kB |" in text
    first = (folder / "accuracy_rounds.svg").read_bytes()
    plot_results.main(["--saves", str(tmp_path / "saves"), "--out", str(tmp_path / "out")])
    assert (folder / "accuracy_rounds.svg").read_bytes() == first


def test_comparisons_of_ones_own(write_run: WriteRun, tmp_path: Path) -> None:
    for method in ("fed_avg", "fsl_sage", "sl"):
        write_run(method)
    where = {"dataset.name": "cifar10", "algorithm.name": ["fed_avg", "sl"]}
    config = PlotConfig(
        comparisons=(
            Comparison("mine", where, "My title", target=0.5, figures=("accuracy_rounds",)),
            Comparison("other", {"dataset.name": "mnist"}),
        ),
        formats=("svg",),
        without_fields=("y",),
    )
    made = compose(tmp_path / "saves", tmp_path / "out", config)
    assert [path.name for path in made.files] == ["accuracy_rounds.svg", "table.md", "table.csv"]
    assert made.empty == ["other"]
    text = (tmp_path / "out" / "mine" / "table.md").read_text()
    assert text.startswith("## My title")
    assert "FSL-SAGE" not in text
    assert "bytes to 50%" in text
    assert pd.read_csv(tmp_path / "out" / "mine" / "table.csv")["bytes_to_target"].tolist() == [990 * 5] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"figure": []}, "figure: no such key; did you mean figures?"),
        ({"figures": ["accuracy_round"]}, "figures=accuracy_round: expected a figure; did you mean accuracy_rounds?"),
        ({"target": 81.0}, "target=81.0: expected an accuracy as a fraction"),
        ({"comparisons": [{"name": "a/b", "where": {}}]}, "comparisons.0.name=a/b: expected a name fit for a folder"),
        ({"formats": []}, "formats=[]: expected at least one of"),
        ({"comparisons": [{"name": "a", "where": {}}] * 2}, "comparisons=a: expected names that differ"),
    ],
)
def test_mistakes_in_the_configuration_are_told(tmp_path: Path, values: dict[str, object], message: str) -> None:
    path = tmp_path / "exp_configs.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).startswith(message)


def test_the_configuration_that_comes_with_the_project_is_the_default() -> None:
    assert read_config(ROOT / "exp_configs.yaml") == PlotConfig() == read_config(ROOT / "no_such_file.yaml")


def test_the_example_in_the_configuration_works(tmp_path: Path) -> None:
    lines = (ROOT / "exp_configs.yaml").read_text().splitlines()
    start = lines.index("# comparisons:")
    path = tmp_path / "exp_configs.yaml"
    path.write_text("\n".join(line.removeprefix("# ") for line in lines[start:] if line.startswith("# ")))
    (comparison,) = read_config(path).comparisons
    assert (comparison.name, comparison.target) == ("cifar10_iid", 0.81)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--saves", "no/such/folder"], "--saves=no/such/folder: expected a folder with runs"),
        (["--config", "no.yaml"], "--config=no.yaml: expected a file"),
        (["--saves", "tests/plotting"], "nothing to draw: no finished run was found"),
    ],
)
def test_the_command_fails_with_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(ROOT)
    assert plot_results.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip() == message
    assert not (tmp_path / "out").exists()
