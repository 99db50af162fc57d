"""CIDEr as MS COCO's evaluation has it."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from cutlayer.text_metrics import TextPairs, register

_ORDERS = range(1, 5)
_SIGMA = 6.0

Ngrams = list[dict[tuple[str, ...], float]]
"""For each order the n-grams, with a number of each."""


class Vectors(NamedTuple):
    """TF-IDF of a text's n-grams by order, the norm of each order, and how many words the text has."""

    weights: Ngrams
    norms: list[float]
    length: int


@register("cider")
def cider(pairs: TextPairs) -> float:
    """CIDEr-D (Vedantam et al. 2015), in [0, 10]: the mean over hypotheses.

    The cosine between TF-IDF vectors of n-grams, clipped to the reference's counts, with a Gaussian of the difference
    in length (sigma 6); the mean over orders 1 to 4 and over references, times 10. Document frequencies are those in
    the references: of one hypothesis alone all weights, and so its CIDEr, are 0.
    """
    counts = [(_count(hypothesis), [_count(each) for each in references]) for hypothesis, references in pairs.captions]
    documents: Counter[tuple[str, ...]] = Counter()
    for _, references in counts:
        documents.update({ngram for each in references for order in each for ngram in order})
    rarity = {ngram: math.log(len(counts) / number) for ngram, number in documents.items()}
    found: list[float] = []
    for hypothesis, references in counts:
        own = _vectors(hypothesis, rarity, math.log(len(counts)))
        each = [_similarity(own, _vectors(reference, rarity, 0.0)) for reference in references]
        found.append(math.fsum(each) / len(each))
    return 10 * math.fsum(found) / len(found)


def _count(tokens: Sequence[str]) -> Ngrams:
    return [dict(Counter(zip(*(tokens[at:] for at in range(order)), strict=False))) for order in _ORDERS]


def _vectors(counts: Ngrams, rarity: dict[tuple[str, ...], float], unseen: float) -> Vectors:
    """`unseen` is the inverse document frequency of n-grams that no reference has."""
    weights = [{ngram: count * rarity.get(ngram, unseen) for ngram, count in order.items()} for order in counts]
    norms = [math.sqrt(sum(weight**2 for weight in order.values())) for order in weights]
    return Vectors(weights, norms, int(sum(counts[0].values())))


def _similarity(hypothesis: Vectors, reference: Vectors) -> float:
    """The mean over orders of the clipped cosines, with the Gaussian."""
    total = 0.0
    for at in range(len(_ORDERS)):
        norms = hypothesis.norms[at] * reference.norms[at]
        if norms:
            others = reference.weights[at]
            shared = ((weight, others[ngram]) for ngram, weight in hypothesis.weights[at].items() if ngram in others)
            total += sum(min(weight, other) * other for weight, other in shared) / norms
    gaussian = math.exp(-((hypothesis.length - reference.length) ** 2) / (2 * _SIGMA**2))
    return total * gaussian / len(_ORDERS)
