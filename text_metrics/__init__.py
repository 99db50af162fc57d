"""The registry of text metrics: what generated text is worth against several references for each meaning.

Every module of this package is imported, so that a new file registers itself. `score` computes them.
"""

from __future__ import annotations

if __name__ != "cutlayer.text_metrics":
    from cutlayer.names import refuse

    refuse(__name__)

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.registry import Registry, import_modules
from cutlayer.text_metrics.captions import caption_tokens


class Tokenized(NamedTuple):
    """Tokens of one hypothesis, and of each of its references."""

    hypothesis: list[str]
    references: list[list[str]]


@dataclass(frozen=True)
class TextPairs:
    """Hypotheses with the references of each.

    hypotheses: [n] texts. references: [n] lists of one text or more, as many as there are for each.

    Raises:
        ConfigError: there are none, their numbers differ, or a hypothesis has no reference.
    """

    hypotheses: Sequence[str]
    references: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        if len(self.hypotheses) != len(self.references):
            given = f"{len(self.hypotheses)} texts for {len(self.references)} groups of references"
            raise ConfigError("hypotheses", NO_VALUE, f"{given}; expected one text for each group")
        if not self.hypotheses:
            raise ConfigError("hypotheses", NO_VALUE, "there are none")
        for number, group in enumerate(self.references, 1):
            if not group:
                raise ConfigError("references", NO_VALUE, f"group {number} is empty; expected a text or more in each")

    def tokenize(self, tokens: Callable[[str], list[str]]) -> list[Tokenized]:
        """All texts as tokens, [n]."""
        pairs = zip(self.hypotheses, self.references, strict=True)
        return [Tokenized(tokens(text), [tokens(each) for each in group]) for text, group in pairs]

    @cached_property
    def captions(self) -> list[Tokenized]:
        """Tokens as the caption metrics have them, [n]."""
        return self.tokenize(caption_tokens)


Compute = Callable[[TextPairs], float]
"""Gives the figure over all hypotheses; more is better."""


class TextMetric(NamedTuple):
    """What the registry knows of a metric: the function, and what says in one line, as a ConfigError, what it lacks."""

    compute: Compute
    require: Callable[[], object] | None


TEXT_METRICS: Registry[TextMetric] = Registry("text metric")


USUAL = ("bleu", "nist", "rouge_l", "cider")
"""The metrics in which papers on E2E report, but for METEOR, which needs Java."""


def register(name: str, require: Callable[[], object] | None = None) -> Callable[[Compute], Compute]:
    """Register the decorated function as metric `name`.

    Args:
        require: raises a `ConfigError` where a package or a program is missing that the metric needs.
    """

    def add(compute: Compute) -> Compute:
        TEXT_METRICS.add(name, TextMetric(compute, require))
        return compute

    return add


def check_metrics(names: Iterable[str]) -> None:
    """Say before any text is generated what would be in the way of `score`.

    Raises:
        ConfigError: a name is no metric's, or a metric lacks a package or a program.
    """
    for name in names:
        metric = TEXT_METRICS.find(name, "metrics")
        if metric.require is not None:
            metric.require()


def score(names: Iterable[str], hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The metrics of these names, over all hypotheses, on the scales of the E2E script: BLEU, ROUGE-L and METEOR to 1.

    Args:
        names: of registered metrics. hypotheses: [n] texts, raw. references: [n] lists of texts, at least one in each.

    Raises:
        ConfigError: as `check_metrics` and `TextPairs` say.
    """
    names = tuple(names)
    check_metrics(names)
    pairs = TextPairs(hypotheses, references)
    return {name: TEXT_METRICS[name].compute(pairs) for name in names}


import_modules(__name__, __path__)
