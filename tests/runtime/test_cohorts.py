"""Who is drawn into a cohort, who is tested on what, and settings in which nobody could ever train."""

import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.datasets import Partition
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.setup import Setup
from tests.conftest import play

SKEWED = ("dataset.distribution=quantity_skew", "dataset.alpha=0.001", "dataset.min_samples=0", "num_clients=10")
NATURAL = (
    "dataset=synthetic", "dataset.distribution=natural",
    "dataset.options={n_train:400,n_test:200,groups:6,height:6,width:6}", "num_clients=6", "algorithm=fed_avg",
)  # fmt: skip


class Drawing(Setup):
    """As much of a federation as draws cohorts, of clients of given sizes."""

    def __init__(self, config: Any, sizes: list[int]) -> None:
        self.algorithm = __import__("cutlayer.algorithms").algorithms.get(config.algorithm_name)
        self.config, self.population = replace(config, num_clients=len(sizes)), len(sizes)
        ends = np.cumsum([0, *sizes])
        self.partition = Partition(np.arange(ends[-1]), ends.astype(np.int64))
        self._able = self._with_batches(1)


@given(
    sizes=st.lists(st.sampled_from([0, 0, 3, 40]), min_size=1, max_size=12).filter(any), frac=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_cohort_is_of_clients_with_data_and_as_large_as_these_allow(
    configure, sizes: list[int], frac: float, seed: int
) -> None:
    setup = Drawing(replace(configure("algorithm=fed_avg"), frac=frac, seed=seed), sizes)
    able = {client for client, size in enumerate(sizes) if size}
    wanted = min(len(able), max(1, math.ceil(frac * len(sizes) - 1e-9)))
    seen = set[int]()
    for round in range(5):
        cohort = setup.cohort(round)
        assert len(cohort) == len({*cohort}) == wanted
        assert {*cohort} <= able
        assert cohort == setup.cohort(round)
        seen |= {*cohort}
    assert len(seen) >= wanted
    if all(sizes):
        generator = rng.numpy_generator(seed, round=4, stream="cohort")
        assert setup.cohort(4) == generator.choice(len(sizes), wanted, replace=False).tolist()


def test_a_fixed_order_serves_those_that_are_drawn_by_their_numbers(configure) -> None:
    config, sizes = replace(configure("algorithm=fed_avg"), frac=0.5), [4, 0, 9, 5, 8, 3, 7, 2]
    drawn, fixed = (Drawing(replace(config, cohort_order=order), sizes) for order in ("drawn", "fixed"))
    cohorts = [drawn.cohort(round) for round in range(8)]
    assert any(cohort != sorted(cohort) for cohort in cohorts)
    assert [fixed.cohort(round) for round in range(8)] == [sorted(cohort) for cohort in cohorts]


def test_all_clients_with_data_are_drawn_evenly(configure) -> None:
    setup = Drawing(replace(configure("algorithm=fed_avg"), frac=0.2), [0, 7, 0, 9, 5, 0, 8, 0, 0, 0])
    drawn = np.bincount(np.concatenate([setup.cohort(round) for round in range(2000)]), minlength=10)
    assert (drawn[[0, 2, 5, 7, 8, 9]] == 0).all()
    assert drawn[[1, 3, 4, 6]] / 4000 == pytest.approx(np.full(4, 1 / 4), abs=0.04)


def test_every_round_trains_where_few_clients_have_data(configure, caplog) -> None:
    federation = Federation(configure("algorithm=fed_avg", *SKEWED, "frac=0.1", "rounds=4"))
    sizes = federation.setup.partition.sizes
    assert (sizes == 0).sum() >= 5
    with caplog.at_level(logging.WARNING):
        federation.setup.report_idle()
        while not federation.done:
            record, _ = federation.step()
            assert record.clients == 1
            assert record.train_loss is not None
    reported = [record.message for record in caplog.records]
    assert reported == [
        f"{(sizes == 0).sum()} of 10 clients, of 0 to 0 samples, have no batch to train on and are in no cohort"
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("num_clients=100", "dataset.drop_last=always"),
            r"^batch_size=100: expected at most 15 with dataset\.drop_last",
        ),
        (
            ("num_clients=1437", "model=resnet18", "model.options.width=2"),
            r"^num_clients=1437: expected fewer: no client has the 2 samples",
        ),
    ],
)
def test_a_setting_in_which_nobody_can_train_is_refused(configure, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Federation(configure("algorithm=fed_avg", *overrides))
    assert "\n" not in str(caught.value)


def test_each_natural_client_is_tested_on_its_own_groups(configure) -> None:
    federation = Federation(configure(*NATURAL, "dataset.local_test=true", "rounds=1"))
    local, data = federation.evaluator.local_test, federation.setup.dataset
    assert local is not None
    assert data.groups is not None
    assert data.test.groups is not None
    assert len(local.order) == len(data.test)
    for client in range(6):
        (group,) = {*data.groups[federation.setup.partition.indices(client)].tolist()}
        assert {*data.test.groups[local.indices(client)].tolist()} == {group}
        assert len(local.indices(client)) == (data.test.groups == group).sum()
    evaluation = play(federation).evaluate()
    assert [samples for metric, _, samples, _ in evaluation.clients if metric == "local_acc"] == local.sizes.tolist()


def test_held_out_groups_are_no_clients_own(configure) -> None:
    with pytest.raises(
        ConfigError, match=r"dataset\.distribution=natural: .*dataset\.validation with dataset\.local_te"
    ):
        Federation(configure(*NATURAL, "num_clients=3", "dataset.local_test=only", "dataset.validation=0.3"))
