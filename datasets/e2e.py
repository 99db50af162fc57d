"""The E2E data: restaurants, each described by attributes (the meaning) and by several sentences of people."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cutlayer.datasets.examples import Example, Examples, dataset_of, read_examples
from cutlayer.datasets.registry import RawDataset, ReadContext, register
from cutlayer.datasets.splitting import fixed_test
from cutlayer.datasets.tokenizer import BYTES, Tokenizer, find_tokenizer
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.text import printable

log = logging.getLogger(__name__)

_Part = Literal["train", "valid", "test"]
# Each set as LoRA's code has it, a meaning and a sentence with || between, and as it was published.
_FILES: dict[str, tuple[str, str]] = {
    "train": ("train.txt", "trainset.csv"),
    "valid": ("valid.txt", "devset.csv"),
    "test": ("test.txt", "testset_w_refs.csv"),
}
# What the published files call an attribute, and what LoRA's do.
_SPELLED = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_FIELDS = {
    "restaurant": "name",
    "type": "Type",
    "food": "food",
    "price": "price",
    "rating": "customer rating",
    "area": "area",
    "family": "family friendly",
    "near": "near",
}


@dataclass(frozen=True)
class E2eOptions:
    """Which of the files are read, and how.

    Attributes:
        length: tokens of a sample, as many as a model looks at; what is longer is cut off.
        tokenizer: see `cutlayer.datasets.tokenizer`.
        by: what the classes are, by which the distributions divide: an attribute, or quarters by the sentence's length.
        train, test: sets to train and to test on; with `test: null` meanings of the training set are held out.
        test_fraction: share of each restaurant's sentences that is then held out.
        restaurants: names of those to take, null takes all.
    """

    length: int = 512
    tokenizer: str = BYTES
    by: Literal["restaurant", "type", "food", "price", "rating", "area", "family", "near", "length"] = "restaurant"
    train: _Part = "train"
    test: _Part | None = "test"
    test_fraction: float = 0.2
    restaurants: list[str] | None = None

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError("length", self.length, "an integer >= 1")
        if self.test == self.train:
            raise ConfigError("test", self.test, "another set than train, or null")
        if not 0 < self.test_fraction < 1:
            raise ConfigError("test_fraction", self.test_fraction, "a number > 0 and < 1")
        if self.restaurants == []:
            raise ConfigError("restaurants", [], "null, or names of restaurants")


@register("e2e", E2eOptions)
def e2e(context: ReadContext) -> RawDataset:
    """Sentences about restaurants, to be told from their attributes; a restaurant is a group.

    No meaning is on both sides: sentences to train on whose meaning is tested are left out, and said.
    """
    options: E2eOptions = context.options
    folder = _folder(context.root)
    tokenizer = find_tokenizer(options.tokenizer)
    names = (options.train,) if options.test is None else (options.train, options.test)
    train, *others = (_read(folder, name, options, tokenizer) for name in names)
    if options.test is None:
        held = fixed_test(train.groups, options.test_fraction, np.unique(train.keys, return_inverse=True)[1])
        train, test = train.subset(~held), train.subset(held)
    else:
        (test,) = others
        shared = np.isin(train.keys, test.keys)
        if shared.any():
            log.warning("%s sentences are not trained on, as their meaning is tested", f"{int(shared.sum()):,}")
        train = train.subset(~shared)
    if options.by == "length":
        train, test = _by_length(train, test)
    return dataset_of(train, test, tokenizer, options.length, packed=False, grouped="named")


def _folder(root: Path) -> Path:
    """root/e2e, or root itself where files are there."""
    return root if any((root / file).exists() for files in _FILES.values() for file in files) else root / "e2e"


def _read(folder: Path, part: str, options: E2eOptions, tokenizer: Tokenizer) -> Examples:
    """The examples of a set, divided by an attribute."""
    file = next((folder / name for name in _FILES[part] if (folder / name).is_file()), None)
    if file is None:
        raise ConfigError("dataset.root", folder, _lacking(folder, part))
    there: set[str] = set()
    found = read_examples(_rows(file, options, there), tokenizer)
    lacking = sorted({*(options.restaurants or ())} - there)
    if part == options.train and lacking:
        raise ConfigError("dataset.options.restaurants", lacking[0], f"a restaurant in {file.name}", sorted(there))
    if not len(found):
        expected = f"a restaurant in {file.name}, to test on"
        raise ConfigError("dataset.options.restaurants", options.restaurants, expected, sorted(there))
    return found


def _lacking(folder: Path, part: str) -> str:
    """What is not there, and what is."""
    there = {name: file for name, files in _FILES.items() for file in files if (folder / file).is_file()}
    text = f"a folder with {' or '.join(_FILES[part])}"
    if not there:
        return text
    has = ", ".join(there.values())
    only = next(iter(there))
    return f"{text}; it has {has}: dataset.options.train={only} dataset.options.test=null divides that by meaning"


def _rows(file: Path, options: E2eOptions, there: set[str]) -> Iterator[Example]:
    """The examples of the restaurants that are taken; the names of all become `there`."""
    pairs = _published(file) if file.suffix == ".csv" else _spaced(file)
    for line, meaning, sentence in pairs:
        prompt = " | ".join(f"{name} : {value}" for name, value in meaning.items())
        if not sentence or "name" not in meaning:
            what = "a sentence" if "name" in meaning else "a name"
            raise ConfigError("dataset.root", file, f"{what} in each line; line {line} has none")
        there.add(meaning["name"])
        if options.restaurants is not None and meaning["name"] not in options.restaurants:
            continue
        attribute = _FIELDS.get(options.by, "name")
        # The space is as within a text, where most tokenizers have a word's tokens with the space before it.
        yield Example(prompt, f" {sentence}", meaning.get(attribute, f"no {attribute}"), meaning["name"])


def _spaced(file: Path) -> Iterator[tuple[int, dict[str, str], str]]:
    """Lines such as `name : Aromi | area : riverside||Aromi is at the river .`: number, attributes, sentence."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            meaning, mark, sentence = line.partition("||")
            pairs = [pair.partition(" : ") for pair in meaning.split("|")]
            if not mark or not all(between for _, between, _ in pairs):
                expected = (
                    f"lines such as `name : Aromi | area : riverside||Aromi is at the river .`; not line {number}"
                )
                raise ConfigError("dataset.root", file, expected)
            yield number, {name.strip(): value.strip() for name, _, value in pairs}, sentence.strip()


