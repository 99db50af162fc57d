"""Examples of text, a prompt and its completion each: as tokens, in memory or in a file, and as a dataset."""

from __future__ import annotations

import hashlib
import io
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch

from cutlayer.datasets.registry import RawDataset, RawSplit
from cutlayer.datasets.texts import CutOff, blocks, cut_off, token_dtype
from cutlayer.datasets.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# So many characters are made tokens at a time.
_TOGETHER = 1 << 20


Grouped = Literal["named", "by prompt"] | None
"""What makes groups of examples."""


class Example(NamedTuple):
    """A text: its prompt, which is given, its completion, and the names of what it is divided and held together by."""

    prompt: str
    completion: str
    stratum: str
    group: str


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples as tokens: those of the prompt, the end token, those of the completion, the end token.

    The prompt's end token is given too. So a model is to tell the completion's first token from it where there is no
    prompt.

    Attributes:
        tokens: integers [all], those of all one after another; in memory, or a mapped file.
        starts, lengths, prompts: int64 [n] each, see `Texts`.
        keys: int64 [n], one number for one prompt.
        strata, groups: int64 [n] each, numbers of names.
        stratum_names, group_names: the names.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray
    keys: np.ndarray
    strata: np.ndarray
    groups: np.ndarray
    stratum_names: tuple[str, ...]
    group_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.starts)

    def subset(self, chosen: np.ndarray) -> Examples:
        """Those of a mask or of indices, with the same tokens and names."""
        rows = {name: getattr(self, name)[chosen] for name in ("starts", "lengths", "prompts", "keys")}
        return replace(self, **rows, strata=self.strata[chosen], groups=self.groups[chosen])

    def by(self, strata: np.ndarray, names: Sequence[str]) -> Examples:
        """The same examples, divided by something else."""
        return replace(self, strata=strata, stratum_names=tuple(names))


COLUMNS = ("lengths", "prompts", "keys", "strata", "groups")
"""Of `Examples`, what there is for each example; where each starts follows from the lengths."""
assert {*COLUMNS} < {field.name for field in fields(Examples)}


class Columns(NamedTuple):
    """What `write_tokens` finds out of each example, int64 [n] by name, and the names of strata and of groups."""

    values: dict[str, np.ndarray]
    stratum_names: tuple[str, ...]
    group_names: tuple[str, ...]

    def examples(self, tokens: np.ndarray) -> Examples:
        """With the tokens that were written."""
        lengths, prompts, keys, strata, groups = (self.values[name] for name in COLUMNS)
        starts = np.cumsum(lengths) - lengths
        return Examples(tokens, starts, lengths, prompts, keys, strata, groups, self.stratum_names, self.group_names)


def read_examples(rows: Iterable[Example], tokenizer: Tokenizer) -> Examples:
    """Examples as tokens in memory."""
    tokens = io.BytesIO()
    columns = write_tokens(rows, tokenizer, tokens)
    return columns.examples(np.frombuffer(tokens.getvalue(), token_dtype(tokenizer.size)))


def write_tokens(rows: Iterable[Example], tokenizer: Tokenizer, file: BinaryIO) -> Columns:
    """Write the tokens of examples one after another, a few at a time, in the smallest integers that hold them."""
    dtype = token_dtype(tokenizer.size)
    columns = {name: array("q") for name in COLUMNS}
    strata: dict[str, int] = {}
    groups: dict[str, int] = {}
    for several in _several(rows):
        encoded = tokenizer.encode_all([row.prompt for row in several] + [row.completion for row in several])
        for row, prompt, completion in zip(several, encoded, encoded[len(several) :], strict=False):
            own = np.full(len(prompt) + len(completion) + 2, tokenizer.end, dtype)
            own[: len(prompt)], own[len(prompt) + 1 : -1] = prompt, completion
            file.write(own.tobytes())
            columns["lengths"].append(len(own))
            columns["prompts"].append(len(prompt) + 1)
            digest = hashlib.blake2b(row.prompt.encode(errors="replace"), digest_size=8).digest()
            columns["keys"].append(int.from_bytes(digest, "little", signed=True))
            columns["strata"].append(strata.setdefault(row.stratum, len(strata)))
            columns["groups"].append(groups.setdefault(row.group, len(groups)))
    found = {name: np.array(values, dtype=np.int64) for name, values in columns.items()}
    return Columns(found, tuple(strata), tuple(groups))


def _several(rows: Iterable[Example]) -> Iterator[list[Example]]:
    """The rows, as many at a time as have so many characters."""
    held: list[Example] = []
    characters = 0
    for row in rows:
        held.append(row)
        characters += len(row.prompt) + len(row.completion)
        if characters >= _TOGETHER:
            yield held
            held, characters = [], 0
    if held:
        yield held


def dataset_of(
    train: Examples, test: Examples, tokenizer: Tokenizer, length: int, *, packed: bool, grouped: Grouped
) -> RawDataset:
    """The two sets as samples of up to `length` tokens; classes are the strata that occur, sorted by name.

    What is longer is cut into blocks with `packed`, and cut off without, which is counted in one line of the log.

    Args:
        grouped: groups are those of the examples, or the examples of one prompt, or there are none.
    """
    both = (train, test)
    names, labels = _renumbered([(each.stratum_names, each.strata) for each in both])
    groups: list[np.ndarray] | None = None
    if grouped == "named":
        groups = _renumbered([(each.group_names, each.groups) for each in both])[1]
    elif grouped == "by prompt":
        number = np.unique(np.concatenate([each.keys for each in both]), return_inverse=True)[1]
        groups = np.split(number.astype(np.int64), [len(train)])
    splits: list[RawSplit] = []
    cuts: list[CutOff] = []
    for at, each in enumerate(both):
        arrays = (each.tokens, each.starts, each.lengths, each.prompts)
        if packed:
            texts, owner = blocks(*arrays, length)
        else:
            texts, cut = cut_off(*arrays, length)
            owner = np.arange(len(each))
            cuts.append(cut)
        own = None if groups is None else groups[at][owner]
        splits.append(RawSplit(texts, torch.from_numpy(labels[at][owner]), own))
    _report(cuts, len(train) + len(test), length)
    return RawDataset(splits[0], splits[1], tuple(names), task="causal_lm", outputs=tokenizer.size, tokenizer=tokenizer)


def _renumbered(several: Sequence[tuple[Sequence[str], np.ndarray]]) -> tuple[list[str], list[np.ndarray]]:
    """The names that occur in any of the arrays, sorted, and the arrays by these: int64 each."""
    names = sorted({own[int(number)] for own, numbers in several for number in np.unique(numbers).tolist()})
    return names, [_numbers(own, numbers, names) for own, numbers in several]


def _numbers(names: Sequence[str], own: np.ndarray, sorted_names: Sequence[str]) -> np.ndarray:
    """Numbers of names as numbers of the sorted names, int64."""
    place = {name: number for number, name in enumerate(sorted_names)}
    return np.array([place.get(name, -1) for name in names], dtype=np.int64)[own]


def _report(cuts: Sequence[CutOff], texts: int, length: int) -> None:
    found = sum(cut.texts for cut in cuts)
    if found:
        prompts, longest = sum(cut.prompts for cut in cuts), max(cut.longest for cut in cuts)
        log.warning(
            "texts longer than dataset.options.length=%d are cut: %s of %s, of them %s at the beginning of the prompt, "
            "where nothing would be left to predict; the longest has %s tokens",
            *(length, f"{found:,}", f"{texts:,}", f"{prompts:,}", f"{longest:,}"),
        )
