"""Accuracy by class, for data with rare ones."""

import torch

from cutlayer.datasets import DatasetInfo
from cutlayer.evaluations import register
from cutlayer.tasks import Score

_MOST = 200


@register("class_acc")
def class_acc(score: Score, info: DatasetInfo) -> dict[str, float]:
    """Accuracy on the samples of each class (of up to 200), their mean, which is the balanced accuracy, and the worst.

    Of the classes that samples were tested of.
    """
    right, asked = (
        torch.zeros(info.classes, dtype=torch.int64).index_add(0, score.labels, each)
        for each in (score.right, score.asked)
    )
    present = asked.nonzero().flatten()
    shares = right[present].double() / asked[present]
    found = {"mean": float(shares.mean()), "worst": float(shares.min())}
    if info.classes <= _MOST:
        found |= {str(int(label)): float(share) for label, share in zip(present, shares, strict=True)}
    return found
