"""The prompts of a test set of texts, each once, with all that people have said to it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cutlayer.datasets import Dataset
from cutlayer.datasets.text_source import TextSource
from cutlayer.datasets.texts import Texts
from cutlayer.datasets.tokenizer import Tokenizer
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompts:
    """Prompts as tokens, in the order in which the test set first has them, and the references of each, as texts.

    Attributes:
        cut: how many references lack their end, as they were longer than a sample may be.
    """

    tokens: list[list[int]]
    references: list[list[str]]
    cut: int


def prompts_of(dataset: Dataset, count: int | None) -> Prompts:
    """The different prompts of the test set, or ``count`` of them, evenly spaced.

    Raises:
        ConfigError: prompts have lost their beginning.
    """
    texts, end = texts_of(dataset), tokenizer_of(dataset).end
    groups: dict[tuple[int, ...], list[int]] = {}
    for at in texts.prompts.nonzero()[0].tolist():
        groups.setdefault(tuple(texts.prompt(at)), []).append(at)
    lost = [at for found in groups.values() for at in found if not _is_whole(texts, at, end)]
    if lost:
        few = f"{len(lost):,} of {len(texts):,} test texts lack the beginning of their prompt"
        raise ConfigError("dataset.options.length", texts.length, f"a length that prompts fit in; {few}")
    chosen = [*groups]
    if count is not None and count < len(chosen):
        chosen = [chosen[at * len(chosen) // count] for at in range(count)]
    return _with_references(dataset, texts, {prompt: groups[prompt] for prompt in chosen})


def _with_references(dataset: Dataset, texts: Texts, groups: dict[tuple[int, ...], list[int]]) -> Prompts:
    tokenizer = tokenizer_of(dataset)
    found, cut = Prompts([], [], 0), 0
    for prompt, members in groups.items():
        completions = [texts.completion(at) for at in members]
        references = [text for each in completions if (text := text_line(tokenizer.decode(each)))]
        if references:
            found.tokens.append([*prompt])
            found.references.append(references)
            cut += sum(each[-1] != tokenizer.end for each in completions)
    if len(found.tokens) < len(groups):
        log.warning("%s prompts are left out, as nothing but space follows them", len(groups) - len(found.tokens))
    if cut:
        log.warning("%s references lack their end, by dataset.options.length=%d", f"{cut:,}", texts.length)
    return Prompts(found.tokens, found.references, cut)


def own_prompt(dataset: Dataset, text: str) -> list[int]:
    """The tokens of a text to go on with, as the data have it before what a model is to say."""
    tokenizer, texts = tokenizer_of(dataset), texts_of(dataset)
    tokens = tokenizer.encode(text)
    if has_prompts(texts):
        return [*tokens, tokenizer.end]
    return [*texts.prompt(0), *tokens]  # an end token, where texts are samples of their own


def has_prompts(texts: Texts) -> bool:
    """Whether something is given before a model is to say something, other than the end of the text before."""
    return int(texts.prompts.max(initial=0)) > 1


def check_prompts(texts: Texts, dataset: str) -> None:
    """Raise ConfigError for texts of a dataset, by its name, without prompts."""
    if not has_prompts(texts):
        expected = f"the beginning of a text, as those of {dataset} have no prompts"
        raise ConfigError("generate.prompt", None, expected)


def texts_of(dataset: Dataset) -> Texts:
    """The texts of the test set.

    Raises:
        ConfigError: it has none.
    """
    if not isinstance(dataset.test, TextSource) or dataset.tokenizer is None:
        expected = f"a run on text; that of {dataset.info.name} is {dataset.info.task}"
        raise ConfigError("dataset.name", NO_VALUE, expected)
    return dataset.test.texts


def tokenizer_of(dataset: Dataset) -> Tokenizer:
    """The tokenizer of a dataset of texts."""
    assert dataset.tokenizer is not None
    return dataset.tokenizer


def text_line(text: str) -> str:
    """A text on one line, without needless space, as files of texts have it."""
    return " ".join(text.replace("\ufeff", "").split())


def _is_whole(texts: Texts, at: int, end: int) -> bool:
    """Whether a text has the beginning of its prompt: before it there is nothing, or the end of another."""
    start = int(texts.starts[at])
    return start == 0 or int(texts.tokens[start - 1]) == end
