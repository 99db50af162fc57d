"""The next token, at each place of a sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from cutlayer.datasets import DatasetInfo
from cutlayer.tasks import IGNORED, Loss, Score, Task, register


def _mean_over_tokens(output: Tensor, y: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), y.flatten(), label_smoothing=smoothing)


@register("causal_lm")
class CausalLM(Task):
    """The output is logits [b, l, tokens], the targets are the tokens that follow, int64 [b, l].

    Targets are shifted already: the one at a place is the token after it. The loss is the mean cross-entropy of the
    tokens that are predicted; in a batch a long sequence counts more than a short one.
    """

    sequential = True

    def loss(self, smoothing: float) -> Loss:
        return partial(_mean_over_tokens, smoothing=smoothing)

    def each(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="none").view(y.shape).sum(1)
        return losses, torch.stack([(output.argmax(-1) == y).sum(1), (y != IGNORED).sum(1)], 1)

    def output_shape(self, info: DatasetInfo, samples: int) -> tuple[int, ...]:
        return samples, info.length, info.outputs

    def targets(self, info: DatasetInfo, samples: int) -> Tensor:
        return torch.zeros(samples, info.length, dtype=torch.int64)

    def wrong(self, y: Tensor, info: DatasetInfo) -> str | None:
        if y.dtype == torch.int64 and y.dim() == 2 and y.shape[1] <= info.length:
            return super().wrong(y[y != IGNORED], info)
        return f"shape {list(y.shape)} of {str(y.dtype).removeprefix('torch.')}; expected int64 [b, <= {info.length}]"

    def figures(self, score: Score) -> Mapping[str, float]:
        """``perplexity``, e to the power of the mean loss of a token."""
        return {"perplexity": math.exp(min(score.loss, 700.0))}
