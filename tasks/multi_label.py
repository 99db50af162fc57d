"""Several labels that a sample has or has not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from cutlayer.datasets import DatasetInfo
from cutlayer.tasks import Loss, Score, Task, register


def _mean_over_labels(output: Tensor, y: Tensor, smoothing: float) -> Tensor:
    known = (y >= 0).to(output.dtype)
    wanted = y.to(output.dtype).clamp(min=0) * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(output, wanted, reduction="none")
    return (losses * known).sum() / known.sum()


@register("multi_label")
class MultiLabel(Task):
    """The output is logits [b, labels], the targets are 0 or 1, float32 [b, labels].

    The loss is the mean binary cross-entropy over all labels of all samples; accuracy is the share of labels that are
    right, one minus the Hamming loss.
    """

    def loss(self, smoothing: float) -> Loss:
        return partial(_mean_over_labels, smoothing=smoothing)

    def each(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        known, wanted = y >= 0, y.clamp(min=0).to(output.dtype)
        losses = F.binary_cross_entropy_with_logits(output, wanted, reduction="none") * known
        right = ((output > 0) == (y > 0)) & known
        return losses.sum(1), torch.stack([right.sum(1), known.sum(1)], 1)

    def targets(self, info: DatasetInfo, samples: int) -> Tensor:
        return torch.zeros(samples, info.outputs)

    def wrong(self, y: Tensor, info: DatasetInfo) -> str | None:
        if y.dtype != torch.float32 or y.shape[1:] != (info.outputs,):
            kind = str(y.dtype).removeprefix("torch.")
            return f"shape {list(y.shape)} of {kind}; expected float32 [b, {info.outputs}]"
        return None if ((y == 0) | (y == 1)).all() else "values that are neither 0 nor 1"

    def figures(self, score: Score) -> Mapping[str, float]:
        """``exact_acc``, the share of the samples all of whose labels are right."""
        return {"exact_acc": float((score.right == score.asked).double().mean())}
