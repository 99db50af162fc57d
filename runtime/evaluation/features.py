"""Features of images: what a model's classifier takes, or what a method that learns features gives."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor, nn

from cutlayer.datasets import Source
from cutlayer.evaluations import Score
from cutlayer.models import build_model, classifier, leave_out
from cutlayer.models.cutting import is_ghost
from cutlayer.runtime.evaluation.classifiers import MonitorConfig, drawn, entropies, knn_scores
from cutlayer.runtime.evaluation.scores import How, gather
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.rng import TorchStream, torch_generator
from cutlayer.runtime.parties.blueprint import Blueprint

if TYPE_CHECKING:
    from cutlayer.runtime.rounds.federation import Federation

OUTPUT = "output"
"""Where the features of a method are that learns nothing else."""


def features(
    modules: Sequence[nn.Module],
    source: Source,
    blueprint: Blueprint,
    **how: Unpack[How],
) -> tuple[Tensor, Tensor]:
    """What the composed modules give for images that are not augmented, in evaluation mode and without gradients.

    Args:
        modules: applied one after the other; the last gives [b, d].

    Returns:
        float32 [n, d] and the labels int64 [n], both on the modules' device, in the samples' order.
    """
    return gather(lambda output, y: (output.flatten(1).float(), y), modules, source, blueprint, **how)


def feature_parts(federation: Federation) -> tuple[list[nn.Module], str]:
    """Copies of the parts that the server holds, which composed give features [b, d], and where these are in the model.

    Of a method with personal parts they are the shared ones, of one client alone its own; a head that clients keep is
    behind the features.

    Raises:
        ConfigError: each client has a model of its own, and none is shared.
    """
    algorithm, held = federation.algorithm, federation.server.ctx.parts
    names, alone = algorithm.layout.whole, federation.population == 1
    apart = {*federation.personal} - {*algorithm.shared, "head"}
    if apart.intersection(names) and not alone:
        expected = "a method with features that all clients share; in this one each client has its own"
        raise ConfigError("algorithm.name", algorithm.name, expected)
    parts = federation.blueprint.parts(names)
    states = federation.client_states(0) if alone else {name: held[name].state_dict() for name in names}
    for name, part in parts.items():
        part.load_state_dict(states[name])
    modules = list(parts.values())
    return modules, OUTPUT if algorithm.evaluates_features else _classifier_left_out(federation, modules)


def _classifier_left_out(federation: Federation, parts: Sequence[nn.Module]) -> str:
    """Make the parts of a model give what its classifier takes; returns the classifier's name."""
    info = federation.dataset.info
    with TorchStream(0, torch.device("cpu")):
        name = classifier(build_model(federation.config.model, info), info.shape)
    # Modules have the same name in a part as in the model; parts may also have stand-ins for those of others.
    found: list[nn.Module] = []
    for part in parts:
        with contextlib.suppress(AttributeError):
            found.append(part.get_submodule(name))
    leave_out([module for module in found if not is_ghost(module)][-1])
    return name


class KnnMonitor:
    """Tests features at a round's end, by a weighted kNN among the features of some training samples.

    Args:
        config: neighbours, temperature, and how many training samples.
        train: the training set.
        classes: of the labels.
        seed: the run's; the training samples are drawn from it once.
    """

    def __init__(self, config: MonitorConfig, train: Source, *, classes: int, seed: int) -> None:
        self._config, self._train, self._classes = config, train, classes
        self._bank = drawn(len(train), config.train_samples, torch_generator(seed, stream="monitor"))

    def score(
        self,
        modules: Sequence[nn.Module],
        source: Source,
        blueprint: Blueprint,
        **how: Unpack[How],
    ) -> Score:
        """The kNN's score on a source, or on some of it; arguments as of ``features``.

        The loss is the cross-entropy of the classes' normalised weights, of a class without a neighbour 27.6.
        """
        queries, wanted = features(modules, source, blueprint, **how)
        bank, labels = features(modules, self._train, blueprint, **{**how, "samples": self._bank})
        config = self._config
        scores = knn_scores(bank, labels, queries, self._classes, k=config.k, temperature=config.temperature)
        return Score(entropies(scores, wanted).double().cpu(), scores.argmax(1).cpu(), wanted.cpu())
