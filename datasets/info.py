"""What is known of a dataset, and the loaded dataset itself."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cutlayer.datasets.source import Source


@dataclass(frozen=True)
class DatasetInfo:
    """The numbers that models and partitions follow from; sizes in pixels, as batches have them."""

    name: str
    channels: int
    height: int
    width: int
    classes: int
    class_names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class Dataset:
    """A loaded dataset.

    Attributes:
        info: its name, shape and classes.
        train, test: the two sets.
        validation: what `dataset.validation` holds out of the training set, or None.
        facts: what distinguishes it from others, see ``cutlayer.datasets.facts``.
    """

    info: DatasetInfo
    train: Source
    test: Source
    validation: Source | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def groups(self) -> np.ndarray | None:
        """int64 [len(train)], the group (writer, site) of each training sample, or None."""
        return self.train.groups

    def repeated(self, channels: int) -> "Dataset":
        """The same dataset with its one channel given `channels` times; as it is where it has as many."""
        if channels == self.info.channels:
            return self
        assert self.info.channels == 1, "only grey images can be repeated"
        validation = None if self.validation is None else self.validation.repeated(channels)
        info, train, test = replace(self.info, channels=channels), self.train, self.test
        return replace(
            self, info=info, train=train.repeated(channels), test=test.repeated(channels), validation=validation
        )

    def in_format(self, memory_format: torch.memory_format) -> "Dataset":
        """The same dataset, with the values of its batches in another order in memory."""
        if memory_format == torch.preserve_format:
            return self
        validation = None if self.validation is None else self.validation.in_format(memory_format)
        train, test = (each.in_format(memory_format) for each in (self.train, self.test))
        return replace(self, train=train, test=test, validation=validation)
