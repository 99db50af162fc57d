"""What is held out: whole groups, about the share of each class, and no leak that a neighbour could use."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier

from cutlayer.datasets import Dataset, DatasetConfig, load, partition, partition_by_group
from cutlayer.datasets.splitting import fixed_test, hold_out, whole_groups
from cutlayer.runtime.ground.config import ConfigError

SHARES = st.floats(0.01, 0.99)


@st.composite
def grouped(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels and groups of 1 to 120 samples, in any relation to each other."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 20)), min_size=1, max_size=120))
    labels, groups = np.array(pairs, dtype=np.int64).T
    return labels, groups


def sides(held: np.ndarray, groups: np.ndarray) -> tuple[set[int], set[int]]:
    return {*groups[held].tolist()}, {*groups[~held].tolist()}


def surplus(held: np.ndarray, labels: np.ndarray, share: float) -> tuple[np.ndarray, float]:
    """How much more than the share is held, by class and in all."""
    classes = int(labels.max()) + 1
    by_class = np.bincount(labels[held], minlength=classes) - share * np.bincount(labels, minlength=classes)
    return by_class, float(held.sum() - share * len(held))


@given(data=grouped(), share=SHARES, seed=st.integers(0, 2**32 - 1))
def test_no_group_is_on_both_sides_and_the_shares_are_within_the_bound(
    data: tuple[np.ndarray, np.ndarray], share: float, seed: int
) -> None:
    labels, groups = data
    held = hold_out(labels, share, np.random.default_rng(seed), groups)
    one, other = sides(held, groups)
    assert not one & other
    assert np.array_equal(held, hold_out(labels, share, np.random.default_rng(seed), groups))
    squares = 0
    for group in np.unique(groups):
        counts = np.bincount(labels[groups == group])
        squares += int(counts @ counts) + int(counts.sum()) ** 2
    by_class, in_all = surplus(held, labels, share)
    assert by_class @ by_class + in_all**2 <= share * (1 - share) * squares + 1e-6


@example(labels=[0, 1, 1, 1, 2], share=0.3125, seed=0)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=120), share=SHARES, seed=st.integers(0, 99))
def test_stratification_where_nothing_belongs_together(labels: list[int], share: float, seed: int) -> None:
    held = hold_out(np.array(labels), share, np.random.default_rng(seed), None)
    assert abs(surplus(held, np.array(labels), share)[1]) <= 0.5 + 1e-9
    # A whole number of samples is held out, and of these each class has its part to within one.
    by_class, _ = surplus(held, np.array(labels), float(held.mean()))
    assert np.abs(by_class).max() < 1 + 1e-9


@given(data=grouped(), share=SHARES)
def test_a_fixed_test_set_keeps_groups_of_any_classes_whole(data: tuple[np.ndarray, np.ndarray], share: float) -> None:
    labels, groups = data
    one, other = sides(fixed_test(labels, share, groups), groups)
    assert not one & other


@given(data=grouped(), share=SHARES)
def test_a_fixed_test_set_of_groups_of_one_class_stays_within_each_share(
    data: tuple[np.ndarray, np.ndarray], share: float
) -> None:
    labels, groups = data
    groups = groups * 6 + labels  # now each is of one class
    held = fixed_test(labels, share, groups)
    for c in np.unique(labels):
        wanted, largest = round(share * (labels == c).sum()), np.bincount(groups[labels == c] + 18).max()
        assert wanted - largest < held[labels == c].sum() <= wanted


def lesions(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As HAM10000 has them, fewer: groups of one class each, in very different frequency."""
    groups = np.sort(rng.integers(0, 500, 670))
    return rng.choice(7, 500, p=[0.033, 0.051, 0.11, 0.011, 0.111, 0.67, 0.014])[groups], groups


