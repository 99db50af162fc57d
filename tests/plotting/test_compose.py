"""What a user of `plot_results.py` gets: files, what is told, and mistakes in `exp_configs.yaml`."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure

from cutlayer import HOME, plot_results
from cutlayer.plotting.compose import compose
from cutlayer.plotting.curves import Curve
from cutlayer.plotting.experiments import Comparison, PlotConfig, read_plot_config
from cutlayer.plotting.figures import FIGURES, Options, register
from cutlayer.plotting.timing import Link
from cutlayer.runtime.ground.config import ConfigError
from tests.places import ROOT, checkout
from tests.plotting.conftest import WriteRun

PLAIN = {"report": False, "formats": ["svg"], "figures": ["accuracy_rounds"]}


def draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: Any = None, *arguments: str
) -> tuple[int, str, str]:
    """Exit status, output and errors of the command over `tmp_path / "saves"`, with a configuration file of its own."""
    path = tmp_path / "exp_configs.yaml"
    path.write_text(yaml.safe_dump(PLAIN if values is None else values))
    keys = ["--saves", str(tmp_path / "saves"), "--out", str(tmp_path / "out"), "--config", str(path)]
    status = plot_results.main([*keys, *arguments])
    reported = capsys.readouterr()
    return status, reported.out, reported.err


def test_without_any_edit_runs_are_grouped_and_drawn(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("fed_avg", "fsl_sage"):
        for seed in (0, 1):
            write_run(method, seed=seed, ceiling=0.9 if method == "fed_avg" else 0.8)
    write_run("fed_avg", distribution="noniid_dirichlet", alpha=0.5)
    write_run("fed_avg", distribution="noniid_dirichlet", alpha=5)
    assert plot_results.main(["--saves", str(tmp_path / "saves"), "--out", str(tmp_path / "out")]) == 0
    reported = capsys.readouterr()
    assert reported.err == ""
    data = "cifar10-resnet18-"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"{data}iid", f"{data}noniid_dirichlet-alpha=0.5", f"{data}noniid_dirichlet-alpha=5"),
        f"{data}noniid_dirichlet-alpha",
    }
    folder = tmp_path / "out" / f"{data}iid"
    stems = {"accuracy_communication", "accuracy_rounds", "traffic_kinds"}
    names = {path.name for path in folder.iterdir()}
    assert {f"{stem}.{ending}" for stem in stems for ending in ("svg", "pdf")} <= names
    assert {"table.md", "table.tex", "table.csv", "report.html"} <= names
    # These runs left no partition and swept nothing.
    assert not {"partition.svg", "ablation.svg", "metric_alpha.svg"} & names
    assert {str(path) for path in (tmp_path / "out").rglob("*") if path.is_file()} == set(reported.out.split())
    table = pd.read_csv(folder / "table.csv")
    assert table["method"].tolist() == ["fed_avg", "fsl_sage"]
    assert table["seeds"].tolist() == [2, 2]
    assert table["comm_load_bytes"].tolist() == [20_000, 20_000]
    over_alpha = tmp_path / "out" / f"{data}noniid_dirichlet-alpha"
    assert {path.stem for path in over_alpha.glob("*.svg")} == {"metric_alpha", "accuracy_scatter"}
    # The IID runs are the end of the scale.
    assert len(pd.read_csv(over_alpha / "table.csv")) == 4


def test_the_same_runs_give_the_same_bytes(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("fed_avg")
    config = {**PLAIN, "formats": ["svg", "pdf", "png"]}
    made = []
    for _ in range(2):
        assert draw(tmp_path, capsys, config)[0] == 0
        made.append({path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()})
        shutil.rmtree(tmp_path / "out")
    assert made[0] == made[1]


def test_a_sweep_shows_as_an_ablation(write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for interval in (2, 5, 10):
        write_run("fsl_sage", algorithm={"name": "fsl_sage", "align_interval": interval})
    write_run("fed_avg")
    assert draw(tmp_path, capsys, {"report": False, "formats": ["svg"]})[0] == 0
    assert (tmp_path / "out" / "cifar10-resnet18-iid" / "ablation.svg").exists()


def test_one_run_alone_is_drawn(write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run("fsl_sage")
    status, out, err = draw(tmp_path, capsys, {"formats": ["svg"]})
    assert (status, err) == (0, "")
    assert "accuracy_communication.svg" in out
    assert "report.html" in out
    text = (tmp_path / "out" / "cifar10-resnet18-iid" / "table.md").read_text()
    assert "| FSL-SAGE | 1 | 20 | 88.35 | 88.35 | 88.35 | 20.0 kB |" in text


def test_what_is_left_out_is_named_with_its_reason(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = write_run("fed_avg")
    newer = write_run("fed_avg")
    unfinished, failed, torn = write_run("sl", finished=False), write_run("sl", seed=1), write_run("sl", seed=2)
    (failed / "results.json").unlink()
    (failed / "status.json").write_text(json.dumps({"state": "failed", "error": "lr: expected\na number"}))
    (torn / "results.json").write_text("{")
    for folder, at in ((older, 1e9), (newer, 2e9)):
        os.utime(folder / "results.json", (at, at))
    status, _, err = draw(tmp_path, capsys)
    assert status == 0
    lines = err.splitlines()
    assert f"left out, not finished: {unfinished}: no results yet" in lines
    assert f"left out, not finished: {failed}: failed: lr: expected a number" in lines
    assert any(line.startswith(f"left out, damaged: {torn}: results.json: ") for line in lines)
    assert f"left out, older than a run of the same setting and seed: {older}" in lines
    assert len(lines) == 4


def test_comparisons_of_ones_own(write_run: WriteRun, tmp_path: Path) -> None:
    for method in ("fed_avg", "fsl_sage", "sl"):
        write_run(method)
    where = {"dataset.name": "cifar10", "algorithm.name": ["fed_avg", "sl"]}
    config = PlotConfig(
        comparisons=(
            Comparison("mine", "My title", where, target=0.5, figures=("accuracy_rounds",), tables=("md", "csv")),
            Comparison("other", where={"dataset.name": "cifar100"}),
        ),
        formats=("svg",),
        without_fields=("y",),
        report=False,
    )
    made = compose(tmp_path / "saves", tmp_path / "out", config)
    assert [path.name for path in made.files] == ["accuracy_rounds.svg", "table.md", "table.csv"]
    reason = "no finished run has dataset.name=cifar100; did you mean cifar10? (there are: cifar10)"
    assert made.empty == {"other": reason}
    text = (tmp_path / "out" / "mine" / "table.md").read_text()
    assert text.startswith("## My title")
    assert "FSL-SAGE" not in text
    assert "bytes to 50%" in text
    assert pd.read_csv(tmp_path / "out" / "mine" / "table.csv")["bytes_to_target"].tolist() == [990 * 5] * 2


def test_each_key_may_be_set_for_one_comparison(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("fed_avg", sent=1_000_000)
    write_run("sl", sent=500_000)
    where = {"dataset": "cifar10"}
    own = Comparison(
        name="own",
        where=where,
        metric="test_loss",
        target=0.5,
        budget_mb=3.0,
        without_fields=("y",),
        link=Link(1.0),
        tables=("csv",),
        figures=("accuracy_communication",),
    )
    config = PlotConfig(
        comparisons=(own, Comparison("top", where=where)), figures=("accuracy_rounds",), formats=("svg",), report=False
    )
    made = compose(tmp_path / "saves", tmp_path / "out", config)
    assert {path.relative_to(tmp_path / "out").as_posix() for path in made.files} == {
        *("own/accuracy_communication.svg", "own/table.csv", "top/accuracy_rounds.svg"),
        *(f"top/table.{ending}" for ending in ("md", "tex", "csv")),
    }
    own_rows, top_rows = (pd.read_csv(tmp_path / "out" / name / "table.csv") for name in ("own", "top"))
    assert own_rows["metric"].tolist() == ["test_loss"] * 2
    assert own_rows["budget_bytes"].tolist() == [3e6] * 2
    assert own_rows["target"].tolist() == [0.5] * 2
    assert own_rows["comm_load_bytes"].tolist() == [20 * 999_990, 20 * 499_990]
    assert top_rows["metric"].tolist() == ["test_acc"] * 2
    assert top_rows["budget_bytes"].tolist() == [10e6] * 2


def test_one_comparison_by_its_name(write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run("fed_avg")
    write_run("fed_avg", distribution="shards")
    assert draw(tmp_path, capsys, None, "--only", "cifar10-resnet18-iid")[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cifar10-resnet18-iid"]
    status, _, err = draw(tmp_path, capsys, None, "--only", "cifar10-resnet18-idd")
    assert status == 1
    assert err.startswith("--only=cifar10-resnet18-idd: expected the name of a comparison; did you mean cifar10-resn")
    assert err.count("\n") == 1


def test_runs_without_the_metric_are_named(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, without = write_run("fed_avg"), write_run("sl")
    write_run("sl", distribution="shards")
    results = json.loads((folder / "results.json").read_text())
    results["metrics"] = {"local_acc/mean": [None, *([0.25] * 19)]}
    (folder / "results.json").write_text(json.dumps(results))
    status, _, err = draw(tmp_path, capsys, {**PLAIN, "metric": "local_acc/mean"})
    assert status == 1
    assert f"comparison cifar10-resnet18-iid: {without} has no metric local_acc/mean" in err
    assert re.search(r"comparison cifar10-resnet18-shards-.*: none of its runs has the metric local_acc/mean", err)
    table = pd.read_csv(tmp_path / "out" / "cifar10-resnet18-iid" / "table.csv")
    assert table["final"].tolist() == [0.25]
    status, _, err = draw(tmp_path, capsys, {**PLAIN, "metric": "local_ac/mean"})
    assert status == 1
    assert "metric=local_ac/mean: expected a metric of its runs; did you mean local_acc/mean?" in err
    assert err.count("\n") == 1


def test_a_figure_that_does_not_apply_is_reported_where_it_was_asked_for(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("fed_avg")
    status, out, err = draw(tmp_path, capsys, {**PLAIN, "figures": ["partition", "accuracy_rounds"]})
    assert status == 0
    assert "accuracy_rounds.svg" in out
    assert err == f"comparison cifar10-resnet18-iid: no figure partition: it needs {FIGURES['partition'].needs}\n"


def test_several_processes_draw_the_same_as_one(write_run: WriteRun, tmp_path: Path) -> None:
    for share in (0.5, 0.6, 0.7, 0.8):
        write_run("fed_avg", dataset={"name": "digits", "distribution": "class_major", "major_share": share})
    config = PlotConfig(figures=("accuracy_rounds",), formats=("svg",), report=False)
    files = {}
    for processes in (1, 2):
        made = compose(tmp_path / "saves", tmp_path / str(processes), config, processes=processes)
        files[processes] = {path.relative_to(tmp_path / str(processes)): path.read_bytes() for path in made.files}
    assert files[1] == files[2]
    assert len(files[1]) == 16


def test_a_folder_that_cannot_be_written_is_one_line(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("fed_avg")
    (tmp_path / "file").touch()
    assert plot_results.main(["--saves", str(tmp_path / "saves"), "--out", str(tmp_path / "file" / "out")]) == 1
    reported = capsys.readouterr()
    assert reported.err.startswith(f"--out: {tmp_path / 'file'}")
    assert reported.err.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"figure": []}, "figure: no such key; did you mean figures?"),
        (
            {"figures": ["accuracy_round"]},
            "figures=accuracy_round: expected a figure, or auto instead of the list; did",
        ),
        ({"figures": "all"}, "figures=all: expected "),
        ({"target": 81.0}, "target=81.0: expected test_acc as a fraction"),
        ({"target": "best"}, "target=best: expected "),
        ({"budget_mb": 0}, "budget_mb=0.0: expected megabytes > 0"),
        ({"link": {"bandwidth_mbit": 0.0}}, "link.bandwidth_mbit=0.0: expected a number > 0"),
        ({"link": {"rtt": 1.0}}, "link.rtt: no such key; did you mean link.rtt_ms?"),
        ({"tables": ["latex"]}, "tables.0=latex: expected one of the choices; did you mean tex?"),
        ({"report": "yes please"}, "report=yes please: expected true or false"),
        ({"comparisons": [{"name": "a/b", "where": {"lr": 1}}]}, "comparisons.0.name=a/b: expected a name fit for"),
        ({"comparisons": [{"name": "a"}]}, "comparisons.0: expected `where` or `folders`: which runs it holds"),
        ({"comparisons": [{"where": {"lr": 1}}]}, "comparisons.0.name: missing; expected text"),
        (
            {"comparisons": [{"name": "a", "where": {"lr": 1}, "target": 2.0}]},
            "comparisons.0.target=2.0: expected test",
        ),
        ({"comparisons": [{"name": "a", "where": {"lr": 1}, "were": 1}]}, "comparisons.0.were: no such key; did you"),
        ({"formats": []}, "formats=[]: expected at least one of"),
        ({"comparisons": [{"name": "a", "where": {"lr": 1}}] * 2}, "comparisons=a: expected names that differ"),
    ],
)
def test_mistakes_in_the_configuration_are_reported(tmp_path: Path, values: dict[str, object], message: str) -> None:
    path = tmp_path / "exp_configs.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        read_plot_config(path)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "\x00", "comparisons: {a: 1}"])
def test_a_configuration_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "exp_configs.yaml"
    path.write_text(text)
    assert plot_results.main(["--saves", str(tmp_path), "--config", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_loss_may_have_a_target_above_one(tmp_path: Path) -> None:
    path = tmp_path / "exp_configs.yaml"
    path.write_text("metric: test_loss\ntarget: 1.5\n")
    assert read_plot_config(path).target == 1.5


@pytest.mark.parametrize(
    ("comparison", "message"),
    [
        (
            {"where": {"dataset.alph": 1}},
            "comparisons.mine.where=dataset.alph: expected a key of a run's configuration; di",
        ),
        ({"folders": ["fed_av"]}, "comparisons.mine.folders=fed_av: expected a folder below "),
        ({"where": {"seed": 0}, "over": "l"}, "comparisons.mine.over=l: expected a key of a run's configuration"),
        ({"where": {"seed": 0}, "metric": "acc"}, "comparisons.mine.metric=acc: expected a metric of its runs"),
    ],
)
def test_mistakes_that_only_the_runs_show_are_reported(
    write_run: WriteRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    comparison: dict[str, Any],
    message: str,
) -> None:
    write_run("fed_avg")
    status, out, err = draw(tmp_path, capsys, {**PLAIN, "comparisons": [{"name": "mine", **comparison}]})
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_the_configuration_that_comes_with_the_project_is_the_default() -> None:
    assert read_plot_config(HOME / "exp_configs.yaml") == PlotConfig() == read_plot_config(HOME / "no_such_file.yaml")


def test_the_examples_in_the_configuration_work(tmp_path: Path) -> None:
    lines = (HOME / "exp_configs.yaml").read_text().splitlines()
    start = lines.index("# comparisons:")
    path = tmp_path / "exp_configs.yaml"
    path.write_text("\n".join(line.removeprefix("# ") for line in lines[start:] if line.startswith("# ")))
    comparisons = read_plot_config(path).comparisons
    assert (comparisons[0].name, comparisons[0].target) == ("cifar10_iid", 0.81)
    assert [each.over for each in comparisons if each.over] == ["algorithm.align_interval"]


def test_every_key_is_documented() -> None:
    text = (checkout() / "docs" / "plotting.md").read_text()
    for cls in (PlotConfig, Comparison, Link):
        for name in cls.__dataclass_fields__:
            assert f"`{name}`" in text, name
    listed = (HOME / "exp_configs.yaml").read_text()
    for name in PlotConfig.__dataclass_fields__:
        assert f"\n{name}:" in listed, name


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


def test_drawing_needs_no_torch() -> None:
    code = "import sys; from cutlayer.plotting import compose, report; "
    code += "print('torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_figure_is_one_registration(write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is registered is drawn, named in the help, checked in the configuration and shown in the report."""
    write_run("fed_avg")
    name = "rounds_run"

    def draw(figure: Figure, curves: Sequence[Curve], options: Options) -> None:
        """Rounds that each method ran.

        Not in the caption.
        """
        figure.add_subplot().bar([curve.method for curve in curves], [len(curve.rounds) for curve in curves])

    try:
        register(name, "a run", lambda curves, options: bool(curves))(draw)
        made = compose(tmp_path / "saves", tmp_path / "out", PlotConfig(figures=(name,), formats=("png",)))
        assert f"{name}.png" in [path.name for path in made.files]
        report = next(path for path in made.files if path.name == "report.html").read_text()
        assert '<h2 id="rounds_run-heading">Rounds run</h2>' in report
        assert "<figcaption>Rounds that each method ran.</figcaption>" in report
        assert report.count('<img src="data:image/svg+xml;base64,') == 1
        with pytest.raises(ConfigError, match="did you mean rounds_run"):
            PlotConfig(figures=("round_run",))
        with pytest.raises(SystemExit):
            plot_results.main(["--help"])
        assert "rounds_run: Rounds that each method ran.\n" in capsys.readouterr().out
    finally:
        FIGURES.pop(name, None)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_caption_and_what_it_needs(name: str) -> None:
    kind = FIGURES[name]
    assert kind.caption.endswith(".")
    assert kind.needs


def test_the_document_has_a_row_for_every_figure() -> None:
    text = (checkout() / "docs" / "plotting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \|[^|]*\|$", text.partition("## Figures")[2], re.MULTILINE)
    assert set(FIGURES) <= set(rows), "docs/plotting.md, the table of figures: a row for each"
