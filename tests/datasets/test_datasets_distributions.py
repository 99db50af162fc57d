"""Partitioners terminate, lose nothing, and do what their names say."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cutlayer.datasets import DatasetConfig, Partition, apply_partition, partition
from cutlayer.distributions import DISTRIBUTIONS
from cutlayer.runtime.ground.config import ConfigError

ALPHAS = st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 100.0, 1e6])
SEEDS = st.integers(0, 2**63)
quick = settings(max_examples=40, deadline=None)


def config(distribution: str, **values: Any) -> DatasetConfig:
    return DatasetConfig("synthetic", distribution=distribution, **values)


@st.composite
def labelled(draw: st.DrawFn) -> np.ndarray:
    """Labels of 1 to 400 samples; classes of any size, some absent."""
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0))
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(draw(st.integers(0, 1000))).permutation(labels)


def owners_once(parts: Partition, n: int) -> None:
    """Every sample is held by exactly one client, and the rows fit together."""
    assert sorted(parts.order.tolist()) == list(range(n))
    assert parts.offsets[0] == 0
    assert parts.offsets[-1] == n
    assert np.array_equal(parts.sizes, [len(parts.indices(i)) for i in range(len(parts))])


@pytest.mark.parametrize("name", ["iid", "noniid_dirichlet", "dirichlet", "class_major", "quantity_skew"])
@quick
@given(labels=labelled(), clients=st.integers(1, 40), alpha=ALPHAS, share=st.floats(0, 1), seed=SEEDS, data=st.data())
def test_all_samples_once_and_min_samples(
    name: str, labels: np.ndarray, clients: int, alpha: float, share: float, seed: int, data: st.DataObject
) -> None:
    assume(clients <= len(labels))
    least = data.draw(st.integers(0, len(labels) // clients))
    wanted = config(name, alpha=alpha, major_share=share, min_samples=least)
    parts = partition(labels, clients, wanted, seed=seed)
    owners_once(parts, len(labels))
    assert parts.sizes.min() >= least
    if name in ("iid", "noniid_dirichlet", "class_major"):
        assert parts.sizes.max() - parts.sizes.min() <= 1
    assert np.array_equal(parts.order, partition(labels, clients, wanted, seed=seed).order)


@quick
@given(labels=labelled(), clients=st.integers(1, 40), wanted=st.integers(1, 5), seed=SEEDS)
def test_shards_hold_exactly_that_many_classes(labels: np.ndarray, clients: int, wanted: int, seed: int) -> None:
    assume(clients <= len(labels))
    settings_ = config("shards", classes_per_client=wanted, min_samples=0)
    counts = np.bincount(labels)
    classes = int((counts > 0).sum())
    possible = wanted <= classes <= clients * wanted <= np.minimum(counts, clients).sum()
    if not possible:
        with pytest.raises(ConfigError, match=r"dataset\.classes_per_client"):
            partition(labels, clients, settings_, seed=seed)
        return
    parts = partition(labels, clients, settings_, seed=seed)
    owners_once(parts, len(labels))
    table = parts.table(labels, len(counts))
    assert ((table > 0).sum(axis=1) == wanted).all()
    for column in table.T:
        held = column[column > 0]
        assert len(held) == 0 or held.max() - held.min() <= 1


@quick
@given(
    groups=st.lists(st.integers(0, 15), min_size=1, max_size=200), clients=st.integers(1, 10), drop=st.booleans(),
    least=st.integers(0, 5), seed=SEEDS,
)  # fmt: skip
def test_natural_keeps_groups_whole(groups: list[int], clients: int, drop: bool, least: int, seed: int) -> None:
    ids = np.array(groups)
    assume(clients <= len(ids) and clients * least <= len(ids))
    labels = np.zeros(len(ids), dtype=np.int64)
    wanted = config("natural", drop_unassigned=drop, min_samples=least)
    try:
        parts = partition(labels, clients, wanted, seed=seed, groups=ids)
    except ConfigError as error:
        sizes = np.unique(ids, return_counts=True)[1]
        usable = (sizes >= least).sum() if drop else len(sizes)
        assert usable < clients or error.key == "dataset.min_samples"  # noqa: PT017
        assert not (drop and usable >= clients), "dropping groups always leaves a way"
        return
    held = [set(ids[parts.indices(i).numpy()].tolist()) for i in range(clients)]
    assert sum(map(len, held)) == len(set().union(*held)), "no group on two clients"
    assert parts.sizes.min() >= least
    if drop:
        assert all(len(of_client) == 1 for of_client in held)
    else:
        owners_once(parts, len(ids))


BALANCED = np.arange(6000) % 10


def distance_from_iid(name: str, alpha: float, labels: np.ndarray = BALANCED) -> float:
    """Mean total variation between a client's class mix and that of all samples."""
    parts = partition(labels, 20, config(name, alpha=alpha), seed=3)
    table = parts.table(labels, 10)
    mix = table / table.sum(axis=1, keepdims=True)
    return float(np.abs(mix - np.bincount(labels, minlength=10) / len(labels)).sum(axis=1).mean() / 2)


