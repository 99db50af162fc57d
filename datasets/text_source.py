"""Texts that give out ready batches on the device: tokens, and for each of them the next."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cutlayer.datasets.source import Source
from cutlayer.datasets.texts import Texts
from cutlayer.runtime.ground.devices import moved

# What no loss counts: torch's ``cross_entropy`` leaves it out of its mean, as others do.
_NOT_PREDICTED = -100


class TokenStore:
    """Tokens in memory or in a memory-mapped file, or with `resident` on the device."""

    def __init__(self, tokens: np.ndarray, device: torch.device, *, resident: bool) -> None:
        self._device = device
        self._tokens: np.ndarray | Tensor = tokens
        if resident and device.type != "cpu":
            self._tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)  # unsigned ones have few operations
        elif resident:
            self._tokens = np.array(tokens, subok=False) if isinstance(tokens, np.memmap) else tokens

    def read(self, places: Tensor) -> Tensor:
        """The tokens at `places` (int64, CPU) as int64 of the same shape, on the device."""
        if isinstance(self._tokens, Tensor):
            where = moved(places, self._device)
            return self._tokens.index_select(0, where.flatten()).view(where.shape).long()
        return moved(torch.from_numpy(self._tokens[places.numpy()].astype(np.int64)), self._device)


class TextSource(Source):
    """Texts, addressed by index; batches come ready on the device.

    A batch is as long as its longest text: x int64 [b, l] and y int64 [b, l], where y[:, t] is the token after
    x[:, t]. It is -100 where nothing is predicted: within a text's prompt, and to the right of its end, where x is 0.
    So a model that looks back only needs no mask.

    Attributes:
        labels, groups: see `Source`.
        targets: y of the samples asked for, as long as the longest of them. It is no tensor, as texts differ in length.
        shape: (length,), the longest that x may be.
        texts: the texts.
    """

    def __init__(
        self, texts: Texts, store: TokenStore, labels: Tensor, groups: np.ndarray | None, device: torch.device
    ) -> None:
        super().__init__(labels, groups, device)
        self.texts, self.shape, self._store = texts, texts.shape, store
        self._starts, self._lengths, self._prompts = map(torch.from_numpy, (texts.starts, texts.lengths, texts.prompts))
        self.targets = NextTokens(self)

    def pixels(self, x: Tensor) -> Tensor:
        """Not of texts.

        Raises:
            TypeError: always.
        """
        raise TypeError("texts have no pixels")

    def shortened(self, length: int) -> "TextSource":
        lengths = np.minimum(self.texts.lengths, length + 1)
        prompts = np.minimum(self.texts.prompts, lengths - 1)
        texts = replace(self.texts, lengths=lengths, prompts=prompts)
        return TextSource(texts, self._store, self.labels, self.groups, self._device)

    @property
    def longest(self) -> int:
        return int(self._lengths.argmax())

    def places(self, samples: Tensor) -> int:
        return len(samples) * (int(self._lengths[samples].max()) - 1) if len(samples) else 0

    def pairs(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """x and y of samples, int64 [k]: int64 [k, l] each, on the device."""
        starts, lengths, prompts = (each[samples, None] for each in (self._starts, self._lengths, self._prompts))
        at = torch.arange(int(lengths.max()) if len(samples) else 1)
        inside = at < lengths
        tokens = self._store.read(torch.where(inside, starts + at, starts))
        known = inside[:, 1:]
        predicted = known & (at[1:] >= prompts)
        x = tokens[:, :-1].masked_fill(moved(~known, self._device), 0)
        return x, tokens[:, 1:].masked_fill(moved(~predicted, self._device), _NOT_PREDICTED)

    def take(self, order: Tensor, params: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, ...]:
        """x of the texts at `order`, int64 [k, l] with l of the longest, once for each of `params`, which are empty.

        Raises:
            ValueError: there are parameters of an augmentation, which texts do not have.
        """
        if any(params):
            raise ValueError("parameters of an augmentation, but this source has none")
        return (self.pairs(order)[0],) * len(params)

    def _epoch(self, order: Tensor, sizes: list[int], params: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for samples in order.split(sizes):
            yield self.pairs(samples)


class NextTokens:
    """What is to be predicted of texts, made when it is asked for."""

    def __init__(self, source: TextSource) -> None:
        self._source = source

    def __getitem__(self, samples: Tensor, /) -> Tensor:
        """Of the samples, int64 [k]: int64 [k, l], on the CPU or where the source's batches are."""
        return self._source.pairs(samples)[1]
