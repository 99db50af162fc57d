"""`drawn_shards`: shards of equal size, dealt at random, so that a client may have several of one class."""

import numpy as np
import pytest
from scipy.stats import hypergeom

from cutlayer.datasets import DatasetConfig, partition
from cutlayer.runtime.ground.config import ConfigError


def counts(labels: np.ndarray, clients: int, wanted: int, seed: int) -> np.ndarray:
    config = DatasetConfig("synthetic", distribution="drawn_shards", classes_per_client=wanted, min_samples=0)
    parts = partition(labels, clients, config, seed=seed)
    rows = [np.bincount(labels[parts.indices(c).numpy()], minlength=labels.max() + 1) for c in range(clients)]
    return np.stack(rows)


@pytest.mark.parametrize(("classes", "clients", "wanted"), [(10, 20, 2), (20, 20, 10), (5, 10, 5)])
def test_shards_are_dealt_like_cards(classes: int, clients: int, wanted: int) -> None:
    """The number of a client's shards of one class is hypergeometric: `wanted` cards in a hand."""
    of_each = clients * wanted // classes
    labels = np.repeat(np.arange(classes), of_each * 3)  # three samples in a shard
    hands = np.concatenate([counts(labels, clients, wanted, seed) for seed in range(60)])
    assert (hands % 3 == 0).all()
    assert (hands.sum(axis=1) == 3 * wanted).all()
    found = np.bincount((hands // 3).ravel(), minlength=wanted + 1) / hands.size
    expected = hypergeom(clients * wanted, of_each, wanted).pmf(np.arange(len(found)))
    assert found == pytest.approx(expected, abs=0.02)
    assert found[2:].sum() > 0.005, "some have several of one class"


def test_every_sample_has_an_owner_where_classes_differ_in_size() -> None:
    labels = np.repeat(np.arange(4), (5, 40, 80, 11))
    held = counts(labels, 6, 3, seed=1)
    assert held.sum(axis=0).tolist() == [5, 40, 80, 11]
    assert (held.sum(axis=1) > 0).all()


@pytest.mark.parametrize(("clients", "wanted", "line"), [(3, 1, "at least 4"), (5, 30, "at most 20")])
def test_what_cannot_be_dealt_is_refused(clients: int, wanted: int, line: str) -> None:
    with pytest.raises(ConfigError, match=rf"dataset\.classes_per_client={wanted}: expected {line}"):
        counts(np.repeat(np.arange(10), 10), clients, wanted, seed=0)
