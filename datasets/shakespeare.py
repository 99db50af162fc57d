"""Four plays of Shakespeare, by role: text that comes with the code."""

import json
import logging
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cutlayer.datasets.registry import RawDataset, RawSplit, ReadContext, register
from cutlayer.datasets.texts import blocks, concatenated
from cutlayer.datasets.tokenizer import BYTES, Tokenizer, find_tokenizer
from cutlayer.runtime.ground.config import ConfigError

log = logging.getLogger(__name__)

# What each role says, speeches with an empty line between, by play: {play: {role: text}}. Of the public domain, from
# the texts that the package shakespeare 0.6 has of Project Gutenberg, without stage directions.
_FILE = Path(__file__).parent / "shakespeare.json.xz"
_TEST_SHARE = 0.1
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class ShakespeareOptions:
    """Which roles, and how they are cut into samples.

    Attributes:
        length: tokens of a sample, as many as a model looks at; text is cut into blocks of so many.
        tokenizer: see `cutlayer.datasets.tokenizer`; bytes need no files.
        by: what the classes are, by which the distributions divide.
        least: characters that a role has to say to be among them.
        plays, roles: names of those to take, null takes all; a role as "Macbeth" or, where several plays have one of
            that name, "Othello: Clown".
    """

    length: int = 128
    tokenizer: str = BYTES
    by: Literal["play", "role"] = "play"
    least: int = 2000
    plays: list[str] | None = None
    roles: list[str] | None = None

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError("length", self.length, "an integer >= 1")
        if self.least < 0:
            raise ConfigError("least", self.least, "an integer >= 0")
        for key in ("plays", "roles"):
            names = getattr(self, key)
            if names is not None and len({*names}) < max(1, len(names)):
                raise ConfigError(key, names, "null, or names that are each given once")


@register("shakespeare", ShakespeareOptions)
def shakespeare(context: ReadContext) -> RawDataset:
    """What the roles of Macbeth, Othello, Romeo and Juliet and Twelfth Night say; a role is a group.

    The test set is the end of what each role says, of whole speeches at least a tenth of it.
    """
    options: ShakespeareOptions = context.options
    tokenizer = find_tokenizer(options.tokenizer)
    said = _chosen(_plays(), options)
    plays = sorted({play for play, _ in said})
    names = tuple(plays) if options.by == "play" else tuple(map(_full, said))
    labels = np.array([plays.index(play) for play, _ in said] if options.by == "play" else range(len(said)))
    divided = [_divided(text, tokenizer) for text in said.values()]
    train, test = (
        _split([each[part] for each in divided], labels.astype(np.int64), tokenizer, options.length) for part in (0, 1)
    )
    for part, groups in (("training", train.groups), ("test", test.groups)):
        assert groups is not None
        lacking = sorted({*range(len(said))} - {*groups.tolist()})
        if lacking:
            expected = f"roles with {part} text; {_full([*said][lacking[0]])} has too little"
            raise ConfigError("dataset.options.least", options.least, expected)
    return RawDataset(train, test, names, task="causal_lm", outputs=tokenizer.size, tokenizer=tokenizer)


_Role = tuple[str, str]
"""A play and one of its roles."""


def _plays() -> dict[_Role, str]:
    """What each role of each play says."""
    found: dict[str, dict[str, str]] = json.loads(lzma.decompress(_FILE.read_bytes()))
    return {(play, role): text for play, roles in found.items() for role, text in roles.items()}


def _full(role: _Role) -> str:
    return ": ".join(role)


def _chosen(said: dict[_Role, str], options: ShakespeareOptions) -> dict[_Role, str]:
    """Those that the options name, sorted."""
    plays = sorted({play for play, _ in said})
    for play in options.plays or ():
        if play not in plays:
            raise ConfigError("dataset.options.plays", play, "a play", plays)
    said = {role: said[role] for role in sorted(said) if options.plays is None or role[0] in options.plays}
    if options.roles is None:
        return {role: text for role, text in said.items() if len(text) >= options.least}
    found: dict[_Role, str] = {}
    for name in options.roles:
        own = [role for role in said if name in (role[1], _full(role))]
        if len(own) != 1 or len(said[own[0]]) < options.least:
            enough = [_full(role) for role, text in said.items() if len(text) >= options.least]
            expected = f"a role that has {options.least} characters of text or more"
            raise ConfigError("dataset.options.roles", name, expected, map(_full, own) if len(own) > 1 else enough)
        found[own[0]] = said[own[0]]
    return {role: found[role] for role in sorted(found)}


def _divided(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens to train on and those to test on."""
    speeches = text.split(_BETWEEN)
    held, first = 0, len(speeches)
    while first > 1 and held < _TEST_SHARE * len(text):
        first -= 1
        held += len(speeches[first]) + len(_BETWEEN)
    train, test = (_BETWEEN.join(each) for each in (speeches[:first], speeches[first:]))
    return tokenizer.encode(train), tokenizer.encode(test)


def _split(texts: list[list[int]], labels: np.ndarray, tokenizer: Tokenizer, length: int) -> RawSplit:
    """Blocks of what each role says; the role is the group."""
    tokens, starts, lengths = concatenated(texts, tokenizer.size)
    cut, owner = blocks(tokens, starts, lengths, np.zeros_like(starts), length)
    return RawSplit(cut, torch.from_numpy(labels[owner]), owner)
