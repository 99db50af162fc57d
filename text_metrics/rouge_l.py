"""ROUGE-L as MS COCO's evaluation has it."""

import math
from collections.abc import Sequence

from cutlayer.text_metrics import TextPairs, register

_BETA = 1.2


@register("rouge_l")
def rouge_l(pairs: TextPairs) -> float:
    """ROUGE-L (Lin 2004), in [0, 1]: the mean over hypotheses of the F measure of the longest common subsequence.

    Recall weighs beta^2 = 1.44 times as much as precision. Of several references precision and recall are the highest
    that there are, each for itself, so not always of the same one.
    """
    return math.fsum(_f_measure(*each) for each in pairs.captions) / len(pairs.captions)


def _f_measure(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    common = [(common_length(hypothesis, reference), len(reference)) for reference in references]
    longest = max(length for length, _ in common)
    if not longest:
        return 0.0
    precision = longest / len(hypothesis)
    recall = max(length / whole for length, whole in common if whole)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def common_length(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    A row of the table of dynamic programming is a whole number, a bit for each token of `left` (Hyyrö 2004): 0 where
    the row is one more than to the left.
    """
    places: dict[str, int] = {}
    for at, token in enumerate(left):
        places[token] = places.get(token, 0) | 1 << at
    row = (1 << len(left)) - 1
    for token in right:
        matches = row & places.get(token, 0)
        row = (row + matches) | (row - matches)
    return len(left) - (row & ((1 << len(left)) - 1)).bit_count()
