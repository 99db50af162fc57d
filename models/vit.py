"""The Vision Transformer, of torchvision's blocks, small enough for the images of federated learning."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import vision_transformer as torchvision_vit

from cutlayer.models.layers import check_transformer
from cutlayer.models.registry import register

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

_EPS = 1e-6  # of every layer normalisation, torchvision's


class Patches(nn.Module):
    """Images as tokens: [b, channels, h, w] -> [b, 1 + patches, hidden], the class token first, positions added.

    Images whose sides are no multiple of the patch are filled up with zeros on the right and below.
    """

    def __init__(self, info: DatasetInfo, patch: int, hidden: int, dropout: float) -> None:
        super().__init__()
        rows, columns = ceil(info.height / patch), ceil(info.width / patch)
        self.fill = (0, columns * patch - info.width, 0, rows * patch - info.height)
        self.conv = nn.Conv2d(info.channels, hidden, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, hidden))
        self.position = nn.Parameter(torch.empty(1, 1 + rows * columns, hidden).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        nn.init.trunc_normal_(self.conv.weight, std=(info.channels * patch**2) ** -0.5)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv(F.pad(x, self.fill)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1)
        return self.dropout(tokens + self.position)


class TransformerBlock(torchvision_vit.EncoderBlock):
    """torchvision's block, [b, tokens, hidden] -> same shape, with attention of plain matrix products.

    torch's fused attention has no second derivative, which gradient alignment needs, and is not deterministic on CUDA.
    """

    def __init__(self, heads: int, hidden: int, mlp: int, dropout: float) -> None:
        super().__init__(heads, hidden, mlp, dropout, attention_dropout=dropout)

    def forward(self, input: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(input)


class ClassToken(nn.Module):
    """The first token: [b, tokens, hidden] -> [b, hidden]."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


@dataclass(frozen=True)
class VitOptions:
    """`patch`: pixels a side; `hidden`: width of a token; `heads`: of attention, a divisor of `hidden`; `mlp`: width of
    the hidden layer in a block; `depth`: blocks; `dropout`: its probability, in attention and everywhere else."""

    patch: int = 4
    hidden: int = 64
    heads: int = 4
    mlp: int = 256
    depth: int = 12
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_transformer(self, "patch", "hidden", "heads", "mlp", "depth")


def _quarters(options: VitOptions) -> tuple[str, ...]:
    """The blocks at a quarter, a half and three quarters of the depth."""
    return tuple(dict.fromkeys(f"block{max(1, options.depth * quarter // 4)}" for quarter in (1, 2, 3)))


@register(
    "vit",
    cut="block3",
    options=VitOptions,
    blocks=_quarters,
    cuts=lambda options: ("patches", f"block{options.depth}"),
    variants=({"depth": 1},),
)
def vit(info: DatasetInfo, options: VitOptions) -> nn.Sequential:
    """Dosovitskiy et al. 2021, with a class token: images [b, channels, h, w] -> logits [b, classes].

    For the same weights the outputs are those of torchvision's `VisionTransformer`. Weights start as there but for the
    classifier, which starts as any linear layer: at zero, torchvision's choice for fine-tuning, nothing before it would
    learn from the first step. Attention takes memory with the square of the number of patches: for images of more than
    64 pixels `patch` should grow with them.
    """
    widths = (options.heads, options.hidden, options.mlp, options.dropout)
    children: list[tuple[str, nn.Module]] = [("patches", Patches(info, options.patch, options.hidden, options.dropout))]
    children += [(f"block{i}", TransformerBlock(*widths)) for i in range(1, options.depth + 1)]
    children += [
        ("norm", nn.LayerNorm(options.hidden, eps=_EPS)),
        ("token", ClassToken()),
        ("fc", nn.Linear(options.hidden, info.outputs)),
    ]
    return nn.Sequential(OrderedDict(children))
