"""The worth of a trained federation's features: a kNN and linear classifiers on them, the model left as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlayer.runtime.evaluation.classifiers import ProbeConfig, balanced, drawn, knn_accuracy, linear_accuracy
from cutlayer.runtime.evaluation.features import OUTPUT, feature_parts, features
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.files import PROBED, make_folder, replace_file
from cutlayer.runtime.ground.reading import read_json
from cutlayer.runtime.ground.units import format_percent
from cutlayer.runtime.records.console import Section
from cutlayer.runtime.rounds.federation import Federation

SUMMARY = "summary.json"

Shown = Callable[[str], None]
"""Told what is being done."""


@dataclass(frozen=True)
class Probed:
    """What a probe found; accuracies are fractions of the test samples.

    Attributes:
        features: where they are in the model: the module whose input they are, or ``output``.
        round: rounds that the model was trained for. dimension: of a feature vector.
        train_samples, test_samples: how many were used. k: neighbours, at most as many as training samples.
        knn: accuracy of the weighted kNN, None where it was left out.
        linear: accuracy of the linear classifier by the share of the labels that it was trained with.
        labels: how many labels that were, by share.
    """

    features: str
    round: int
    dimension: int
    train_samples: int
    test_samples: int
    k: int
    temperature: float
    l2: float
    knn: float | None
    linear: dict[str, float]
    labels: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        return {**vars(self), "finished": True}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Probed:
        """What ``to_json`` gave."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})

    def section(self) -> Section:
        """Of the kNN and each linear classifier its accuracy, and how many labels it had."""
        rows = [
            (f"  linear, {100 * float(share):.4g}% of labels", format_percent(accuracy), f"{self.labels[share]} labels")
            for share, accuracy in self.linear.items()
        ]
        if self.knn is not None:
            given = f"k {self.k}, temperature {self.temperature:g}, {self.train_samples} labels"
            rows.insert(0, ("  kNN", format_percent(self.knn), given))
        return Section("frozen features", f"{self.dimension}, {self.features}", rows)


def folder_of(run: Path, config: ProbeConfig) -> Path:
    """Where a setting's results lie in a run's folder."""
    return run / PROBED / config.setting


def read(run: Path, config: ProbeConfig) -> Probed | None:
    """What an earlier probe of the run by this setting found; None where there was none that finished."""
    try:
        content = read_json(run, str(folder_of(run, config).relative_to(run) / SUMMARY))
        return Probed.from_json(content) if content["finished"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def probe(federation: Federation, config: ProbeConfig, run: Path, shown: Shown | None = None) -> Probed:
    """Measure the features of the model that the server holds; writes ``summary.json`` below the run's folder.

    The training samples' features are the kNN's bank and what the linear classifiers are trained on, without
    augmentation. The same federation gives the same bits again; a failure leaves nothing.

    Raises:
        ConfigError: each client has a model of its own, or features are not finite.
    """

    def tell(text: str) -> None:
        if shown is not None:
            shown(text)

    modules, where = feature_parts(federation)
    dataset, seed = federation.dataset, federation.config.seed
    found: list[Any] = []
    for name, source, count in (
        ("training", dataset.train, config.train_samples),
        ("test", dataset.test, config.test_samples),
    ):
        tell(f"features of {name} samples")
        found += features(
            modules,
            source,
            federation.blueprint,
            batch_size=federation.config.eval_batch_size,
            batch_statistics=federation.evaluator.batch_statistics,
            samples=drawn(len(source), count, rng.torch_generator(seed, stream=f"probe {name}")),
        )
        if not found[-2].isfinite().all():
            raise ConfigError("model", NO_VALUE, f"its features of {name} samples are not finite")
    train, train_labels, test, test_labels = found
    classes, knn = dataset.info.classes, None
    if config.knn:
        tell("kNN")
        knn = knn_accuracy(train, train_labels, test, test_labels, classes, config.k, config.temperature)
    linear: dict[str, float] = {}
    labels: dict[str, int] = {}
    for share in config.labels:
        tell(f"linear classifier, {100 * share:.4g}% of the labels")
        # A generator of its own for each share, so that a smaller one is part of a larger one.
        generator = rng.torch_generator(seed, stream="probe labels")
        chosen = balanced(train_labels.cpu(), share, classes, generator).to(train.device)
        key = str(float(share))
        linear[key] = linear_accuracy(train[chosen], train_labels[chosen], test, test_labels, classes, config.l2)
        labels[key] = len(chosen)
    probed = Probed(
        features=where if where == OUTPUT else f"input of {where}",
        round=federation.round,
        dimension=train.shape[1],
        train_samples=len(train),
        test_samples=len(test),
        k=min(config.k, len(train)),
        temperature=config.temperature,
        l2=config.l2,
        knn=knn,
        linear=linear,
        labels=labels,
    )
    folder = folder_of(run, config)
    make_folder(run, folder)
    replace_file(folder / SUMMARY, json.dumps(probed.to_json(), allow_nan=False) + "\n")
    return probed
