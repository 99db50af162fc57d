"""Evaluations of personalisation as they lie in a run's folder: what is read, what is left out and what is told."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.plotting.foreign import CODE
from cutlayer.plotting.personalized import read_personalized
from cutlayer.plotting.runs import Run
from tests.plotting.making import make_run, write_personalized

accuracies = st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(values=accuracies, lr=st.floats(1e-6, 10), part=st.sampled_from(["full", "head", "body"]))
def test_what_was_written_is_read(
    values: list[list[float]], lr: float, part: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    by_epochs = {3 * at: row for at, row in enumerate(values)}
    # The order in the file is of no account.
    write_personalized(folder, part, lr, dict(reversed(by_epochs.items())))
    evaluations = read_personalized(folder)
    (found,) = evaluations.found
    assert evaluations.damaged == {}
    assert (found.part, found.lr, found.clients, found.round) == (part, lr, 5, 3)
    assert list(found.points) == sorted(by_epochs)
    for epochs, row in by_epochs.items():
        point = found.points[epochs]
        np.testing.assert_allclose([point.mean, point.std], [np.mean(row), np.std(row)], atol=1e-12)
        assert point.worst == min(row)
        np.testing.assert_allclose(point.shares, np.histogram(row, np.linspace(0, 1, 21))[0] / 5)
        assert (len(point.edges), point.edges[0], point.edges[-1]) == (21, 0, 1)


def test_a_run_has_its_evaluations_and_can_go_to_another_process(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", personalized={("full", 0.1): {0: [0.5]}, ("head", 0.1): {0: [0.25], 1: [0.75]}})
    assert [each.part for each in run.personalized.found] == ["full", "head"]
    assert pickle.loads(pickle.dumps(run)).personalized == run.personalized
    assert make_run(tmp_path / "none").personalized.found == ()
    # Another program's folders have no such thing, whatever lies in them.
    assert Run(run.folder, {}, {}, code=CODE).personalized.found == ()


def test_what_is_not_finished_is_left_out_in_silence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run").folder
    write_personalized(run, "full", 0.1, {0: [0.5]}, finished=False)
    write_personalized(run, "full", 0.2, {0: [0.5]}, finished=None)
    (write_personalized(run, "full", 0.3, {0: [0.5]}) / "summary.json").unlink()
    (run / "personalized" / "notes.txt").write_text("not a setting")
    (run / "personalized" / ".part=full,lr=1,epochs=0.new").mkdir()
    (run / "personalized" / ".part=full,lr=1,epochs=0.new" / "summary.json").write_text("{")
    evaluations = read_personalized(run)
    assert (evaluations.found, evaluations.damaged) == ((), {})


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"part": None}, "part is no name"),
        ({"part": 7}, "part is no name"),
        ({"lr": "0.1"}, "lr is no number"),
        ({"lr": True}, "lr is no number"),
        ({"lr": float("nan")}, "lr is no number"),
        ({"lr": 10**400}, "a whole number beyond 2^64"),
        ({"lr": math.inf}, "lr is no number"),
        ({"round": None}, "round is no number of a round"),
        ({"round": 1.5}, "round is no number of a round"),
        ({"clients": 0}, "no client was evaluated"),
        ({"epochs": []}, "epochs is no list of whole numbers from 0"),
        ({"epochs": [0, 1.0]}, "epochs is no list of whole numbers from 0"),
        ({"epochs": [-1, 1]}, "epochs is no list of whole numbers from 0"),
        ({"epochs": [1, 1]}, "epochs holds a number twice"),
        ({"mean": [0.5]}, "mean is no list of 2 entries, one for each of epochs"),
        ({"std": None}, "std is no list of 2 entries, one for each of epochs"),
        ({"mean": [0.5, None]}, "mean holds None, which is no fraction"),
        ({"worst_decile": [0.5, 50.0]}, "worst_decile holds 50.0, which is no fraction"),
        ({"mean": [0.5, float("nan")]}, "mean holds nan, which is no fraction"),
        ({"histogram": None}, "histogram.edges are no rising numbers"),
        ({"histogram": {"edges": [0, 1, 1], "counts": [[1, 1]] * 2}}, "histogram.edges are no rising numbers"),
        ({"histogram": {"edges": [0, 1], "counts": [[1]]}}, "histogram.counts is no list of 2 entries"),
        ({"histogram": {"edges": [0, 1], "counts": [[1], [0]]}}, "histogram.counts has a row that is no 1 numbers"),
        ({"histogram": {"edges": [0, 1], "counts": [[1], [1, 2]]}}, "histogram.counts has a row that is no 1 numbers"),
        ({"histogram": {"edges": [0, 1], "counts": [[1], 1]}}, "histogram.counts has a row that is no 1 numbers"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_odd_content_is_reported_and_the_rest_is_read(other: dict[str, Any], reason: str, tmp_path: Path) -> None:
    good = write_personalized(tmp_path, "head", 0.1, {0: [0.5], 5: [0.75]})
    odd = write_personalized(tmp_path, "full", 0.1, {0: [0.5], 5: [0.75]}, **other)
    evaluations = read_personalized(tmp_path)
    assert [each.part for each in evaluations.found] == ["head"]
    (reported,) = evaluations.damaged.items()
    assert reported[0] == odd != good
    assert reported[1].startswith(f"summary.json: {reason}")
    assert "\n" not in reported[1]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "[" * 100_000, "\x00", '{"finished": true}'], ids=lambda text: text[:9]
)
def test_a_torn_summary_is_reported(text: str, tmp_path: Path) -> None:
    folder = write_personalized(tmp_path, "full", 0.1, {0: [0.5]})
    (folder / "summary.json").write_text(text)
    evaluations = read_personalized(tmp_path)
    assert evaluations.found == ()
    assert list(evaluations.damaged) == [folder]


def test_a_summary_that_is_a_folder_and_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "personalized" / "part=full" / "summary.json").mkdir(parents=True)
    assert "Is a directory" in next(iter(read_personalized(tmp_path / "a").damaged.values()))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "personalized").write_text("")
    assert read_personalized(tmp_path / "b").damaged == {}


def test_evaluations_of_one_setting_are_one(tmp_path: Path) -> None:
    write_personalized(tmp_path, "full", 0.1, {0: [0.1], 1: [0.2]})
    write_personalized(tmp_path, "full", 0.1, {1: [0.3], 5: [0.4], 9: [0.5]})
    write_personalized(tmp_path, "full", 0.1, {20: [0.9]}, round=2)
    write_personalized(tmp_path, "full", 0.2, {0: [0.6]})
    first, second = read_personalized(tmp_path).found
    # The one with most numbers of epochs has those that several have; what an earlier round left is another model.
    assert {epochs: point.mean for epochs, point in first.points.items()} == {0: 0.1, 1: 0.3, 5: 0.4, 9: 0.5}
    assert {epochs: point.mean for epochs, point in second.points.items()} == {0: 0.6}
    assert list(first.points) == [0, 1, 5, 9]


def test_another_start_and_another_objective_are_other_ways_to_fine_tune(tmp_path: Path) -> None:
    write_personalized(tmp_path, "full", 0.1, {0: [0.1]}, start=None, objective=None)  # of an earlier version
    write_personalized(tmp_path, "full", 0.1, {0: [0.2], 1: [0.3]})
    write_personalized(tmp_path, "full", 0.1, {0: [0.4], 2: [0.4]}, start="best", round=1)
    write_personalized(tmp_path, "full", 0.1, {0: [0.5], 3: [0.5]}, start="best", objective="method")
    found = {each.part: list(each.points) for each in read_personalized(tmp_path).found}
    assert found == {"full": [0, 1], "full, start=best": [0, 2], "full, start=best, objective=method": [0, 3]}
    folder = write_personalized(tmp_path / "odd", "full", 0.1, {0: [0.5]}, start="x" * 50)
    assert read_personalized(tmp_path / "odd").damaged == {folder: "summary.json: start or objective is no word"}


def test_the_files_are_those_that_are_agreed_upon(tmp_path: Path) -> None:
    """The maker of made-up runs writes what runs have: names of folder and keys."""
    folder = write_personalized(tmp_path, "full", 0.001, {0: [0.5], 1: [0.5], 5: [0.5]})
    assert folder == tmp_path / "personalized" / "part=full,lr=0.001,epochs=0-1-5"
    assert set(json.loads((folder / "summary.json").read_text())) == {
        *("part", "lr", "epochs", "round", "clients", "skipped", "mean", "std", "worst_decile", "loss"),
        *("histogram", "finished", "start", "objective"),
    }
    assert (folder / "clients.csv").read_text().splitlines()[0] == "client,samples,epochs,accuracy,loss"
