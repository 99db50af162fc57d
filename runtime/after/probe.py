"""The worth of a trained federation's features: a kNN and linear classifiers on them, the model left as it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.datasets import Source
from cutlayer.models import build_model, classifier, leave_out
from cutlayer.models.cutting import is_ghost
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.files import PROBED, SUMMARY, make_folder, replace_file
from cutlayer.runtime.ground.reading import read_json
from cutlayer.runtime.ground.rng import TorchStream
from cutlayer.runtime.ground.units import format_percent
from cutlayer.runtime.records.console import Section
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.scoring.classifiers import (
    ProbeConfig,
    balanced,
    drawn,
    knn_accuracy,
    linear_accuracy,
    two_layer_accuracy,
)
from cutlayer.runtime.scoring.features import features

OUTPUT = "output"
"""Where the features of a method are that learns nothing else."""

StageShown = Callable[[str], None]
"""Gets what is being done, as a text."""


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
        two_layer: accuracy of the network of two layers by such a share below 1; none where it was left out.
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
    two_layer: dict[str, float] = field(default_factory=dict[str, float])

    def to_json(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        return {**vars(self), "finished": True}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Probed:
        """What ``to_json`` gave."""
        return cls(
            **{name: content[name] for name in cls.__dataclass_fields__ if name != "two_layer" or name in content}
        )

    def section(self) -> Section:
        """Of the kNN and each linear classifier its accuracy, and how many labels it had."""
        rows = [
            (f"  linear, {100 * float(share):.4g}% of labels", format_percent(accuracy), f"{self.labels[share]} labels")
            for share, accuracy in self.linear.items()
        ]
        rows += [
            (
                f"  two layers, {100 * float(share):.4g}% of labels",
                format_percent(found),
                f"{self.labels[share]} labels",
            )
            for share, found in self.two_layer.items()
        ]
        if self.knn is not None:
            given = f"k {self.k}, temperature {self.temperature:g}, {self.train_samples} labels"
            rows.insert(0, ("  kNN", format_percent(self.knn), given))
        return Section("frozen features", f"{self.dimension}, {self.features}", rows)


def probed_folder(run: Path, config: ProbeConfig) -> Path:
    """Where a setting's results lie in a run's folder."""
    return run / PROBED / config.setting


def earlier_probe(run: Path, config: ProbeConfig) -> Probed | None:
    """What an earlier probe of the run by this setting found; None where there was none that finished."""
    try:
        content = read_json(run, str(probed_folder(run, config).relative_to(run) / SUMMARY))
        return Probed.from_json(content) if content["finished"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def probe(federation: Federation, config: ProbeConfig, run: Path, shown: StageShown = lambda _: None) -> Probed:
    """Measure the features of the model that the server holds; writes ``summary.json`` below the run's folder.

    The training samples' features are the kNN's bank and what the linear classifiers are trained on, without
    augmentation. The same federation gives the same bits again; a failure leaves nothing.

    Raises:
        ConfigError: each client has a model of its own, features are not finite, or samples have no class.
    """
    task = federation.setup.dataset.info.task
    if task != "classification":
        expected = f"false for a dataset whose task is {task}: kNN and linear classifiers find classes"
        raise ConfigError("probe.after", NO_VALUE, expected)
    modules, where = feature_parts(federation)
    dataset, classes, knn = federation.setup.dataset, federation.setup.dataset.info.classes, None
    train = _features(federation, modules, "training", dataset.train, config.train_samples, shown)
    test = _features(federation, modules, "test", dataset.test, config.test_samples, shown)
    if config.knn:
        shown("kNN")
        knn = knn_accuracy(*train, *test, classes, config.k, config.temperature)
    linear, labels, deep = _classifiers(config, train, test, classes, federation.setup.config.seed, shown)
    (bank, _), (queries, _) = train, test
    probed = Probed(
        features=where if where == OUTPUT else f"input of {where}",
        round=federation.round,
        dimension=bank.shape[1],
        train_samples=len(bank),
        test_samples=len(queries),
        k=min(config.k, len(bank)),
        temperature=config.temperature,
        l2=config.l2,
        knn=knn,
        linear=linear,
        labels=labels,
        two_layer=deep,
    )
    folder = probed_folder(run, config)
    make_folder(run, folder)
    replace_file(folder / SUMMARY, json.dumps(probed.to_json(), allow_nan=False) + "\n")
    return probed


def _features(
    federation: Federation,
    modules: Sequence[nn.Module],
    name: str,
    source: Source,
    count: int | None,
    shown: StageShown,
) -> tuple[Tensor, Tensor]:
    """Features, float32 [n, d], and labels, int64 [n], of ``count`` samples of a source, drawn by the run's seed."""
    shown(f"features of {name} samples")
    setup = federation.setup
    found, labels = features(
        modules,
        source,
        setup.blueprint,
        batch_size=setup.config.eval_batch_size,
        batch_statistics=federation.evaluator.batch_statistics,
        samples=drawn(len(source), count, rng.torch_generator(setup.config.seed, stream=f"probe {name}")),
    )
    if not found.isfinite().all():
        raise ConfigError("model", NO_VALUE, f"its features of {name} samples are not finite")
    return found, labels


