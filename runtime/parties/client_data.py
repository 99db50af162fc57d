"""A client's training samples, as its program gets them: epochs of batches, or steps of two augmented views."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cutlayer.datasets import DatasetConfig, Source, batch_sizes
from cutlayer.runtime.ground import rng


class Drawn(NamedTuple):
    """The samples of one step, and how each of the views of them is augmented.

    Attributes:
        samples: int64 [b], numbers of training samples.
        views: for each view the parameters of its augmentation, [b, ...] each.
    """

    samples: Tensor
    views: tuple[Mapping[str, Tensor], ...]


class ClientData:
    """The training data of one client.

    Args:
        source: the images and labels of all clients.
        indices: int64 [n], those that are the client's.
        seed: of the run. client: number of the client.
        batch_size, local_epochs, config: as configured.

    Attributes:
        epochs: passes over the data in a round, ``local_epochs``.
    """

    def __init__(
        self,
        source: Source,
        indices: Tensor,
        *,
        seed: int,
        client: int,
        batch_size: int,
        local_epochs: int,
        config: DatasetConfig,
    ) -> None:
        self.source = source
        self._indices = indices
        self._seed, self._client = seed, client
        self._batch_size, self.epochs = batch_size, local_epochs
        self._config = config

    def __len__(self) -> int:
        return len(self._indices)

    def batches(self, generator: torch.Generator, epochs: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """``local_epochs`` passes over the data, or as many as given: x [b, C, H, W] on the device, y int64 [b]."""
        return self.source.batches(
            self._indices,
            batch_size=self._batch_size,
            epochs=self.epochs if epochs is None else epochs,
            shuffle=self._config.shuffle,
            augment=True,
            drop_last=self._config.drop_last,
            generator=generator,
        )

    def steps(self, generator: torch.Generator, epochs: int | None = None) -> Iterator[Drawn]:
        """What `batches` makes its batches from, one view each."""
        sizes = batch_sizes(len(self._indices), self._batch_size, self._config.drop_last)
        count, shuffle = self.epochs if epochs is None else epochs, self._config.shuffle
        for order, params in self.source.epochs(self._indices, sum(sizes), count, shuffle, True, generator):
            start = 0
            for size in sizes:
                stop = start + size
                yield Drawn(order[start:stop], ({name: value[start:stop] for name, value in params.items()},))
                start = stop

    def drawn(self, generator: torch.Generator, round: int, sizes: Sequence[int]) -> Iterator[Drawn]:
        """The samples of each step of a round in which steps take ``sizes`` samples, and two views of each.

        The client walks through its data epoch by epoch, in a new order each, by the clock of the rounds: in a round
        without it, it skips those whose turn it is. So no state is needed.
        """
        start = round * sum(sizes)
        for size in sizes:
            samples = self._indices[self._positions(start, size)]
            yield Drawn(samples, tuple(self.source.draw(size, generator) for _ in range(2)))
            start += size

    def _positions(self, start: int, count: int) -> Tensor:
        """Positions number ``start`` to ``start + count`` in the sequence of the epochs' orders."""
        n, taken = len(self._indices), list[Tensor]()
        while count:
            epoch, at = divmod(start, n)
            generator = rng.torch_generator(self._seed, round=epoch, client=self._client, stream="order")
            taken.append(torch.randperm(n, generator=generator)[at : at + count])
            start, count = start + len(taken[-1]), count - len(taken[-1])
        return torch.cat(taken)


def images(source: Source, steps: Sequence[Drawn]) -> tuple[Tensor, ...]:
    """The views of the samples of one or several clients' steps, one after another: [b, C, H, W] each."""
    samples = torch.cat([step.samples for step in steps])
    params: list[Mapping[str, Tensor]] = []
    for view, first in enumerate(steps[0].views):
        params.append({key: torch.cat([step.views[view][key] for step in steps]) for key in first})
    return source.take(samples, params)


def views(source: Source, steps: Sequence[Drawn]) -> tuple[Tensor, Tensor]:
    """The two views of the samples of one or several clients' steps, one after another: [b, C, H, W] each."""
    one, two = images(source, steps)
    return one, two
