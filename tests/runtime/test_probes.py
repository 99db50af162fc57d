"""The kNN and the linear classifier on features, against scikit-learn; the draws; what gives the features."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.scoring import classifiers as probes
from cutlayer.runtime.scoring.classifiers import (
    MonitorConfig,
    ProbeConfig,
    balanced,
    drawn,
    fit_linear,
    knn_accuracy,
    knn_scores,
)

TRAIN = 1200


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels of real digits as features: training features and labels, test features and labels."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16.0), torch.from_numpy(labels).long()
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


@pytest.mark.parametrize(("k", "temperature"), [(200, 0.1), (7, 0.5), (1, 0.1)])
def test_the_knn_against_scikit_learn(digits, k: int, temperature: float) -> None:
    train, labels, test, wanted = digits
    reference = KNeighborsClassifier(
        n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    ).fit(train.numpy(), labels.numpy())
    scores = knn_scores(train, labels, test, 10, k=k, temperature=temperature)
    np.testing.assert_allclose(scores.numpy(), reference.predict_proba(test.numpy()), rtol=1e-9, atol=1e-12)
    assert scores.argmax(1).tolist() == reference.predict(test.numpy()).tolist()
    found = knn_accuracy(train, labels, test, wanted, 10, k, temperature)
    assert found == pytest.approx(reference.score(test.numpy(), wanted.numpy()), abs=1e-12)
    assert 0.9 < found < 1


def test_the_knn_in_small_steps_and_with_more_neighbours_than_samples(digits, monkeypatch) -> None:
    train, labels, test, _ = digits
    whole = knn_scores(train, labels, test, 10, k=50, temperature=0.1)
    all_of_them = knn_scores(train, labels, test, 10, k=TRAIN, temperature=0.1)
    assert torch.equal(knn_scores(train, labels, test, 10, k=10**6, temperature=0.1), all_of_them)
    assert not torch.equal(whole, all_of_them)
    monkeypatch.setattr(probes, "_CHUNK_VALUES", 7 * TRAIN)  # seven test samples in a step
    torch.testing.assert_close(knn_scores(train, labels, test, 10, k=50, temperature=0.1), whole)


def test_the_knn_of_extreme_features_is_finite() -> None:
    train = torch.tensor([[0.0, 0.0], [1e-20, 0.0], [1e18, 1e18]])
    scores = knn_scores(
        train, torch.tensor([0, 1, 2]), torch.tensor([[1.0, 1.0], [0.0, 0.0]]), 4, k=3, temperature=1e-4
    )
    assert scores.isfinite().all()
    torch.testing.assert_close(scores.sum(1), torch.ones(2))
    assert scores[0].argmax() == 2
    assert scores[:, 3].tolist() == [0, 0]


@pytest.mark.parametrize("l2", [1e-2, 1e-3])
def test_the_linear_classifier_against_scikit_learn(digits, l2: float) -> None:
    train, labels, test, _ = digits
    scale = float(train.var(0, correction=0).mean().sqrt())
    # scikit-learn minimises the sum of the cross-entropies and half the squared norm over C.
    reference = LogisticRegression(C=1 / (l2 * TRAIN), tol=1e-8, max_iter=20000).fit((train / scale).numpy(), labels)
    weights, biases = fit_linear(train, labels, 10, l2)
    expected = reference.predict_proba((test / scale).numpy())
    np.testing.assert_allclose(F.linear(test, weights, biases).softmax(1).numpy(), expected, atol=3e-4)
    np.testing.assert_allclose((weights * scale).numpy(), reference.coef_, atol=3e-3)


def test_the_linear_classifier_does_not_depend_on_scale_or_origin(digits) -> None:
    train, labels, test, _ = digits
    plain = F.linear(test, *fit_linear(train, labels, 10, 1e-3)).softmax(1)
    moved = F.linear(1000 * test + 5, *fit_linear(1000 * train + 5, labels, 10, 1e-3)).softmax(1)
    torch.testing.assert_close(moved, plain, atol=1e-4, rtol=0)
    again = fit_linear(train, labels, 10, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(again, fit_linear(train, labels, 10, 1e-3), strict=True))


def test_the_linear_classifier_of_features_that_say_nothing_and_of_absent_classes() -> None:
    labels = torch.tensor([0, 0, 0, 2])
    weights, biases = fit_linear(torch.ones(4, 3), labels, 4, 1e-3)
    assert (weights == 0).all()
    chances = biases.softmax(0)  # the classes' shares, which is all that can be learnt
    torch.testing.assert_close(chances, torch.tensor([0.75, 0, 0.25, 0], dtype=torch.float64), atol=1e-3, rtol=0)


def test_shares_of_the_labels_are_balanced_and_nested() -> None:
    labels = torch.tensor([0] * 500 + [1] * 300 + [2] * 199 + [3])
    chosen = {
        share: balanced(labels, share, 4, torch.Generator().manual_seed(3)) for share in (1.0, 0.4, 0.1, 0.01, 0.001)
    }
    counts = {share: labels[indices].bincount(minlength=4).tolist() for share, indices in chosen.items()}
    assert counts == {
        1.0: [500, 300, 199, 1],
        0.4: [100, 100, 100, 1],
        0.1: [25, 25, 25, 1],
        0.01: [2, 2, 2, 1],  # a quarter of ten, rounded to the even number
        0.001: [1, 1, 1, 1],
    }
    shares = sorted(chosen)
    for small, large in itertools.pairwise(shares):
        assert set(chosen[small].tolist()) < set(chosen[large].tolist())
    other = balanced(labels, 0.1, 4, torch.Generator().manual_seed(4))
    assert not torch.equal(other, chosen[0.1])


def test_samples_are_drawn_without_repetition() -> None:
    for count in (None, 10, 11):
        assert drawn(10, count, torch.Generator()).tolist() == list(range(10))
    found = drawn(1000, 10, torch.Generator().manual_seed(0)).tolist()
    assert found == sorted(set(found))
    assert len(found) == 10
    assert max(found) > 500


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (MonitorConfig, "k", 0),
        (MonitorConfig, "temperature", 0.0),
        (MonitorConfig, "train_samples", 0),
        (ProbeConfig, "k", 0),
        (ProbeConfig, "temperature", float("inf")),
        (ProbeConfig, "labels", (0.5, 0.0)),
        (ProbeConfig, "labels", (1.5,)),
        (ProbeConfig, "labels", (0.1, 0.1)),
        (ProbeConfig, "l2", 0.0),
        (ProbeConfig, "train_samples", 0),
        (ProbeConfig, "test_samples", -1),
    ],
)
def test_bad_values_are_refused(kind: type, key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        kind(**{key: value})
    assert error.value.key == key


def test_a_probe_of_nothing_is_refused_and_settings_have_names_of_their_own() -> None:
    with pytest.raises(ConfigError, match="labels"):
        ProbeConfig(knn=False, labels=())
    changes = ({}, {"knn": False}, {"k": 3}, {"temperature": 0.2}, {"labels": ()}, {"labels": (1.0,)}, {"l2": 0.1})
    more = ({"train_samples": 7}, {"test_samples": 7}, {"labels": (0.1, 1.0)})
    names = [ProbeConfig(**change).setting for change in (*changes, *more)]
    assert len(set(names)) == len(names)
    assert ProbeConfig(after=True).setting == names[0]
    assert all(Path(name).name == name for name in names)
