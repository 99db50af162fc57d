"""What frozen features are worth: a weighted kNN and a linear classifier on them, each a function of tensors alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.rng import TorchStream

# Values in the largest tensor of one step of the kNN (64 MiB in float32).
_CHUNK_VALUES = 1 << 24
_ITERATIONS = 1000
_EPOCHS, _BATCH = 100, 128


@dataclass(frozen=True)
class MonitorConfig:
    """How a method that learns features is tested at a round's end: by a weighted kNN over training samples.

    Attributes:
        k: neighbours that have a say, at most as many as there are.
        temperature: what cosine similarities are divided by; the smaller, the more the nearest ones decide.
        train_samples: training samples among which neighbours are looked for, drawn once; None takes all.
        features: what the classifier takes (backbone), or what the method's projector makes of that.
    """

    k: int = 200
    temperature: float = 0.1
    train_samples: int | None = 5000
    features: Literal["backbone", "projector"] = "backbone"

    def __post_init__(self) -> None:
        _check_neighbours(self.k, self.temperature)
        _check_samples("train_samples", self.train_samples)


@dataclass(frozen=True)
class ProbeConfig:
    """The protocol that measures a trained model's features once training is over.

    Attributes:
        after: whether a run ends with it.
        knn: whether the weighted kNN is part of it. k, temperature: as in ``MonitorConfig``.
        labels: shares of the training labels, in (0, 1], with which a linear classifier is trained, one for each.
        l2: weight of half the squared norm of the linear classifier's weights, added to the mean cross-entropy.
        hidden: units of the hidden layer of a network of two layers, with which shares below 1 are measured too; None
            leaves that out.
        train_samples, test_samples: samples that are used, drawn once; None takes all.
    """

    after: bool = False
    knn: bool = True
    k: int = 200
    temperature: float = 0.1
    labels: tuple[float, ...] = (1.0, 0.1, 0.01)
    l2: float = 0.01
    hidden: int | None = None
    train_samples: int | None = None
    test_samples: int | None = None

    def __post_init__(self) -> None:
        _check_neighbours(self.k, self.temperature)
        if any(not 0 < share <= 1 for share in self.labels) or len(set(self.labels)) < len(self.labels):
            raise ConfigError("labels", self.labels, "different shares > 0 and <= 1, e.g. [1.0,0.1,0.01]")
        if not self.labels and not self.knn:
            raise ConfigError("labels", self.labels, "at least one share where probe.knn is false")
        if not 0 < self.l2 < float("inf"):
            raise ConfigError("l2", self.l2, "a finite number > 0")
        if self.hidden is not None and self.hidden < 1:
            raise ConfigError("hidden", self.hidden, "an integer >= 1, or null for linear classifiers alone")
        for key in ("train_samples", "test_samples"):
            _check_samples(key, getattr(self, key))

    @property
    def setting(self) -> str:
        """A name that distinguishes this setting from others, fit for a folder."""
        parts = [f"k={self.k},temperature={self.temperature:g}"] if self.knn else []
        if self.labels:
            parts.append(f"labels={'-'.join(f'{share:g}' for share in self.labels)},l2={self.l2:g}")
        counts = {"hidden": self.hidden, "train": self.train_samples, "test": self.test_samples}
        return ",".join([*parts, *(f"{name}={count}" for name, count in counts.items() if count is not None)])


def _check_neighbours(k: int, temperature: float) -> None:
    if k < 1:
        raise ConfigError("k", k, "an integer >= 1")
    if not 0 < temperature < float("inf"):
        raise ConfigError("temperature", temperature, "a finite number > 0")


def _check_samples(key: str, samples: int | None) -> None:
    if samples is not None and samples < 1:
        raise ConfigError(key, samples, "an integer >= 1, or null for all")


def drawn(of: int, samples: int | None, generator: torch.Generator) -> Tensor:
    """Some of the indices below ``of``, ascending: int64 [min(samples, of)]; all where ``samples`` is None."""
    if samples is None or samples >= of:
        return torch.arange(of)
    return torch.randperm(of, generator=generator)[:samples].sort().values


def balanced(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Indices of a share of the samples that is balanced over classes, ascending: int64 [m].

    Each class gives the same number, at least one and at most all that it has. A smaller share is part of a larger one
    from a generator in the same state. A share of 1 is all samples.

    Args:
        labels: int64 [n], CPU.
        share: in (0, 1].
    """
    if share == 1:
        return torch.arange(len(labels))
    each = max(1, round(share * len(labels) / classes))
    shuffled = torch.randperm(len(labels), generator=generator)
    own = [shuffled[labels[shuffled] == label][:each] for label in range(classes)]
    return torch.cat(own).sort().values


