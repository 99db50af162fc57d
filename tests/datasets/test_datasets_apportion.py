"""Whole numbers from shares, sizes of batches and rows of partitions: by exhaustion, by definition, or by moments."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cutlayer.datasets import DatasetConfig, Partition, batch_count, batch_sizes, own_partition, partition
from cutlayer.datasets.normalize import moments
from cutlayer.datasets.seeding import derived
from cutlayer.distributions.apportion import (
    bounded,
    dirichlet,
    equal_sizes,
    fill,
    raise_to,
    softmax,
    split_one,
    split_rows,
)

quick = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 10**6)


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("drop", [None, False, True, "auto", "always", "never"])
def test_sizes_of_batches_by_exhaustion(drop: Any) -> None:
    for n in range(26):
        for size in range(1, 9):
            batches = [list(range(n))[start : start + size] for start in range(0, n, size)]
            if batches and (
                (drop in (True, "always") and len(batches[-1]) < size)
                or (drop == "auto" and len(batches[-1]) == 1 < len(batches) and size > 1)
            ):
                batches.pop()
            reported = () if drop is None else (drop,)
            assert batch_sizes(n, size, *reported) == [len(batch) for batch in batches]
            assert batch_count(n, size, *reported) == len(batches)


# ---------------------------------------------------------------------- whole numbers


@quick
@given(n=st.integers(0, 500), parts=st.integers(1, 60))
def test_equal_sizes(n: int, parts: int) -> None:
    sizes = equal_sizes(n, parts)
    assert sizes.dtype == np.int64
    assert len(sizes) == parts
    assert sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1
    assert np.array_equal(sizes, np.sort(sizes)[::-1])


@quick
@given(totals=st.lists(st.integers(0, 1000), min_size=1, max_size=6), columns=st.integers(1, 9), seed=SEEDS)
def test_rows_are_split_to_their_exact_shares_rounded_down_or_up(totals: list[int], columns: int, seed: int) -> None:
    shares = generator(seed).dirichlet(np.ones(columns), len(totals))
    found = split_rows(np.array(totals), shares, generator(seed + 1))
    assert found.dtype == np.int64
    assert found.sum(axis=1).tolist() == totals
    exact = shares * np.array(totals)[:, None]
    assert (found >= np.floor(exact - 1e-6)).all()
    assert (found <= np.ceil(exact + 1e-6)).all()


def test_rows_are_split_to_their_shares_on_average_and_apart_from_each_other() -> None:
    shares = np.array([[0.05, 0.15, 0.3, 0.5]])
    rng = generator(3)
    found = np.stack([split_rows(np.array([3, 3]), np.repeat(shares, 2, axis=0), rng) for _ in range(4000)])
    assert found.mean(axis=0) == pytest.approx(np.repeat(3 * shares, 2, axis=0), abs=0.04)
    assert not np.array_equal(found[:, 0], found[:, 1])


def test_one_total_goes_to_other_receivers_each_time() -> None:
    rng = generator(4)
    drawn = np.stack([split_one(3, np.full(10, 0.1), rng) for _ in range(3000)])
    assert set(drawn.sum(axis=1)) == {3}
    assert drawn.mean(axis=0) == pytest.approx(np.full(10, 0.3), abs=0.05)
    # Places next to each other have no more in common than others: at random two of ten, of three.
    together = ((drawn[:, :-1] > 0) & (drawn[:, 1:] > 0)).mean()
    assert together == pytest.approx(3 * 2 / (10 * 9), abs=0.02)
    assert split_one(7, np.array([0.0, 1.0, 0.0]), rng).tolist() == [0, 7, 0]


@quick
@given(data=st.data(), count=st.integers(1, 12))
def test_bounded_numbers_are_one_multiple_of_the_weights_within_their_bounds(data: st.DataObject, count: int) -> None:
    weights = np.array(data.draw(st.lists(st.integers(1, 100), min_size=count, max_size=count)), dtype=float)
    low = np.array(data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)))
    high = low + np.array(data.draw(st.lists(st.integers(0, 40), min_size=count, max_size=count)))
    total = data.draw(st.integers(int(low.sum()), int(high.sum())))
    found = bounded(weights, total, low, high)
    assert found.dtype == np.int64
    assert found.sum() == total
    assert (found >= low).all()
    assert (found <= high).all()
    # Where a bound does not hold it back, a number is the multiple to one: no pair could be exchanged for the better.
    for i in range(count):
        for j in range(count):
            if found[i] > low[i] and found[j] < high[j]:
                assert (found[i] - 1) / weights[i] <= (found[j] + 1) / weights[j] + 1e-6


@quick
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=15), least=st.integers(0, 30))
def test_sizes_are_raised_at_the_cost_of_the_largest_alone(sizes: list[int], least: int) -> None:
    before = np.array(sizes)
    assume(before.sum() >= least * len(before))
    after = raise_to(before, least)
    assert after.sum() == before.sum()
    assert after.min() >= least
    raised, gave = after > before, after < before
    assert (after[raised] == least).all()
    assert np.array_equal(raised, before < least)
    if gave.any():
        level = after[gave].max()
        assert after[gave].min() >= level - 1
        assert after[~gave & ~raised].max(initial=0) <= level + 1
    else:
        assert np.array_equal(after, before)
    assert before.tolist() == sizes, "what was given is left as it is"


@quick
@given(alpha=st.lists(st.floats(1e-8, 1e6), min_size=2, max_size=8), size=st.integers(1, 5), seed=SEEDS)
def test_dirichlet_draws_are_shares_whatever_the_concentration(alpha: list[float], size: int, seed: int) -> None:
    logs = dirichlet(np.array(alpha), size, generator(seed))
    assert logs.shape == (size, len(alpha))
    assert not np.isnan(logs).any()
    assert np.exp(logs).sum(axis=1) == pytest.approx(np.ones(size), abs=1e-9)


@pytest.mark.parametrize("alpha", [(0.2, 0.2, 0.2), (0.5, 1.0, 3.0), (5.0, 20.0)])
def test_dirichlet_draws_have_the_moments_of_their_distribution(alpha: tuple[float, ...]) -> None:
    drawn = np.exp(dirichlet(np.array(alpha), 20_000, generator(7)))
    total, a = sum(alpha), np.array(alpha)
    mean = a / total
    assert drawn.mean(axis=0) == pytest.approx(mean, abs=0.01)
    assert drawn.var(axis=0) == pytest.approx(mean * (1 - mean) / (total + 1), rel=0.06)


def test_shares_of_the_classes_that_are_left() -> None:
    logs = np.log(np.array([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]]))
    assert softmax(logs, np.array([True, True, True])) == pytest.approx(np.exp(logs))
    assert softmax(logs, np.array([True, False, True])) == pytest.approx(np.array([[2 / 7, 0, 5 / 7], [0.5, 0, 0.5]]))
    assert softmax(logs - 1e4, np.array([True, True, False])) == pytest.approx(
        np.array([[0.4, 0.6, 0], [1 / 9, 8 / 9, 0]])
    )


@quick
@given(clients=st.integers(1, 8), classes=st.integers(1, 6), seed=SEEDS, alpha=st.sampled_from([1e-6, 0.1, 10.0]))
def test_a_supply_is_given_out_to_the_last(clients: int, classes: int, seed: int, alpha: float) -> None:
    rng = generator(seed)
    supply = rng.integers(0, 40, classes)
    supply[0] += 1
    totals = equal_sizes(int(supply.sum()) - int(rng.integers(0, supply.sum() // 2 + 1)), clients)
    kept = supply.copy()
    given = fill(dirichlet(np.full(classes, alpha), clients, rng).clip(-1e300), totals, supply, rng)
    assert given.dtype == np.int64
    assert given.min() >= 0
    assert np.array_equal(given.sum(axis=1), totals)
    assert (given.sum(axis=0) <= supply).all()
    assert np.array_equal(supply, kept)


def test_what_is_not_scarce_is_given_as_it_is_asked_for() -> None:
    mix = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    given = fill(np.log(mix), np.array([40, 30]), np.array([100, 100, 100]), generator(1))
    assert np.abs(given - mix * np.array([[40], [30]])).max() < 1


def test_what_is_scarce_is_divided_by_what_was_asked() -> None:
    mix = np.array([[0.9, 0.1], [0.3, 0.7]])
    given = fill(np.log(mix), np.array([100, 100]), np.array([60, 500]), generator(1))
    assert given[:, 0].tolist() == [45, 15], "60 by 90 to 30"
    assert given.sum(axis=1).tolist() == [100, 100]


# ---------------------------------------------------------------------- rows


@quick
@given(owners=st.lists(st.integers(-1, 5), max_size=40), more=st.integers(0, 2))
def test_a_partition_holds_the_samples_of_its_owners(owners: list[int], more: int) -> None:
    clients = max([*owners, 0]) + 1 + more
    parts = Partition.from_owner(np.array(owners, dtype=np.int64), clients)
    assert len(parts) == clients
    held = [[sample for sample, owner in enumerate(owners) if owner == client] for client in range(clients)]
    assert [parts.indices(client).tolist() for client in range(clients)] == held
    assert parts.sizes.tolist() == [len(samples) for samples in held]
    labels = np.arange(len(owners)) % 3
    table = [[sum(labels[s] == c for s in samples) for c in range(3)] for samples in held]
    assert parts.table(labels, 3).tolist() == table
    assert parts.table(torch.from_numpy(labels), 3, 1).tolist() == table[1:]
    assert parts.table(labels, 3, 0, clients - 1).tolist() == table[:-1]
    for client in (-1, clients):
        with pytest.raises(IndexError, match=f"client {client} of {clients}"):
            parts.indices(client)


@pytest.mark.parametrize("client", [None, 0, 2])
def test_a_client_with_data_of_its_own_knows_that_alone(client: int | None) -> None:
    parts = own_partition(7, 3, client)
    assert [parts.indices(each).tolist() for each in range(3)] == [
        list(range(7)) if each == client else [] for each in range(3)
    ]


def test_as_many_clients_as_samples_and_no_more_samples_than_there_are() -> None:
    labels = np.arange(12) % 3
    sizes = partition(labels, 12, DatasetConfig("synthetic"), seed=0).sizes
    assert sizes.tolist() == [1] * 12
    assert partition(labels, 4, DatasetConfig("synthetic", min_samples=3), seed=0).sizes.tolist() == [3] * 4
    assert partition(labels, 1, DatasetConfig("synthetic", min_samples=12), seed=0).sizes.tolist() == [12]


def test_streams_of_other_purposes_and_seeds_are_others() -> None:
    def first(seed: int, purpose: str) -> int:
        return int(derived(seed, purpose).integers(0, 2**62))

    seen = [first(seed, purpose) for seed in (0, 1, 2**63, 2**64 - 1) for purpose in ("partition", "local test", "")]
    assert len(set(seen)) == len(seen)
    assert first(3, "partition") == first(3, "partition")


@pytest.mark.parametrize(
    ("kind", "channels", "expected"),
    [
        ("none", 2, ((0.0, 0.0), (1.0, 1.0))),
        ("dataset", 1, ((0.25,), (0.5,))),
        ("imagenet", 1, ((Fraction(1347, 3000),), (Fraction(678, 3000),))),
        ("imagenet", 3, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    ],
)
def test_means_and_deviations_by_kind(kind: Any, channels: int, expected: tuple[Any, Any]) -> None:
    images = torch.zeros(2, channels, 1, 1, dtype=torch.uint8)
    found = moments(kind, images, channels, ((0.25,), (0.5,)))
    assert found == tuple(pytest.approx(tuple(map(float, each)), abs=1e-12) for each in expected)


def test_known_ones_of_other_channels_are_measured_instead() -> None:
    images = torch.tensor([[[[0]], [[255]]], [[[102]], [[255]]]], dtype=torch.uint8)
    mean, deviation = moments("dataset", images, 2, ((0.25,), (0.5,)))
    assert mean == pytest.approx((0.2, 1.0))
    assert deviation == pytest.approx((0.2, 1 / 255)), "never less than a grey level"
    assert math.isclose(moments("dataset", images[:, :1], 1, ((), ()))[0][0], 0.2)