@pytest.mark.parametrize("name", ["noniid_dirichlet", "dirichlet"])
def test_alpha_goes_from_one_class_to_iid(name: str) -> None:
    distances = [distance_from_iid(name, alpha) for alpha in (1e-6, 0.1, 1.0, 10.0, 1e6)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.01
    assert distances[0] > 0.75


def test_noniid_dirichlet_tends_to_the_data_s_own_mix() -> None:
    labels = np.random.default_rng(0).choice(10, size=20_000, p=np.arange(1, 11) / 55)
    assert distance_from_iid("noniid_dirichlet", 1e6, labels) < 0.01


def test_noniid_dirichlet_mixtures_have_the_variance_of_the_dirichlet() -> None:
    # With classes that never run out for one client in many, Var(share) = m (1 - m) / (alpha * classes + 1), m = 1/10.
    labels = np.arange(200_000) % 10
    parts = partition(labels, 1000, config("noniid_dirichlet", alpha=0.5), seed=0)
    shares = parts.table(labels, 10) / parts.sizes[:, None]
    assert shares.var() == pytest.approx(0.1 * 0.9 / (0.5 * 10 + 1), rel=0.1)


def test_dirichlet_shares_have_the_variance_of_the_dirichlet() -> None:
    labels = np.zeros(40_000, dtype=np.int64)
    sizes = np.stack([partition(labels, 10, config("dirichlet", alpha=0.7), seed=s).sizes for s in range(100)])
    assert (sizes / len(labels)).var() == pytest.approx(0.1 * 0.9 / (0.7 * 10 + 1), rel=0.15)


def test_class_major_share() -> None:
    parts = partition(BALANCED, 50, config("class_major", major_share=0.7), seed=0)
    table = parts.table(BALANCED, 10)
    assert table.max(axis=1) / parts.sizes == pytest.approx(np.full(50, 0.7), abs=0.1)
    assert np.bincount(table.argmax(axis=1), minlength=10).tolist() == [5] * 10


@quick
@given(labels=labelled(), clients=st.integers(1, 40), share=st.floats(0, 1), seed=SEEDS, data=st.data())
@pytest.mark.parametrize("name", ["iid", "noniid_dirichlet", "class_major"])
def test_clients_get_as_many_samples_as_is_said(
    name: str, labels: np.ndarray, clients: int, share: float, seed: int, data: st.DataObject
) -> None:
    assume(clients <= len(labels))
    each = data.draw(st.integers(1, len(labels) // clients))
    parts = partition(labels, clients, config(name, major_share=share, client_samples=each), seed=seed)
    assert parts.sizes.tolist() == [each] * clients
    assert len({*parts.order.tolist()}) == clients * each


def test_a_major_class_that_lasts_has_its_whole_share() -> None:
    """Five clients of 1,000 and of 5,000 samples on data like CIFAR-10's, ten classes of 5,000 samples."""
    labels = np.repeat(np.arange(10), 5_000)
    for each in (1_000, 5_000):
        parts = partition(labels, 5, config("class_major", major_share=0.8, client_samples=each), seed=3)
        table = parts.table(labels, 10)
        assert abs(table.max(axis=1) - 0.8 * each).max() <= 1
        assert len({*table.argmax(axis=1).tolist()}) == 5
    parts = partition(labels, 5, config("class_major", major_share=0.8), seed=3)
    assert parts.table(labels, 10).max() <= 5_000, "of 10,000 samples each, 8,000 of which no class has"


@pytest.mark.parametrize(("each", "least"), [(21, 1), (10, 11)])
def test_more_samples_than_there_are(each: int, least: int) -> None:
    wanted = config("iid", client_samples=each, min_samples=least)
    with pytest.raises(ConfigError, match=rf"client_samples={each}: expected a number from min_samples={least} to 20"):
        partition(np.zeros(100, dtype=np.int64), 5, wanted, seed=0)


def test_quantity_skew_skews_sizes_and_not_classes() -> None:
    parts = partition(BALANCED, 10, config("quantity_skew", alpha=0.3, min_samples=20), seed=1)
    assert parts.sizes.max() > 10 * parts.sizes.min()
    big = parts.table(BALANCED, 10)[parts.sizes.argmax()]
    assert big / big.sum() == pytest.approx(np.full(10, 0.1), abs=0.03)


@pytest.mark.parametrize("name", [name for name, each in DISTRIBUTIONS.items() if each.divide and not each.by_group])
@pytest.mark.timeout(60)
def test_a_hundred_thousand_clients(name: str) -> None:
    labels = np.random.default_rng(0).integers(0, 10, 200_000)
    parts = partition(labels, 100_000, config(name, alpha=0.1), seed=0)
    owners_once(parts, len(labels))
    assert parts.sizes.min() >= 1


def test_many_clients_and_classes_go_in_blocks() -> None:
    labels = np.arange(12_000) % 1000
    parts = partition(labels, 3000, config("noniid_dirichlet", alpha=0.01), seed=0)
    owners_once(parts, len(labels))
    assert set(parts.sizes) == {4}


@pytest.mark.parametrize(
    ("clients", "values", "message"),
    [
        (11, {}, r"num_clients=11: expected at most 10, the training samples"),
        (0, {}, r"num_clients=0"),
        (4, {"min_samples": 3}, r"dataset\.min_samples=3: expected at most 2: 10 samples, 4 clients"),
        (2, {"distribution": "natural"}, r"dataset\.distribution=natural: .*natural groups"),
        (2, {"distribution": "shards", "classes_per_client": 3}, r"dataset\.classes_per_client=3: expected at most 2"),
    ],
)
def test_what_cannot_be_is_explained(clients: int, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        partition(np.arange(10) % 2, clients, DatasetConfig("synthetic", **values), seed=0)


def test_natural_needs_enough_groups() -> None:
    with pytest.raises(ConfigError, match="num_clients=3: expected at most 2, the natural groups"):
        partition(np.zeros(9, dtype=int), 3, config("natural"), seed=0, groups=np.arange(9) % 2)


@quick
@given(labels=labelled(), tests=labelled(), clients=st.integers(1, 12), seed=SEEDS)
def test_local_test_sets_follow_the_training_mix(
    labels: np.ndarray, tests: np.ndarray, clients: int, seed: int
) -> None:
    assume(clients <= len(labels))
    parts = partition(labels, clients, config("noniid_dirichlet", alpha=0.3), seed=seed)
    local = apply_partition(parts, labels, tests, seed=seed)
    classes = int(max(labels.max(), tests.max())) + 1
    table, local_table = parts.table(labels, classes), local.table(tests, classes)
    assert len(np.unique(local.order)) == len(local.order)
    held = table.sum(axis=0)
    expected = table / np.maximum(held, 1) * np.bincount(tests, minlength=classes)
    assert np.abs(local_table - expected).max() <= 1
    assert np.array_equal(local_table.sum(axis=0), np.where(held > 0, np.bincount(tests, minlength=classes), 0))
