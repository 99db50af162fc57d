"""Texts as tokens, one after another in one array that may be a file; cut to a length, or into blocks of one."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

# Tokens count in a sum with all of them up to this many, more of them by evenly spaced texts of as many.
_SUMMED = 4 << 20


def token_dtype(size: int) -> np.dtype[Any]:
    """The smallest integers that hold the tokens of a vocabulary of `size`."""
    return np.dtype("uint8" if size <= 1 << 8 else "uint16" if size <= 1 << 16 else "int32")


@dataclass(frozen=True, eq=False)
class Texts:
    """Tokens of texts, of which the first ones of each may be given, and are not predicted.

    A text of n tokens is a sample of n - 1: of each token but the last a model is to tell the next.

    Attributes:
        tokens: integers [all], those of all texts; a memory-mapped file, or an array in memory.
        starts: int64 [n], where in ``tokens`` each text begins; texts may overlap.
        lengths: int64 [n], how many tokens each has, at least 2.
        prompts: int64 [n], how many of them are given, fewer than there are.
        length: of the longest text that there may be, in tokens less one.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray
    length: int

    def __post_init__(self) -> None:
        assert len(self.starts) == len(self.lengths) == len(self.prompts)
        assert all(each.dtype == np.int64 for each in (self.starts, self.lengths, self.prompts))
        assert ((self.lengths >= 2) & (self.prompts < self.lengths)).all(), "something of each text is predicted"
        assert self.lengths.max(initial=0) <= self.length + 1

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def shape(self) -> tuple[int]:
        """Of the longest sample."""
        return (self.length,)

    @property
    def predicted(self) -> int:
        """How many tokens are to be predicted in all."""
        return int((self.lengths - np.maximum(self.prompts, 1)).sum())

    def subset(self, indices: np.ndarray) -> Texts:
        """The texts at `indices` (int64), in that order."""
        return Texts(self.tokens, self.starts[indices], self.lengths[indices], self.prompts[indices], self.length)

    def prompt(self, index: int) -> list[int]:
        """The tokens of a text that are given."""
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.prompts[index])].tolist()

    def completion(self, index: int) -> list[int]:
        """The tokens of a text that are not given."""
        start, stop = (int(self.starts[index] + each[index]) for each in (self.prompts, self.lengths))
        return self.tokens[start:stop].tolist()

    def sum(self) -> str:
        """A sum (SHA-256) of where texts and prompts end, and of the tokens of all or of evenly spaced texts."""
        digest = hashlib.sha256(np.stack([self.lengths, self.prompts]).astype("<i8").tobytes())
        every = -(-int(self.lengths.sum()) // _SUMMED)
        chosen = np.arange(0, len(self), max(1, every))
        for piece in np.split(chosen, range(4096, len(chosen), 4096)):
            where = _places(self.starts[piece], self.lengths[piece])
            digest.update(self.tokens[where].astype("<i4").tobytes())
        return digest.hexdigest()


class MappedTokens(np.memmap):
    """Tokens in a file, read where they are needed; whoever unpickles them opens the file again."""

    @classmethod
    def open(cls, path: Path, dtype: np.dtype[Any], count: int, offset: int = 0) -> MappedTokens:
        """So many tokens of a file, from a byte on."""
        return cls(path, dtype, "r", offset, (count,))

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> Any:
        if not isinstance(self.base, mmap.mmap) or self.filename is None:  # a part, or what was computed of it
            return np.asarray(self).__reduce_ex__(protocol)
        return MappedTokens.open, (Path(self.filename), self.dtype, len(self), self.offset)


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each start on, as many as its length says, one after another."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


def concatenated(texts: Sequence[Sequence[int]], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens [all] of texts one after another, where each begins and its length, int64 [n] each.

    Args:
        size: of the vocabulary.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    flat: Iterator[int] = (token for text in texts for token in text)
    return np.fromiter(flat, token_dtype(size), int(lengths.sum())), np.cumsum(lengths) - lengths, lengths


@dataclass(frozen=True)
class CutOff:
    """What was cut off so that texts have a length; how many, and the longest as it was, in tokens less one."""

    texts: int = 0
    prompts: int = 0
    longest: int = 0


def cut_off(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, prompts: np.ndarray, length: int
) -> tuple[Texts, CutOff]:
    """One sample a text; what is longer than `length` loses its end.

    Where nothing would be left to predict, the beginning of the prompt goes instead: as much of the completion is
    kept as fits beside one token of the prompt.

    Args:
        tokens, starts, lengths, prompts: as of `Texts`.
    """
    most = length + 1
    lost = np.where(prompts >= most, prompts + np.minimum(lengths - prompts, length) - most, 0)
    kept = np.minimum(lengths - lost, most)
    found = CutOff(int((lengths > most).sum()), int((lost > 0).sum()), int(lengths.max(initial=1)) - 1)
    return Texts(tokens, starts + lost, kept, prompts - lost, length), found


def blocks(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, prompts: np.ndarray, length: int
) -> tuple[Texts, np.ndarray]:
    """Texts cut into blocks that overlap by one token, so that each token but a text's first is predicted once.

    Args:
        tokens, starts, lengths, prompts: as of `Texts`.

    Returns:
        The blocks; the text that each is of, int64 [blocks]. One in which all is given is left out.
    """
    counts = -(-(lengths - 1) // length)
    owner = np.repeat(np.arange(len(starts)), counts)
    first = _places(np.zeros(len(counts), dtype=np.int64), counts) * length
    own = np.minimum(lengths[owner] - first, length + 1)
    given = np.clip(prompts[owner] - first, 0, own)
    used = given < own
    made = Texts(tokens, (starts[owner] + first)[used], own[used], given[used], length)
    return made, owner[used]
