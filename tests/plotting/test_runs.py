"""Finding runs, and naming those that cannot be used."""

import json
import os
from pathlib import Path

import pytest

from plotting.runs import find_runs
from tests.plotting.conftest import WriteRun


def test_unfinished_and_damaged_runs_are_named_and_left_out(write_run: WriteRun, tmp_path: Path) -> None:
    good = write_run("fed_avg")
    unfinished = [write_run("fed_avg", seed=1, finished=False), write_run("sl")]
    (unfinished[1] / "results.json").unlink()
    torn, short, alien = write_run("sl", seed=2), write_run("sl", seed=3), write_run("sl", seed=4)
    (torn / "results.json").write_text((torn / "results.json").read_text()[:50])
    results = json.loads((short / "results.json").read_text())
    results["test_acc"].pop()
    (short / "results.json").write_text(json.dumps(results))
    (alien / "config.yaml").write_text("lr: 1\n")
    found = find_runs(tmp_path / "saves")
    assert [run.folder for run in found.runs] == [good]
    assert sorted(found.unfinished) == sorted(unfinished)
    assert set(found.damaged) == {torn, short, alien}
    assert found.damaged[short] == "results.json: test_acc has 19 entries, rounds 20"
    assert found.damaged[alien] == "config.yaml has no algorithm.name"
    assert found.damaged[torn].startswith("results.json: ")


def test_of_runs_that_are_alike_the_latest_is_kept(write_run: WriteRun, tmp_path: Path) -> None:
    old, new = write_run("fed_avg", resume="auto"), write_run("fed_avg", resume="never")
    os.utime(old / "results.json", (1e9, 1e9))
    assert [run.folder for run in find_runs(tmp_path / "saves").runs] == [new]


def test_keys_and_names_of_a_run(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("fed_avg", distribution="noniid_dirichlet", alpha=0.3)
    (run,) = find_runs(tmp_path / "saves").runs
    assert (run.method, run.get("dataset.alpha"), run.get("dataset.nothing", 7)) == ("fed_avg", 0.3, 7)
    assert run.distribution == "noniid_dirichlet-alpha=0.3"
    assert run.distribution_label == "Dirichlet \N{GREEK SMALL LETTER ALPHA}=0.3"
    assert run.bytes()[-1] == 20_000
    assert run.bytes(("y",))[-1] == 20 * 990


def test_an_empty_folder_has_no_runs(tmp_path: Path) -> None:
    found = find_runs(tmp_path)
    assert (found.runs, found.unfinished, found.damaged) == ([], [], {})


@pytest.mark.parametrize("text", ["", "[]", "a: [", "null"])
def test_a_config_that_is_none_is_damage(write_run: WriteRun, tmp_path: Path, text: str) -> None:
    folder = write_run("fed_avg")
    (folder / "config.yaml").write_text(text)
    assert set(find_runs(tmp_path / "saves").damaged) == {folder}
