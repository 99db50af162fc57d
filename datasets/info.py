"""What is known of a dataset, and the loaded dataset itself."""

from dataclasses import dataclass

import numpy as np

from datasets.source import Source


@dataclass(frozen=True)
class DatasetInfo:
    """The numbers that models and partitions follow from; sizes in pixels."""

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
        groups: int64 [len(train)], the natural group (writer) of each training sample, or None.
    """

    info: DatasetInfo
    train: Source
    test: Source
    validation: Source | None = None
    groups: np.ndarray | None = None