def _published(file: Path) -> Iterator[tuple[int, dict[str, str], str]]:
    """Rows with columns mr, such as `name[Aromi], area[riverside]`, and ref: line, attributes, sentence."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = csv.DictReader(lines)
        try:
            if not {"mr", "ref"} <= {*(rows.fieldnames or ())}:
                has = printable(", ".join(rows.fieldnames or ())[:80])
                raise ConfigError("dataset.root", file, f"a table with columns mr and ref; it has {has or 'none'}")
            for row in rows:
                meaning: dict[str, str] = {}
                for attribute in (row["mr"] or "").split("]"):
                    name, mark, value = attribute.strip(" ,").partition("[")
                    if mark:
                        meaning[_SPELLED.get(name.strip(), name.strip())] = value.strip()
                yield rows.line_num, meaning, (row["ref"] or "").strip()
        except csv.Error as error:
            expected = f"a table with commas; line {rows.line_num} is none ({error})"
            raise ConfigError("dataset.root", file, expected) from None


def _by_length(train: Examples, test: Examples) -> tuple[Examples, Examples]:
    """Both divided by the length of the sentence, in quarters of those that are trained on."""
    lengths = train.lengths - train.prompts - 1  # without the token that ends it
    bounds = np.unique(np.quantile(lengths, (0.25, 0.5, 0.75), method="lower"))
    names = [f"up to {bound} tokens" for bound in bounds] + [f"over {bounds[-1]} tokens"]
    numbered = [f"{number}: {name}" for number, name in enumerate(names, 1)]
    one, other = (each.by(np.searchsorted(bounds, each.lengths - each.prompts - 1), numbered) for each in (train, test))
    return one, other
