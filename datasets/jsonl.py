"""Text of one's own: files of JSON lines, each with a completion and, if so wished, a prompt and a client."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from cutlayer.datasets.examples import Example, Examples, dataset_of
from cutlayer.datasets.registry import RawDataset, ReadContext, register
from cutlayer.datasets.splitting import fixed_test
from cutlayer.datasets.token_cache import examples_of
from cutlayer.datasets.tokenizer import BYTES, find_tokenizer
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.text import printable

log = logging.getLogger(__name__)

_OPTION = "dataset.options"


@dataclass(frozen=True)
class JsonlOptions:
    """Which files and fields are read, and how texts become samples.

    Attributes:
        length: tokens of a sample, as many as a model looks at.
        tokenizer: see `cutlayer.datasets.tokenizer`.
        layout: `padded` makes a sample of each text and cuts off what is longer than `length`, `packed` cuts texts into
            as many blocks as they need.
        train, test: files in root; with `test: null`, or a file as root, a part of the training set is held out.
        test_fraction: share of each class that is then held out, texts of one prompt on one side.
        prompt, completion: fields with what is given and what is to be told; null: there is no prompt.
        client: field with whose a text is, which is its group; null: texts of one prompt are a group.
        by: field with the class of a text, by which the distributions divide; null: the client, if there is one.
        empty: whether a text without a completion is refused or left out.
    """

    length: int = 512
    tokenizer: str = BYTES
    layout: Literal["padded", "packed"] = "padded"
    train: str = "train.jsonl"
    test: str | None = "test.jsonl"
    test_fraction: float = 0.1
    prompt: str | None = "prompt"
    completion: str = "completion"
    client: str | None = None
    by: str | None = None
    empty: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError("length", self.length, "an integer >= 1")
        if self.test == self.train:
            raise ConfigError("test", self.test, "another file than train, or null")
        if not 0 < self.test_fraction < 1:
            raise ConfigError("test_fraction", self.test_fraction, "a number > 0 and < 1")


@register("jsonl", JsonlOptions)
def jsonl(context: ReadContext) -> RawDataset:
    """`root/train.jsonl` and `root/test.jsonl`, or one file, which may be root itself."""
    options: JsonlOptions = context.options
    root = context.root
    test = None if root.is_file() else options.test
    files = [root if root.is_file() else root / name for name in (options.train, test) if name is not None]
    otherwise = f", or {_OPTION}.test=null, which holds out {options.test_fraction:.0%} of each class"
    for file, more in zip(files, ("", otherwise), strict=False):
        if not file.is_file():
            raise ConfigError("dataset.root", root, f"a folder with {file.name}{more}")
    tokenizer = find_tokenizer(options.tokenizer)
    how = json.dumps([options.prompt, options.completion, options.client, options.by, options.empty])
    train, *others = (examples_of(file, partial(_rows, file, options), how, tokenizer) for file in files)
    if others:
        (test,) = others
        if shared := 0 if options.prompt is None else int(np.isin(train.keys, test.keys).sum()):
            log.warning("%s texts of %s have a prompt that %s has too", f"{shared:,}", *(each.name for each in files))
    else:
        held = _held(train, options)
        train, test = train.subset(~held), train.subset(held)
    grouped = "named" if options.client is not None else "by prompt" if options.prompt is not None else None
    return dataset_of(train, test, tokenizer, options.length, packed=options.layout == "packed", grouped=grouped)


def _held(train: Examples, options: JsonlOptions) -> np.ndarray:
    """Which texts are the test set: bool [n]."""
    prompts = None if options.prompt is None else np.unique(train.keys, return_inverse=True)[1]
    held = fixed_test(train.strata, options.test_fraction, prompts)
    if not held.any() or held.all():
        expected = f"a share of {len(held):,} texts that leaves some on each side; texts of one prompt are on one"
        raise ConfigError(f"{_OPTION}.test_fraction", options.test_fraction, expected)
    return held


def _rows(file: Path, options: JsonlOptions) -> Iterator[Example]:
    """The texts of a file; raises ConfigError for a line that is not as it should be."""
    skipped = 0
    with file.open("rb") as lines:
        for number, content in enumerate(lines, 1):
            if not content.strip():
                continue
            line = _Line(_parsed(content, file, number), options, f"{file} line {number}")
            completion = line.text("completion")
            if not completion.strip():
                if options.empty == "refuse":
                    raise line.refused("completion", f"text in each line, or {_OPTION}.empty=skip; it is empty")
                skipped += 1
                continue
            prompt = "" if options.prompt is None else line.text("prompt")
            client = "all" if options.client is None else line.name("client")
            yield Example(prompt, completion, client if options.by is None else line.name("by"), client)
    if skipped:
        log.warning("%s: %s texts without a completion are left out", file, f"{skipped:,}")


def _parsed(content: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        expected = f"a JSON object in each line; line {number} is none ({reason})"
        raise ConfigError("dataset.root", file, expected) from None
    if not isinstance(found, dict):
        raise ConfigError("dataset.root", file, f"a JSON object in each line; line {number} is another value")
    return cast(dict[str, Any], found)


@dataclass(frozen=True)
class _Line:
    """The values of a line, by field, and where it is."""

    values: dict[str, Any]
    options: JsonlOptions
    where: str

    def text(self, option: str) -> str:
        """What is in the field that an option names."""
        value = self._value(option)
        if not isinstance(value, str):
            raise self.refused(option, "a field with text; it is another value")
        return value

    def name(self, option: str) -> str:
        """The same of a field with names."""
        value = self._value(option)
        if not isinstance(value, str | int) or value == "":
            raise self.refused(option, "a field with a name or a whole number; it is another value")
        return str(value)

    def _value(self, option: str) -> Any:
        field = getattr(self.options, option)
        if field not in self.values:
            raise self.refused(
                option, f"a field of each line; it has {printable(', '.join(self.values)[:80]) or 'none'}"
            )
        return self.values[field]

    def refused(self, option: str, expected: str) -> ConfigError:
        """The error for the field that an option names."""
        return ConfigError(f"{_OPTION}.{option}", getattr(self.options, option), f"{expected} in {self.where}")