def _classifiers(
    config: ProbeConfig,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
    seed: int,
    shown: StageShown,
) -> tuple[dict[str, float], dict[str, int], dict[str, float]]:
    """By the share of the labels that is learnt from: accuracies of linear classifiers, labels, those of two layers."""
    (bank, known), linear, labels, deep = train, dict[str, float](), dict[str, int](), dict[str, float]()
    for share in config.labels:
        # A generator of its own for each share, so that a smaller one is part of a larger one.
        generator = rng.torch_generator(seed, stream="probe labels")
        chosen = balanced(known.cpu(), share, classes, generator).to(bank.device)
        some, key = (bank[chosen], known[chosen], *test, classes), str(float(share))
        shown(f"linear classifier, {100 * share:.4g}% of the labels")
        linear[key] = linear_accuracy(*some, config.l2)
        labels[key] = len(chosen)
        if config.hidden is not None and share < 1:
            shown(f"two layers, {100 * share:.4g}% of the labels")
            deep[key] = two_layer_accuracy(
                *some, hidden=config.hidden, seed=rng.derive(seed, stream="probe two layers")
            )
    return linear, labels, deep


def feature_parts(federation: Federation) -> tuple[list[nn.Module], str]:
    """Copies of the parts that the server holds, which composed give features [b, d], and where these are in the model.

    Of a method with personal parts they are the shared ones, of one client alone its own; a head that clients keep is
    behind the features.

    Raises:
        ConfigError: each client has a model of its own, and none is shared.
    """
    setup, held = federation.setup, federation.learnt.held
    algorithm = setup.algorithm
    names, alone = algorithm.layout.whole, setup.population == 1
    apart = {*setup.personal} - ({*algorithm.shared, "head"} - {*algorithm.partly})
    if apart.intersection(names) and not alone:
        expected = "a method with features that all clients share; in this one each client has its own"
        raise ConfigError("algorithm.name", algorithm.name, expected)
    parts = setup.blueprint.parts(names)
    states = federation.learnt.client_states(0) if alone else {name: held[name].state_dict() for name in names}
    for name, part in parts.items():
        part.load_state_dict(states[name])
    modules = list(parts.values())
    return modules, OUTPUT if algorithm.evaluates_features else _classifier_left_out(setup, modules)


def _classifier_left_out(setup: Setup, parts: Sequence[nn.Module]) -> str:
    """Make the parts of a model give what its classifier takes; returns the classifier's name."""
    info = setup.dataset.info
    with TorchStream(0, torch.device("cpu")):
        name = classifier(build_model(setup.config.model, info), info.shape)
    # Modules have the same name in a part as in the model; parts may also have stand-ins for those of others.
    found: list[nn.Module] = []
    for part in parts:
        with contextlib.suppress(AttributeError):
            found.append(part.get_submodule(name))
    leave_out([module for module in found if not is_ghost(module)][-1])
    return name
