"""Features of images: what a model's classifier takes, or what a method that learns features gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor, nn

from cutlayer.datasets import Source
from cutlayer.evaluations import Score
from cutlayer.runtime.ground.rng import torch_generator
from cutlayer.runtime.parties.blueprint import Blueprint
from cutlayer.runtime.scoring.classifiers import MonitorConfig, drawn, entropies, knn_scores
from cutlayer.runtime.scoring.scores import How, gather


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
        losses, predicted, wanted = entropies(scores, wanted).double().cpu(), scores.argmax(1).cpu(), wanted.cpu()
        return Score(losses, (predicted == wanted).long(), wanted.new_ones(len(wanted)), wanted, predicted)
