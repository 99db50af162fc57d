"""MobileNet as it is trained on CIFAR: depthwise-separable blocks after a stem that does not shrink the image."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from cutlayer.models.layers import GlobalAvgPool
from cutlayer.models.registry import register
from cutlayer.runtime.ground.config import ConfigError

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

# Of each block: channels as a multiple of the stem's, and stride (Howard et al. 2017, table 1).
_BLOCKS = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *[(16, 1)] * 5, (32, 2), (32, 1))


class SeparableBlock(nn.Sequential):
    """A 3x3 convolution of each channel by itself, then a 1x1 across channels, each with BatchNorm and ReLU.

    [b, channels, h, w] -> [b, out, h / stride, w / stride], sides rounded up.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        super().__init__(
            OrderedDict(
                depthwise=depthwise,
                bn1=nn.BatchNorm2d(channels),
                relu1=nn.ReLU(),
                pointwise=nn.Conv2d(channels, out, 1, bias=False),
                bn2=nn.BatchNorm2d(out),
                relu2=nn.ReLU(),
            )
        )


@dataclass(frozen=True)
class MobileNetOptions:
    """`width`: channels of the stem, to which all others are in proportion; 8, 16 and 24 are the paper's multipliers
    0.25, 0.5 and 0.75. `head_bias`: whether the classifier has a bias."""

    width: int = 32
    head_bias: bool = True

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError("width", self.width, "an integer >= 1")


@register(
    "mobilenet_cifar",
    cut="block5",
    options=MobileNetOptions,
    blocks=("block4", "block7", "block10"),
)
def mobilenet_cifar(info: DatasetInfo, options: MobileNetOptions) -> nn.Sequential:
    """Howard et al. 2017 with a stem of stride 1: images [b, channels, h, w] -> logits [b, classes].

    The paper's 13 blocks, of which four halve the sides, rounding up, so that any image of at least 1x1 passes. The
    paper's stem halves them too, for images of 224 pixels. Weights start as torch's own: the paper does not say.
    """
    width = channels = options.width
    children: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(info.channels, width, 3, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(width)),
        ("relu", nn.ReLU()),
    ]
    for i, (multiple, stride) in enumerate(_BLOCKS, start=1):
        children.append((f"block{i}", SeparableBlock(channels, width * multiple, stride)))
        channels = width * multiple
    children += [("avgpool", GlobalAvgPool()), ("fc", nn.Linear(channels, info.outputs, bias=options.head_bias))]
    return nn.Sequential(OrderedDict(children))