def writers(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As FEMNIST has them: groups of very different size, each of many classes."""
    groups = np.repeat(np.arange(150), rng.integers(10, 100, 150))
    return rng.choice(62, len(groups), p=rng.dirichlet(np.ones(62))), groups


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize("make", [lesions, writers])
def test_no_worse_than_scikit_learn(make) -> None:
    """Nearer to the share, in all and by class, than groups at random, and about as near as its stratified groups."""
    labels, groups = make(np.random.default_rng(3))

    def error(held: np.ndarray) -> float:
        by_class, in_all = surplus(held, labels, 0.2)
        return float(np.sqrt(by_class @ by_class + in_all**2))

    own, shuffled, stratified = [], [], []
    for seed in range(4):
        own.append(error(whole_groups(labels, 0.2, np.random.default_rng(seed), groups)))
        for splitter, errors in (
            (GroupShuffleSplit(1, test_size=0.2, random_state=seed), shuffled),
            (StratifiedGroupKFold(5, shuffle=True, random_state=seed), stratified),
        ):
            held = np.zeros(len(labels), dtype=bool)
            held[next(splitter.split(labels, labels, groups))[1]] = True
            errors.append(error(held))
    assert np.mean(own) < 0.7 * np.mean(shuffled)
    assert np.mean(own) < 1.1 * np.mean(stratified)


@pytest.mark.parametrize("groups", [None, 60])
def test_a_neighbour_finds_nothing_across_the_split(groups: int | None) -> None:
    """Labels at random, pictures of a group alike: only a leak lets the nearest neighbour know a label."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(60), 10)
    labels = rng.integers(0, 4, 60)[group]
    pictures = rng.normal(size=(60, 30))[group] + 0.1 * rng.normal(size=(600, 30))
    held = hold_out(labels, 0.3, rng, None if groups is None else group)
    neighbour = KNeighborsClassifier(1).fit(pictures[~held], labels[~held])
    accuracy = neighbour.score(pictures[held], labels[held])
    if groups is None:
        assert accuracy == 1, "the measure sees a leak where there is one"
    else:
        # About 18 groups at chance 1/4: a standard deviation of 0.1.
        assert accuracy < 0.25 + 4 * 0.1


def loaded(**values) -> Dataset:
    options = {"n_train": 300, "n_test": 100, "height": 4, "width": 4, "groups": 12}
    config = DatasetConfig("synthetic", options=options, **values)
    return load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_validation_holds_out_whole_groups(share: float) -> None:
    data = loaded(validation=share)
    assert data.validation is not None
    assert data.validation.groups is not None
    assert data.groups is not None
    assert not {*data.validation.groups.tolist()} & {*data.groups.tolist()}
    assert len(data.validation) + len(data.train) == 300
    assert len(data.validation) / 300 == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_a_fraction_takes_whole_groups(share: float) -> None:
    data, whole = loaded(fraction=share), loaded()
    assert data.groups is not None
    assert whole.groups is not None
    for group in {*data.groups.tolist()}:
        assert (data.groups == group).sum() == (whole.groups == group).sum()
    assert len(data.train) / 300 == pytest.approx(share, abs=0.05)


def test_a_share_that_no_whole_group_has() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.validation=0\.01: .*300 samples in 12 groups that stay whole"):
        loaded(validation=0.01)


@given(
    groups=st.lists(st.integers(0, 12), min_size=3, max_size=80), test=st.lists(st.integers(0, 15), max_size=80),
    clients=st.integers(1, 3), drop=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_local_test_of_a_natural_client_is_of_its_own_groups(
    groups: list[int], test: list[int], clients: int, drop: bool, seed: int
) -> None:
    own, tests = np.array(groups), np.array(test, dtype=np.int64)
    clients = min(clients, len({*groups}))
    config = DatasetConfig("synthetic", distribution="natural", drop_unassigned=drop, min_samples=0)
    parts = partition(np.zeros(len(own), dtype=np.int64), clients, config, seed=seed, groups=own)
    local = partition_by_group(parts, own, tests)
    for client in range(clients):
        held = {*own[parts.indices(client).numpy()].tolist()}
        expected = [at for at, group in enumerate(test) if group in held]
        assert local.indices(client).tolist() == expected
