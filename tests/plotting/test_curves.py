"""Averages, targets and what tells curves apart, against closed forms."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.plotting.curves import (
    best_values,
    bytes_to_reach,
    default_budget,
    default_target,
    final_values,
    higher_is_better,
    make_curves,
    values_at_budget,
)
from cutlayer.plotting.runs import ALPHA, Run, find_runs
from cutlayer.plotting.timing import Link
from cutlayer.runtime.launching.hydra_support import load_config
from tests.plotting.conftest import WriteRun, config_of


def accuracy(number: int, ceiling: float = 0.9) -> float:
    return ceiling * (1 - math.exp(-number / 5))


def test_seeds_are_averaged_with_their_deviation(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run("fed_avg", seed=seed, sent=1000 + 300 * seed)
    (curve,) = make_curves(find_runs(tmp_path / "saves").runs)
    assert len(curve.runs) == 3
    assert curve.label == ""
    np.testing.assert_allclose(curve.value, [accuracy(number) + 0.01 for number in range(1, 21)])
    np.testing.assert_allclose(curve.deviation, np.std([0.0, 0.01, 0.02]))
    np.testing.assert_allclose(curve.bytes, [1300 * number for number in range(1, 21)])
    np.testing.assert_allclose(sorted(final_values(curve)), accuracy(20) + np.array([0, 0.01, 0.02]))


def test_seeds_that_stopped_early_shorten_the_average(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("fed_avg", seed=0, rounds=20)
    write_run("fed_avg", seed=1, rounds=12)
    (curve,) = make_curves(find_runs(tmp_path / "saves").runs)
    assert list(curve.rounds) == list(range(1, 13))


def test_settings_of_one_method_are_distinguished_by_what_differs(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run("fed_avg", lr=0.1, optimizer={"name": "adam", "lr": 0.1}, seed=seed)
    # Neither the folder nor, on IID data, alpha has an effect; the optimizer's rate is what decides.
    write_run("fed_avg", lr=0.01, optimizer={"name": "adam", "lr": 0.01}, save_dir="elsewhere", alpha=5.0)
    write_run("fed_avg", lr=0.01, optimizer={"name": "adam", "lr": 0.5})
    write_run("sl", lr=0.1)
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    assert [(curve.method, curve.label, curve.variant, len(curve.runs)) for curve in curves] == [
        ("fed_avg", "lr=0.01", 0, 1),
        ("fed_avg", "lr=0.1", 1, 2),
        ("fed_avg", "lr=0.5", 2, 1),
        ("sl", "", 0, 1),
    ]


def test_keys_that_do_not_decide_or_are_not_read_make_no_other_curve(write_run: WriteRun, tmp_path: Path) -> None:
    """Of runs of earlier versions it follows from the configuration."""
    write_run("fed_avg", seed=0, communication_by="round", device="cpu", threads=1)
    write_run("fed_avg", seed=1, communication_by="client", jobs_per_gpu=3, model={"name": "resnet18", "cut": "layer1"})
    write_run("fed_avg", seed=2, model={"name": "resnet18", "client": {"optimizer": {"lr": 3.0}}}, monitor={"k": 5})
    write_run("sl", seed=0, model={"name": "resnet18", "cut": "layer1"})
    write_run("sl", seed=1, model={"name": "resnet18", "cut": "layer2"})
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    assert [(curve.method, curve.label, len(curve.runs)) for curve in curves] == [
        ("fed_avg", "", 3),
        ("sl", "model.cut=layer1", 1),
        ("sl", "model.cut=layer2", 1),
    ]


def test_a_run_says_itself_which_keys_decided(tmp_path: Path, write_run: WriteRun) -> None:
    """So that drawing it needs neither its algorithm nor what takes torch."""
    for seed, mine in ((0, 1), (1, 2)):
        path = write_run(
            "of_another_project", seed=seed, algorithm={"name": "of_another_project", "mine": mine}, x=mine
        )
        results = json.loads((path / "results.json").read_text())
        keys = ["algorithm.mine", "algorithm.name", "seed"]
        (path / "results.json").write_text(json.dumps({**results, "setting": keys}))
    runs = find_runs(tmp_path / "saves").runs
    assert [run.setting for run in runs] == [
        {"algorithm.mine": str(mine), "algorithm.name": '"of_another_project"'} for mine in (1, 2)
    ]
    assert [curve.label for curve in make_curves(runs)] == ["mine=1", "mine=2"]


def test_a_key_that_a_run_of_an_earlier_version_lacks_has_its_default(tmp_path: Path, write_run: WriteRun) -> None:
    for seed, interval in ((0, None), (1, 1), (2, 2)):
        config = load_config(["algorithm=fed_avg", f"seed={seed}", f"cohort_interval={interval or 1}", "rounds=3"])
        old = {"cohort_interval"} if interval is None else set()
        path = write_run("fed_avg", **{key: value for key, value in config.to_mapping().items() if key not in old})
        results = json.loads((path / "results.json").read_text())
        results["setting"] = sorted(config.setting().keys() - old)
        (path / "results.json").write_text(json.dumps(results))
    assert [(curve.label, len(curve.runs)) for curve in make_curves(find_runs(tmp_path / "saves").runs)] == [
        ("cohort_interval=1", 2),
        ("cohort_interval=2", 1),
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
    assert np.isnan(best_values(curves[1])).all()
    assert bytes_to_reach(curves[1], 0.1) == [None]
    assert default_target(curves) is not None


def test_what_follows_from_another_key_is_reported_once(write_run: WriteRun, tmp_path: Path) -> None:
    for rate, model in ((0.1, "mlp"), (0.01, "resnet18")):
        write_run("sl", lr=rate, optimizer={"name": "adam", "lr": rate}, model={"name": model})
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    assert {curve.label for curve in curves} == {"lr=0.1, model=mlp", "lr=0.01, model=resnet18"}


@st.composite
def measured(draw: st.DrawFn) -> list[tuple[int, float | None, int]]:
    """Round, value and bytes of each evaluation of a run."""
    rounds = sorted(draw(st.sets(st.integers(1, 12), min_size=1)))
    values = draw(st.lists(st.floats(-5, 5) | st.none(), min_size=len(rounds), max_size=len(rounds)))
    steps = draw(st.lists(st.integers(0, 100), min_size=len(rounds), max_size=len(rounds)))
    return list(zip(rounds, values, np.cumsum(steps).tolist(), strict=True))


def run_with(seed: int, evaluations: list[tuple[int, float | None, int]], metric: str) -> Run:
    rounds, values, load = (list(column) for column in zip(*evaluations, strict=True))
    results = {"rounds": rounds, "test_acc": [0.5] * len(rounds), "comm_load": load, "metrics": {}, metric: values}
    return Run(Path(str(seed)), config_of("sl", seed=seed), results)


@settings(max_examples=80, deadline=None)
@given(st.lists(measured(), min_size=1, max_size=4), st.sampled_from(["test_acc", "test_loss"]))
def test_averages_agree_with_pandas(seeds: list[list[tuple[int, float | None, int]]], metric: str) -> None:
    runs = [run_with(seed, evaluations, metric) for seed, evaluations in enumerate(seeds)]
    curves = make_curves(runs, metric)
    columns = ["round", "value", "bytes"]
    frames = [pd.DataFrame(each, columns=columns).astype(float).assign(seed=seed) for seed, each in enumerate(seeds)]
    frame = pd.concat(frames)
    common = frame.groupby("round").filter(lambda rows: len(rows) == len(seeds)).groupby("round")
    if not len(common):
        assert [len(curve.runs) for curve in curves] == [1] * len(seeds)
        assert [curve.label for curve in curves] == [f"seed={seed}" for seed in range(len(seeds))]
        return
    (curve,) = curves
    spread = common["value"].agg(lambda column: column.std(ddof=0, skipna=False))
    np.testing.assert_array_equal(curve.rounds, sorted(common.groups))
    np.testing.assert_allclose(curve.bytes, common["bytes"].mean())
    np.testing.assert_allclose(curve.value, common["value"].agg(lambda column: column.mean(skipna=False)), atol=1e-12)
    np.testing.assert_allclose(curve.deviation, spread, atol=1e-12)
    assert curve.metric == metric
    assert curve.seconds is None


@settings(max_examples=80, deadline=None)
@given(measured(), st.floats(-5, 5), st.sampled_from(["test_acc", "test_loss"]), st.integers(0, 1300))
def test_targets_and_budgets_agree_with_a_plain_search(
    evaluations: list[tuple[int, float | None, int]], target: float, metric: str, budget: int
) -> None:
    (curve,) = make_curves([run_with(0, evaluations, metric)], metric)
    sign = 1 if metric == "test_acc" else -1
    reached = [sent for _, value, sent in evaluations if value is not None and sign * value >= sign * target]
    assert bytes_to_reach(curve, target) == [reached[0] if reached else None]
    within = [value for _, value, sent in evaluations if sent <= budget]
    expected = within[-1] if within and within[-1] is not None else math.nan
    np.testing.assert_equal(values_at_budget(curve, budget), [expected])
    total = evaluations[-1][2]
    assert default_budget([curve]) == (total if total else None)


def test_the_budget_is_the_smallest_total_of_those_that_communicate(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("centralized", sent=0)
    write_run("fed_avg", sent=900)
    write_run("sl", sent=1000, rounds=7)
    curves = make_curves(find_runs(tmp_path / "saves").runs)
    assert default_budget(curves) == 7000
    assert default_budget(curves, ("y",)) == 7 * 990
    assert default_budget(curves[:1]) is None


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("test_acc", True),
        ("local_acc/mean", True),
        ("test_loss", False),
        ("val_loss", False),
        ("perplexity", False),
        ("align/error_after", False),
        ("align/target", True),
    ],
)
def test_losses_and_errors_are_better_when_lower(metric: str, higher: bool) -> None:
    assert higher_is_better(metric) is higher


@pytest.mark.parametrize(("lowest", "target"), [(0.4, 0.42), (0.123, 0.13), (2.0, 2.1), (12.0, 13.0), (0.0, None)])
def test_the_default_target_of_a_loss_lies_above_the_lowest(lowest: float, target: float | None) -> None:
    (curve,) = make_curves([run_with(0, [(1, 20.0, 5), (2, lowest, 10)], "test_loss")], "test_loss")
    assert default_target([curve]) == (None if target is None else pytest.approx(target, rel=1e-12))


def test_simulated_seconds_are_averaged_where_all_runs_have_them(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run("fed_avg", seed=seed)
    runs = find_runs(tmp_path / "saves").runs
    slow, fast = (make_curves(runs, link=Link(bandwidth_mbit=rate))[0].seconds for rate in (1e-3, 1e3))
    assert slow is not None
    assert fast is not None
    expected = np.mean([run.seconds(Link(bandwidth_mbit=1e-3)) for run in runs], axis=0)
    np.testing.assert_allclose(slow, expected)
    assert (slow > fast).all()
    del runs[0].results["time_client"]
    assert make_curves(runs)[0].seconds is None


def test_settings_are_reported_as_people_say_them_and_come_in_the_order_of_their_numbers(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run("fed_avg")
    for alpha in (10.0, 0.1, 2.0):
        write_run("fed_avg", distribution="noniid_dirichlet", alpha=alpha)
    labels = [curve.label for curve in make_curves(find_runs(tmp_path / "saves").runs)]
    assert labels == [*(f"Dirichlet {ALPHA}={alpha}" for alpha in ("0.1", "2", "10")), "IID"]
