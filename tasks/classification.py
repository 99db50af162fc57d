"""One class for each sample."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from cutlayer.tasks import IGNORED, Loss, Task, register


@register("classification")
class Classification(Task):
    """The output is logits [b, classes], the targets are classes, int64 [b]; the loss is cross-entropy."""

    def loss(self, smoothing: float) -> Loss:
        return partial(F.cross_entropy, label_smoothing=smoothing) if smoothing else F.cross_entropy

    def each(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(output, y, reduction="none")
        predicted = output.argmax(1)
        return losses, torch.stack([predicted == y, y != IGNORED, predicted], 1)