def knn_scores(
    train: Tensor, train_labels: Tensor, test: Tensor, classes: int, *, k: int, temperature: float
) -> Tensor:
    """The scores of a weighted kNN: [m, classes], of one sample summing to 1.

    Of the k training samples of the largest cosine similarity s, each gives exp(s / temperature) to its class (Wu et
    al., CVPR 2018, section 3.4; MoCo's CIFAR-10 demo). With fewer than k, all do.

    Args:
        train, test: features [n, d] and [m, d].
        train_labels: int64 [n].
    """
    bank, queries, k = _unit(train), _unit(test), min(k, len(train))
    rows = max(1, _CHUNK_VALUES // max(len(train), k * classes))
    found: list[Tensor] = []
    for start in range(0, len(queries), rows):
        nearest = (queries[start : start + rows] @ bank.T).topk(k, dim=1)
        # Normalised over the neighbours, which changes no order and cannot overflow.
        weights = (nearest.values / temperature).softmax(1)
        votes = F.one_hot(train_labels[nearest.indices], classes).to(weights.dtype)
        found.append((weights.unsqueeze(1) @ votes).squeeze(1))
    return torch.cat(found)


def _unit(rows: Tensor) -> Tensor:
    """The rows divided by their norms; one of zeros stays."""
    return rows / rows.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    classes: int,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Share of the test samples that the weighted kNN of ``knn_scores`` classifies correctly, in [0, 1]."""
    scores = knn_scores(train, train_labels, test, classes, k=k, temperature=temperature)
    return _accuracy(scores, test_labels)


def fit_linear(features: Tensor, labels: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression to its optimum: weights [classes, d] and biases [classes], float64.

    Minimises mean cross-entropy + l2/2 ||W||^2, W being the weights on the features divided by one common number,
    the root of their mean variance: l2 means the same whatever the features' scale. They are not standardised one by
    one, as protocols of linear classification train on the features as they are. Full-batch L-BFGS in float64 from
    zero, so the same on each call.

    Args:
        features: [n, d]. labels: int64 [n].
    """
    x = features.double()
    centre = x.mean(0)
    # Centred features change the biases alone, which are not penalised, and let the solver converge faster.
    x = x - centre
    scale = x.square().mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    x = x / scale
    weights = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    biases = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, biases],
        max_iter=_ITERATIONS,
        max_eval=2 * _ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weights, biases), labels) + l2 / 2 * weights.square().sum()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return loss

    with torch.enable_grad():
        cast(Any, solver).step(objective)
    found = weights.detach() / scale
    return found, biases.detach() - found @ centre


def linear_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, l2: float = 0.01
) -> float:
    """Share of the test samples that a linear classifier trained on the training features gets right, in [0, 1]."""
    weights, biases = fit_linear(train, train_labels, classes, l2)
    return _accuracy(F.linear(test.double(), weights, biases), test_labels)


def two_layer_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, *, hidden: int, seed: int
) -> float:
    """Share of the test samples that a network of two layers on the features gets right at the end, in [0, 1].

    Linear, BatchNorm, ReLU, linear, by Xavier's first weights and Adam at 0.001, divided by 10 after 60 and 80 of 100
    epochs, in new batches of 128 each (of which a last one of a single sample is left out). The same on each call.
    """
    with TorchStream(seed, torch.device("cpu")), torch.enable_grad():
        outer, inner = nn.Linear(train.shape[1], hidden), nn.Linear(hidden, classes)
        for layer in (outer, inner):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        network = nn.Sequential(outer, nn.BatchNorm1d(hidden), nn.ReLU(), inner).to(train)
        solver = torch.optim.Adam(network.parameters(), lr=0.001)
        rates = torch.optim.lr_scheduler.MultiStepLR(solver, [60, 80], 0.1)
        for _ in range(_EPOCHS):
            order = torch.randperm(len(train)).to(train.device)
            for start in range(0, len(train), _BATCH):
                chosen = order[start : start + _BATCH]
                if len(chosen) > 1:
                    loss = F.cross_entropy(network(train[chosen]), train_labels[chosen])
                    solver.zero_grad()
                    loss.backward()  # pyright: ignore[reportUnknownMemberType]
                    cast(Any, solver).step()
            rates.step()
    with torch.no_grad():
        return _accuracy(network.eval()(test), test_labels)


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).double().mean())


def entropies(scores: Tensor, labels: Tensor, least: float = 1e-12) -> Tensor:
    """Cross-entropy of each sample under scores that are probabilities [m, classes], no smaller than ``least``: [m]."""
    return -scores.gather(1, labels.unsqueeze(1)).squeeze(1).clamp_min(least).log()
