"""Which runs a comparison holds."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.plotting.experiments import Comparison, PlotConfig
from cutlayer.plotting.runs import find_runs
from cutlayer.plotting.selection import NoRuns, automatic, outside, same, select
from cutlayer.runtime.ground.config import ConfigError
from tests.plotting.conftest import WriteRun


@pytest.mark.parametrize(
    ("value", "wanted", "equal"),
    [
        (0.1, "0.1", True),
        (1, 1.0, True),
        (1.0, "1", True),
        (0.001, "1e-3", True),
        ("10", 10, True),
        (0.1, 0.11, False),
        (True, True, True),
        (True, "true", True),
        (True, 1, False),
        (0, False, False),
        (None, None, True),
        (None, "null", True),
        (None, 0, False),
        ("iid", "iid", True),
        ("iid", "IID", False),
        ([1, 2], [1, 2], True),
        ("nan", 1, False),
    ],
)
def test_values_compare_by_what_they_mean(value: Any, wanted: Any, equal: bool) -> None:
    assert same(value, wanted) is same(wanted, value) is equal


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_compare_as_numbers(one: float, other: float) -> None:
    assert same(one, repr(other)) == same(repr(one), other) == (one == other)


def chosen(tmp_path: Path, where: dict[str, Any] | None = None, folders: tuple[str, ...] = ()) -> set[Path]:
    saves = tmp_path / "saves"
    comparison = Comparison("mine", where=where or {}, folders=folders)
    found = find_runs(saves, *outside([comparison], saves))
    return {run.folder for run in select(comparison, found, saves)}


def test_any_key_filters(write_run: WriteRun, tmp_path: Path) -> None:
    avg, tuned = write_run("fed_avg", lr=0.001), write_run("fed_avg", lr=0.01)
    sl = write_run("sl", seed=1, distribution="noniid_dirichlet", alpha=0.1)
    assert chosen(tmp_path, {"lr": "1e-3"}) == {avg, sl}
    assert chosen(tmp_path, {"lr": [0.01, 5]}) == {tuned}
    assert chosen(tmp_path, {"algorithm": "fed_avg", "lr": 0.001}) == {avg}
    assert chosen(tmp_path, {"algorithm.name": ["sl", "fed_avg"]}) == {avg, tuned, sl}
    assert chosen(tmp_path, {"seed": 1}) == {sl}
    assert chosen(tmp_path, {"distribution": "noniid_dirichlet-alpha=0.1"}) == {sl}
    assert chosen(tmp_path, {"dataset.alpha": 0.1}) == {avg, tuned, sl}
    assert chosen(tmp_path, {"model.cut": None}) == {avg, tuned, sl}
    assert chosen(tmp_path, {"code": "Cutlayer"}) == {avg, tuned, sl}


def test_a_filter_that_leaves_nothing_says_which_and_what_there_is(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("fed_avg")
    write_run("sl", lr=0.5)
    with pytest.raises(NoRuns) as caught:
        chosen(tmp_path, {"algorithm": "fed_avg", "lr": 0.5})
    assert str(caught.value) == "no finished run has lr=0.5 (there are: 0.001)"
    with pytest.raises(NoRuns) as caught:
        chosen(tmp_path, {"algorithm": "fedavg"})
    assert "algorithm.name=fedavg; did you mean fed_avg? (there are: fed_avg, sl)" in str(caught.value)


def test_a_key_that_no_run_has(write_run: WriteRun, tmp_path: Path) -> None:
    with pytest.raises(NoRuns, match="no finished run was found"):
        chosen(tmp_path, {"datset.name": "mnist"})
    write_run("fed_avg")
    with pytest.raises(ConfigError, match=r"where=datset\.name: expected a key .* did you mean dataset\.name\?"):
        chosen(tmp_path, {"datset.name": "mnist"})


def test_folders_of_runs_and_above_them(write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, sl = write_run("fed_avg"), write_run("fed_avg", seed=1), write_run("sl")
    assert chosen(tmp_path, folders=("fed_avg",)) == {first, second}
    assert chosen(tmp_path, folders=(f"fed_avg/{second.name}", str(sl))) == {second, sl}
    assert chosen(tmp_path, folders=(".",)) == {first, second, sl}
    assert chosen(tmp_path, {"seed": 1}, folders=("fed_avg", "sl")) == {second}
    monkeypatch.chdir(tmp_path)
    comparison = Comparison("mine", folders=(f"fed_avg/{second.name}",))
    (run,) = select(comparison, find_runs(Path("saves")), Path("saves"))
    assert run.folder.absolute() == second
    with pytest.raises(ConfigError, match="folders=fed_agv: expected a folder below .*; did you mean fed_avg"):
        chosen(tmp_path, folders=("fed_agv",))


def test_a_folder_elsewhere(write_run: WriteRun, tmp_path: Path) -> None:
    here, there = write_run("fed_avg"), write_run("fed_avg", seed=1)
    (tmp_path / "elsewhere").mkdir()
    there = there.rename(tmp_path / "elsewhere" / there.name)
    assert chosen(tmp_path, folders=(str(tmp_path / "elsewhere"),)) == {there}
    assert chosen(tmp_path, folders=("../elsewhere", "fed_avg")) == {here, there}


def test_an_older_run_counts_where_it_is_named_itself(write_run: WriteRun, tmp_path: Path) -> None:
    old, new = write_run("fed_avg"), write_run("fed_avg")
    os.utime(old / "results.json", (1e9, 1e9))
    assert chosen(tmp_path, folders=("fed_avg",)) == {new}
    assert chosen(tmp_path, folders=(f"fed_avg/{old.name}",)) == {old}
    assert chosen(tmp_path, {"seed": 0}) == {new}


def test_groups_are_found_and_named(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("fed_avg")
    write_run("sl", model={"name": "my net/v2"})
    write_run("sl", model={"name": "my-net-v2"})
    for alpha in (0.1, 1.0, 100):
        write_run("fed_avg", distribution="noniid_dirichlet", alpha=alpha)
    write_run("sl", distribution="shards")
    runs = find_runs(tmp_path / "saves").runs
    found = {each.name: each for each in automatic(runs, PlotConfig())}
    data = "cifar10-resnet18-"
    assert sorted(found) == [
        "cifar10-my-net-v2-iid",
        "cifar10-my-net-v2-iid-2",
        f"{data}iid",
        f"{data}noniid_dirichlet-alpha",
        *(f"{data}noniid_dirichlet-alpha={alpha}" for alpha in ("0.1", "1", "100")),
        f"{data}shards-classes_per_client=null",
    ]
    assert {name: len(each) for name, each in _select_all(found, tmp_path).items() if len(each) > 1} == {
        f"{data}noniid_dirichlet-alpha": 4
    }


def test_alpha_is_compared_only_if_its_figures_are_wanted(write_run: WriteRun, tmp_path: Path) -> None:
    for alpha in (0.1, 1.0):
        write_run("fed_avg", distribution="noniid_dirichlet", alpha=alpha)
    runs = find_runs(tmp_path / "saves").runs
    assert len(automatic(runs, PlotConfig(figures=("latency",)))) == 2
    assert len(automatic(runs, PlotConfig(figures=("latency", "metric_alpha")))) == 3


def _select_all(comparisons: dict[str, Comparison], tmp_path: Path) -> dict[str, list[Any]]:
    found = find_runs(tmp_path / "saves")
    return {name: select(each, found, tmp_path / "saves") for name, each in comparisons.items()}
