"""BLEU and NIST as the script mteval-v13a has them: its tokens, whatever the case, and sums over the corpus."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.extras import install
from cutlayer.text_metrics import TextPairs, register

_ORDERS = range(1, 6)  # of NIST; BLEU's are 1 to 4
_BETA = math.log(2) / math.log(1.5) ** 2  # half the score at two thirds of the length


def _sacrebleu() -> Any:
    """The module of sacrebleu's metrics.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module("sacrebleu.metrics")
    except ImportError:
        raise ConfigError("metrics", NO_VALUE, f"BLEU and NIST need sacrebleu: {install('text')}") from None


@register("bleu", _sacrebleu)
def bleu(pairs: TextPairs) -> float:
    """BLEU-4 of the corpus (Papineni et al. 2002), in [0, 1], by sacrebleu.

    The brevity penalty is against the reference nearest in length, the shorter of two. An order without any match has
    its precision smoothed as in mteval-v13a; where no word matches, BLEU is 0.
    """
    most = max(map(len, pairs.references))
    streams = [[group[at] if at < len(group) else None for group in pairs.references] for at in range(most)]
    metric = _sacrebleu().BLEU(tokenize="13a", lowercase=True, smooth_method="exp", force=True)
    return metric.corpus_score(list(pairs.hypotheses), streams).score / 100


@register("nist", _sacrebleu)
def nist(pairs: TextPairs) -> float:
    """NIST-5 of the corpus (Doddington 2002), from 0, as the E2E script with `-p`.

    The length penalty is against the sum over hypotheses of the mean length of their references.
    """
    return _nist(pairs, lambda lengths: math.fsum(sum(each) / len(each) for each in lengths))


@register("nist_mteval", _sacrebleu)
def nist_mteval(pairs: TextPairs) -> float:
    """NIST-5 as the E2E script without `-p`, which runs mteval-v13a in Perl.

    The length penalty is against the length of all references over the mean number of them, so that meanings with more
    references count for more. It is `nist` where hypotheses are no shorter, or all have the same number of references.
    """
    return _nist(pairs, lambda lengths: sum(map(sum, lengths)) * len(lengths) / sum(map(len, lengths)))


def _nist(pairs: TextPairs, reference_length: Callable[[list[list[int]]], float]) -> float:
    texts = pairs.tokenize(_tokens())
    known: Counter[tuple[str, ...]] = Counter()
    for _, references in texts:
        for each in references:
            known.update(_ngrams(each))
            known[()] += len(each)
    gained: list[list[float]] = [[] for _ in _ORDERS]
    for hypothesis, references in texts:
        most = Counter[tuple[str, ...]]()
        for each in references:
            most |= _ngrams(each)
        for ngram, count in (_ngrams(hypothesis) & most).items():
            gained[len(ngram) - 1].append(count * math.log2(known[ngram[:-1]] / known[ngram]))
    lengths = [len(hypothesis) for hypothesis, _ in texts]
    possible = [sum(max(0, length + 1 - order) for length in lengths) for order in _ORDERS]
    information = math.fsum(math.fsum(parts) / number for parts, number in zip(gained, possible, strict=True) if number)
    expected = reference_length([[len(each) for each in references] for _, references in texts])
    if not sum(lengths) or not expected:
        return 0.0
    return information * math.exp(-_BETA * min(0.0, math.log(sum(lengths) / expected)) ** 2)


def _tokens() -> Callable[[str], list[str]]:
    """mteval-v13a's tokens of a text, in lower case."""
    split = _sacrebleu().BLEU(tokenize="13a").tokenizer
    return lambda text: split(text.lower()).split()


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    """How often each n-gram of the five orders is in a text."""
    return Counter(tuple(tokens[at : at + order]) for order in _ORDERS for at in range(len(tokens) + 1 - order))
