"""Finding runs, reading what they hold, and naming those that cannot be used."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cutlayer.plotting import runs
from cutlayer.plotting.runs import find_runs
from cutlayer.plotting.timing import Link
from tests.plotting.conftest import WriteRun

Change = Callable[[dict[str, Any]], Any]


def changed(folder: Path, change: Change) -> None:
    """Change the content of a run's `results.json` in place."""
    path = folder / "results.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))


def set_to(name: str, value: Any) -> Change:
    return lambda results: results.__setitem__(name, value)


def test_unfinished_and_damaged_runs_are_named_and_left_out(write_run: WriteRun, tmp_path: Path) -> None:
    good = write_run("fed_avg")
    unfinished = [write_run("fed_avg", seed=1, finished=False), write_run("sl")]
    (unfinished[1] / "results.json").unlink()
    (unfinished[0] / "status.json").write_text('{"state": "running", "error": null}')
    torn, alien = write_run("sl", seed=2), write_run("sl", seed=4)
    (torn / "results.json").write_text((torn / "results.json").read_text()[:50])
    (alien / "config.yaml").write_text("lr: 1\n")
    found = find_runs(tmp_path / "saves")
    assert [run.folder for run in found.runs] == [good]
    assert found.unfinished == {unfinished[0]: "running", unfinished[1]: "no results yet"}
    assert set(found.damaged) == {torn, alien}
    assert found.damaged[alien] == "config.yaml has no algorithm.name"
    assert found.damaged[torn].startswith("results.json: ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda results: results["test_acc"].pop(), "results.json: test_acc has 19 entries, rounds 20"),
        (lambda results: results["time_wall"].pop(), "results.json: time_wall has 19 entries, rounds 20"),
        (lambda results: results["traffic"]["up/smashed/z"].pop(), "results.json: traffic.up/smashed/z has 19 entries"),
        (lambda results: results.pop("comm_up"), "results.json: no list comm_up"),
        (set_to("test_acc", "0.9"), "results.json: no list test_acc"),
        (set_to("test_acc", ["nan"] * 20), "results.json: test_acc holds 'nan', which is no number"),
        (set_to("test_acc", [True] * 20), "results.json: test_acc holds True, which is no number"),
        (set_to("train_loss", [[1]] * 20), "results.json: train_loss holds [1], which is no number"),
        (set_to("train_loss", 3), "results.json: train_loss is no list"),
        (set_to("metrics", [1]), "results.json: metrics is no mapping of names to lists"),
        (set_to("metrics", {"val_acc": ["x"] * 20}), "results.json: metrics.val_acc holds 'x', which is no number"),
        (set_to("traffic", {"up": [1] * 20}), "results.json: traffic.up: expected direction/kind/field"),
        (set_to("comm_load", [None] * 20), "results.json: comm_load is no running count"),
        (set_to("comm_load", [1.5] * 20), "results.json: comm_load is no running count"),
        (set_to("comm_load", [2, 1] * 10), "results.json: comm_load is no running count"),
        (set_to("comm_load", [-1] * 20), "results.json: comm_load is no running count"),
        (set_to("rounds", [1] * 20), "results.json: rounds are not rising numbers from 1"),
        (set_to("rounds", list(range(20))), "results.json: rounds are not rising numbers from 1"),
        (set_to("rounds", [None] * 20), "results.json: rounds are not rising numbers from 1"),
        (lambda results: results.update({name: [] for name in results}), "results.json: no evaluated round"),
        (lambda results: results.clear(), "results.json: no list rounds"),
    ],
)
def test_content_that_cannot_be_drawn_is_damage(
    write_run: WriteRun, tmp_path: Path, change: Change, reason: str
) -> None:
    good, bad = write_run("fed_avg"), write_run("fed_avg", seed=1)
    changed(bad, change)
    found = find_runs(tmp_path / "saves")
    assert [run.folder for run in found.runs] == [good]
    assert list(found.damaged) == [bad]
    assert found.damaged[bad].startswith(reason)


@pytest.mark.parametrize("name", ["config.yaml", "results.json"])
@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"[" * 30_000, b"- " * 30_000, b"? " * 30_000, b"", b"a: b: c", b"[]", b"null"]
)
def test_files_that_hold_no_text_of_their_kind_are_damage(
    write_run: WriteRun, tmp_path: Path, name: str, content: bytes
) -> None:
    good, bad = write_run("fed_avg"), write_run("fed_avg", seed=1)
    (bad / name).write_bytes(content)
    found = find_runs(tmp_path / "saves")
    assert [run.folder for run in found.runs] == [good]
    assert list(found.damaged) == [bad]
    assert "\n" not in found.damaged[bad]


def test_a_configuration_runs_no_code(write_run: WriteRun, tmp_path: Path) -> None:
    bad, trace = write_run("fed_avg"), tmp_path / "trace"
    (bad / "config.yaml").write_text(f"a: !!python/object/apply:pathlib.Path.touch [{trace}]\n")
    assert list(find_runs(tmp_path / "saves").damaged) == [bad]
    assert not trace.exists()


