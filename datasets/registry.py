"""The registry of datasets: a name, a reader, and the dataclass of the reader's own options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.datasets.images import EncodedImages
from cutlayer.datasets.texts import Texts
from cutlayer.datasets.tokenizer import Tokenizer
from cutlayer.runtime.ground.config import NoOptions, build
from cutlayer.runtime.ground.registry import Registry


@dataclass(frozen=True)
class RawSplit:
    """Samples and labels as read.

    Attributes:
        inputs: images, uint8 [n, channels, height, width] in memory or encoded files that decode to that; or texts.
        labels: int64 [n].
        targets: [n, ...], what a model is to give for each image where that is not its label; None: the label.
            Of texts it is the next tokens.
        groups: int64 [n], which group each sample is of: those that belong together, such as a writer's, a lesion's, a
            site's. One number is the same group in the training and in the test set. None where there are none.
    """

    inputs: Tensor | EncodedImages | Texts
    labels: Tensor
    groups: np.ndarray | None = None
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        assert len(self.inputs) == len(self.labels), "one label for each sample"
        assert self.labels.dtype == torch.int64

    def subset(self, indices: np.ndarray) -> "RawSplit":
        """The samples at `indices` (int64), in that order."""
        where = torch.from_numpy(indices)
        inputs = self.inputs[where] if isinstance(self.inputs, Tensor) else self.inputs.subset(indices)
        groups = None if self.groups is None else self.groups[indices]
        return RawSplit(inputs, self.labels[where], groups, None if self.targets is None else self.targets[where])


@dataclass(frozen=True)
class RawDataset:
    """What a reader returns.

    Attributes:
        mean, std: the published ones, per channel in 0..1; empty: to be computed.
        task, outputs: see `DatasetInfo`.
        tokenizer: of texts, what made them tokens.
    """

    train: RawSplit
    test: RawSplit
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    task: str = "classification"
    outputs: int = 0
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class ReadContext:
    """What a reader may use: the folder, its own options (validated), the run's seed, and whether it may download."""

    root: Path
    options: Any = field(default_factory=NoOptions)
    seed: int = 0
    download: bool = True


Reader = Callable[[ReadContext], RawDataset]
_READERS: Registry[tuple[Reader, type[Any]]] = Registry("dataset")


def register(name: str, options: type[Any] = NoOptions) -> Callable[[Reader], Reader]:
    """Register the decorated reader as dataset `name`; `options` is the frozen dataclass of its own options."""

    def add(reader: Reader) -> Reader:
        _READERS.add(name, (reader, options))
        return reader

    return add


def names() -> tuple[str, ...]:
    """All registered datasets, sorted."""
    return _READERS.names()


def check_options(name: str, options: Mapping[str, Any]) -> Any:
    """The options of dataset `name` as its own dataclass; ConfigError for an unknown name, key or value."""
    return build(_READERS.find(name, "name")[1], options, "options")


def read(name: str, root: Path, options: Mapping[str, Any], seed: int, *, download: bool = True) -> RawDataset:
    """Read dataset `name`; may download into `root`. ConfigError where files are missing or not what they should be."""
    checked = check_options(name, options)
    return _READERS[name][0](ReadContext(root.expanduser(), checked, seed, download))
