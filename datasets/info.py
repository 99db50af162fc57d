"""What is known of a dataset, and the loaded dataset itself."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cutlayer.datasets.source import Source
from cutlayer.datasets.tokenizer import Tokenizer


@dataclass(frozen=True)
class DatasetInfo:
    """The numbers that models and partitions follow from; sizes in pixels, as batches have them.

    Attributes:
        classes, class_names: of the labels, by which samples are divided among clients.
        task: what the data ask of a model, by its name in `cutlayer.tasks`.
        outputs: values that a model gives for each thing that it predicts, such as the logits of so many classes; as
            many as there are classes if nothing else is said.
        length: tokens of the longest sequence, where samples are text; 0 where they are images.
    """

    name: str
    channels: int
    height: int
    width: int
    classes: int
    class_names: tuple[str, ...]
    task: str = "classification"
    outputs: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        if not self.outputs:
            object.__setattr__(self, "outputs", self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (channels, height, width) of an image, (length,) of the longest text."""
        return (self.length,) if self.length else (self.channels, self.height, self.width)


@dataclass(frozen=True)
class Dataset:
    """A loaded dataset.

    Attributes:
        info: its name, shape and classes.
        train, test: the two sets.
        validation: what `dataset.validation` holds out of the training set, or None.
        facts: what distinguishes it from others, see ``cutlayer.datasets.facts``.
        tokenizer: of texts, what made them tokens and makes them text again.
    """

    info: DatasetInfo
    train: Source
    test: Source
    validation: Source | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    tokenizer: Tokenizer | None = None

    @property
    def groups(self) -> np.ndarray | None:
        """int64 [len(train)], the group (writer, site) of each training sample, or None."""
        return self.train.groups

    def repeated(self, channels: int) -> "Dataset":
        """The same dataset with its one channel given `channels` times; as it is where it has as many, or is text."""
        if channels == self.info.channels or self.info.length:
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