def test_a_folder_that_vanishes_while_it_is_read_is_damage(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, good = write_run("fed_avg"), write_run("fed_avg", seed=1)

    def vanish(folder: Path) -> runs.Run:
        if folder == gone:
            shutil.rmtree(folder)
        return read(folder)

    read = runs.read_run
    monkeypatch.setattr(runs, "read_run", vanish)
    found = find_runs(tmp_path / "saves")
    assert [run.folder for run in found.runs] == [good]
    assert found.damaged == {gone: "it vanished while it was read"}


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is readable to root")
def test_files_that_may_not_be_read_are_damage(write_run: WriteRun, tmp_path: Path) -> None:
    closed, shut = write_run("fed_avg"), write_run("fed_avg", seed=1)
    (closed / "results.json").chmod(0)
    shut.chmod(0)
    try:
        damaged = find_runs(tmp_path / "saves").damaged
    finally:
        shut.chmod(0o700)
    assert damaged == {
        closed: "results.json: Permission denied",
        shut: f"{shut.name} cannot be read: Permission denied",
    }


def test_a_file_that_is_a_dead_link_is_damage(write_run: WriteRun, tmp_path: Path) -> None:
    bad = write_run("fed_avg")
    (bad / "results.json").unlink()
    (bad / "results.json").symlink_to("results.json")
    (reason,) = find_runs(tmp_path / "saves").damaged.values()
    assert reason.startswith("results.json: ")


def test_a_run_without_its_configuration_is_damage(write_run: WriteRun, tmp_path: Path) -> None:
    bad = write_run("fed_avg")
    (bad / "config.yaml").unlink()
    assert find_runs(tmp_path / "saves").damaged == {
        bad: "config.yaml is missing, and results.json is not one of FSL-SAGE's code"
    }


def test_what_lies_in_a_runs_folder_is_no_run(write_run: WriteRun, tmp_path: Path) -> None:
    good = write_run("fed_avg")
    for inner in ("wandb/files", "checkpoint"):
        (good / inner).mkdir(parents=True)
        (good / inner / "config.yaml").write_text("wandb_version: 1\n")
    hidden = tmp_path / "saves" / ".hydra"
    hidden.mkdir()
    (hidden / "config.yaml").write_text("lr: 1\n")
    found = find_runs(tmp_path / "saves")
    assert [run.folder for run in found.runs] == [good]
    assert (found.unfinished, found.damaged) == ({}, {})


def test_of_runs_that_are_alike_the_latest_is_kept(write_run: WriteRun, tmp_path: Path) -> None:
    old, new = write_run("fed_avg", resume="auto"), write_run("fed_avg", resume="never")
    older = write_run("fed_avg", alpha=7, num_clients=3.0)
    write_run("fed_avg", num_clients=3)
    for folder, at in ((old, 1e9), (older, 1e9)):
        os.utime(folder / "results.json", (at, at))
    found = find_runs(tmp_path / "saves")
    assert new in [run.folder for run in found.runs]
    assert len(found.runs) == 2
    assert [run.folder for run in found.older] == [old, older]


def test_folders_that_overlap_are_read_once(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("fed_avg")
    found = find_runs(tmp_path / "saves", folder, tmp_path / "saves" / "fed_avg")
    assert [run.folder for run in found.runs] == [folder]
    assert found.older == []


def test_keys_and_names_of_a_run(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("fed_avg", distribution="noniid_dirichlet", alpha=0.3)
    (run,) = find_runs(tmp_path / "saves").runs
    assert (run.method, run.get("dataset.alpha"), run.get("dataset.nothing", 7)) == ("fed_avg", 0.3, 7)
    assert run.distribution == "noniid_dirichlet-alpha=0.3"
    assert run.distribution_label == "Dirichlet \N{GREEK SMALL LETTER ALPHA}=0.3"
    assert run.alpha == 0.3
    assert run.bytes()[-1] == 20_000
    assert run.bytes(("y",))[-1] == 20 * 990


def test_alpha_counts_where_it_has_an_effect(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("fed_avg", alpha=0.3)
    write_run("sl", distribution="noniid_dirichlet", alpha=1)
    iid, dirichlet = find_runs(tmp_path / "saves").runs
    assert iid.alpha is None
    assert (dirichlet.alpha, dirichlet.distribution) == (1.0, "noniid_dirichlet-alpha=1")


def test_what_clients_report_of_themselves_is_not_taken_off_the_bytes(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("fed_avg")
    changed(folder, lambda results: results["traffic"].update({"up/metrics/samples": [8] * 20}))
    (run,) = find_runs(tmp_path / "saves").runs
    assert run.bytes(("samples",)) == run.bytes()


def test_series_of_a_run(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("fed_avg")
    values = [None, 0.5, math.inf, *([1] * 17)]
    changed(folder, lambda results: results["metrics"].update({"local_acc/mean": values}))
    (run,) = find_runs(tmp_path / "saves").runs
    assert run.metrics == ("test_acc", "test_loss", "train_loss", "local_acc/mean")
    np.testing.assert_equal(run.series("local_acc/mean"), [np.nan, 0.5, np.nan, *([1.0] * 17)])
    np.testing.assert_allclose(run.series("test_acc"), [0.9 * (1 - math.exp(-number / 5)) for number in range(1, 21)])
    with pytest.raises(ValueError, match="no metric accuracy; it has test_acc, test_loss, train_loss, local_acc/mean"):
        run.series("accuracy")
    seconds = run.seconds(Link())
    assert seconds is not None
    assert (np.diff(seconds) > 0).all()


def test_an_empty_folder_has_no_runs(tmp_path: Path) -> None:
    found = find_runs(tmp_path)
    assert (found.runs, found.older, found.unfinished, found.damaged) == ([], [], {}, {})
