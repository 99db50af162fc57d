"""Averages, targets and what tells curves apart, against closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest

from plotting.curves import best_accuracies, bytes_to_reach, default_target, final_accuracies, make_curves
from plotting.runs import find_runs
from tests.plotting.conftest import WriteRun


def accuracy(number: int, ceiling: float = 0.9) -> float:
    return ceiling * (1 - math.exp(-number / 5))


def test_seeds_are_averaged_with_their_deviation(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run("fed_avg", seed=seed, sent=1000 + 300 * seed)
    (curve,) = make_curves(find_runs(tmp_path / "saves").runs)
    assert len(curve.runs) == 3
    assert curve.label == ""
    np.testing.assert_allclose(curve.accuracy, [accuracy(number) + 0.01 for number in range(1, 21)])
    np.testing.assert_allclose(curve.deviation, np.std([0.0, 0.01, 0.02]))
    np.testing.assert_allclose(curve.bytes, [1300 * number for number in range(1, 21)])
    np.testing.assert_allclose(sorted(final_accuracies(curve)), accuracy(20) + np.array([0, 0.01, 0.02]))


def test_seeds_that_stopped_early_shorten_the_average(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("fed_avg", seed=0, rounds=20)
    write_run("fed_avg", seed=1, rounds=12)
    (curve,) = make_curves(find_runs(tmp_path / "saves").runs)
    assert list(curve.rounds) == list(range(1, 13))


def test_settings_of_one_method_are_told_apart_by_what_differs(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run("fed_avg", lr=0.1, optimizer={"name": "adam", "lr": 0.1}, seed=seed)
    # Neither the folder nor, on IID data, alpha has an effect; the optimizer's rate follows the top-level one.
    write_run("fed_avg", lr=0.01, optimizer={"name": "adam", "lr": 0.01}, save_dir="elsewhere", alpha=5.0)
    write_run("fed_avg", lr=0.01, optimizer={"name": "adam", "lr": 0.5})
    write_run("sl", lr=0.1)
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    assert [(curve.method, curve.label, curve.variant, len(curve.runs)) for curve in curves] == [
        ("fed_avg", "lr=0.01, optimizer.lr=0.01", 0, 1),
        ("fed_avg", "lr=0.01, optimizer.lr=0.5", 1, 1),
        ("fed_avg", "lr=0.1, optimizer.lr=0.1", 2, 2),
        ("sl", "", 0, 1),
    ]


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_bytes_to_reach_a_target(write_run: WriteRun, tmp_path: Path, target: float) -> None:
    write_run("fed_avg", sent=1000)
    (curve,) = make_curves(find_runs(tmp_path / "saves").runs)
    first = math.ceil(-5 * math.log(1 - target / 0.9))
    assert bytes_to_reach(curve, target) == [1000 * first]
    assert bytes_to_reach(curve, target, ("y",)) == [990 * first]
    assert bytes_to_reach(curve, 0.95) == [None]


def test_the_default_target_is_reached_by_the_best_method_that_communicates(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run("centralized", ceiling=1.0, sent=0)
    write_run("fed_avg", ceiling=0.9)
    write_run("sl", ceiling=0.5)
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    target = default_target(curves)
    assert target == math.floor(95 * accuracy(20)) / 100
    assert default_target([curve for curve in curves if not curve.sends]) is None


def test_a_run_that_diverged_is_kept_without_its_figures(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("sl", ceiling=math.nan)
    write_run("fed_avg")
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    assert np.isnan(best_accuracies(curves[1])).all()
    assert bytes_to_reach(curves[1], 0.1) == [None]
    assert default_target(curves) is not None


def test_what_follows_from_another_key_is_told_once(write_run: WriteRun, tmp_path: Path) -> None:
    for rate, model in ((0.1, "mlp"), (0.01, "resnet18")):
        write_run("sl", lr=rate, optimizer={"name": "adam", "lr": rate}, model={"name": model})
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    assert {curve.label for curve in curves} == {"lr=0.1, model=mlp", "lr=0.01, model=resnet18"}
