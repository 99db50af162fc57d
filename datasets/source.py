"""Samples that a model is given, by index, with what it is to give; batches come ready on the device."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from cutlayer.datasets.batching import DropLast, batch_sizes


class Targets(Protocol):
    """What a model is to give for each sample: a tensor [n, ...], or what makes one of the samples asked for."""

    def __getitem__(self, samples: Tensor, /) -> Tensor:
        """Of the samples, int64 [k]: [k, ...]."""
        ...


class Source(ABC):
    """Samples of one kind, `ImageSource` or `TextSource`, addressed by index.

    Attributes:
        labels: int64 [n] on the CPU, by which samples are divided among clients.
        targets: what a model is to give for a sample, on the CPU: see the class of the samples.
        groups: int64 [n], the group of each sample; one number is the same group in all parts of a dataset. None: none.
        shape: of a sample in a batch; of texts the longest.
    """

    targets: Targets
    shape: tuple[int, ...]

    def __init__(self, labels: Tensor, groups: np.ndarray | None, device: torch.device) -> None:
        self.labels, self.groups, self._device = labels, groups, device

    def __len__(self) -> int:
        return len(self.labels)

    def repeated(self, channels: int) -> Self:
        """The same samples with their one channel given `channels` times; as they are where they have none."""
        return self

    def in_format(self, memory_format: torch.memory_format) -> Self:
        """The same samples, in batches whose values lie in another order in memory, where they have channels."""
        return self

    @abstractmethod
    def pixels(self, x: Tensor) -> Tensor:
        """Images of a batch before they were normalised: [b, channels, height, width] -> the same with values 0..1."""

    def batches(
        self,
        indices: Tensor,
        *,
        batch_size: int,
        epochs: int = 1,
        shuffle: bool = False,
        augment: bool = False,
        drop_last: DropLast = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches over the samples at `indices`, `epochs` times.

        The values depend on the arguments and the generator's state only: not on where the samples are kept, nor on
        the number of workers. Each epoch draws from the generator once, when its first batch is asked for. Batches may
        be views of one tensor: change one in place only after cloning it.

        Args:
            indices: int64 [k], CPU; none gives no batch.
            batch_size: samples in a batch.
            shuffle: take a new order each epoch.
            augment: apply the augmentation that this source was configured with.
            drop_last: see `batch_sizes`.
            generator: a CPU generator, the source of all randomness; needed when something is random.

        Yields:
            x: [b, ...] on the device, see the class of the samples; y: targets [b, ...], on the device.

        Raises:
            ValueError: something is random and there is no generator.
        """
        sizes = batch_sizes(len(indices), batch_size, drop_last)
        for order, params in self.epochs(indices, sum(sizes), epochs, shuffle, augment, generator):
            yield from self._epoch(order, sizes, params)

    def epochs(
        self,
        indices: Tensor,
        used: int,
        epochs: int,
        shuffle: bool,
        augment: bool,
        generator: torch.Generator | None,
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """What `batches` takes in each epoch, in order: `used` samples, int64, and what their augmentation is drawn by.

        Raises:
            ValueError: something is random and there is no generator.
        """
        augmented = augment and self._augmented
        if generator is None and (shuffle or augmented):
            raise ValueError("shuffle and augment need a generator")
        for _ in range(epochs):
            order = indices[torch.randperm(len(indices), generator=generator)] if shuffle else indices
            params = self.draw(used, generator) if augmented and generator is not None else {}
            yield order[:used], params

    @property
    def _augmented(self) -> bool:
        """Whether there is an augmentation to draw."""
        return False

    def shortened(self, length: int) -> Self:
        """The same samples, none longer than so many places, where they have a length: texts lose their ends."""
        return self

    @property
    def longest(self) -> int:
        """A sample than which none is longer, where they have a length."""
        return 0

    def places(self, samples: Tensor) -> int:
        """How many places a batch of these samples, int64 [b], has: one a sample, of text as many as tokens given."""
        return len(samples)

    def draw(self, samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Parameters of the configured augmentation for so many samples, CPU, [samples, ...] each; none without one.

        Args:
            generator: a CPU generator.
        """
        return {}

    @abstractmethod
    def take(self, order: Tensor, params: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, ...]:
        """The samples at `order`, read once and made a finished batch in several ways.

        Args:
            order: int64 [k], CPU.
            params: for each batch what `draw` gave for k samples, in one call or in several that are concatenated by
                name; an empty mapping leaves the samples as they are.

        Returns:
            For each of `params` [k, ...], on the device.

        Raises:
            ValueError: there are parameters and no augmentation that they could be of.
        """

    @abstractmethod
    def _epoch(self, order: Tensor, sizes: list[int], params: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples in order, as batches of these sizes."""
