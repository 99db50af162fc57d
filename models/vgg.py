"""VGG with BatchNorm for small images, and the shallower networks that go between its first and last layers."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

from cutlayer.models.layers import GlobalAvgPool
from cutlayer.models.registry import register
from cutlayer.runtime.ground.config import ConfigError

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

_STEM = 2  # blocks of the first width


@dataclass(frozen=True)
class VggOptions:
    """`width`: channels of the first two blocks; `body`: those of the blocks after them, as multiples of `width`."""

    width: int = 64
    body: tuple[int, ...] = (2, 2, 4, 4, 8, 8, 8, 8)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError("width", self.width, "an integer >= 1")
        if not self.body or min(self.body) < 1:
            raise ConfigError("body", self.body, "a list of one or more integers >= 1")

    @property
    def widths(self) -> list[int]:
        """Channels of each block."""
        return [self.width] * _STEM + [self.width * multiple for multiple in self.body]

    @property
    def pooled(self) -> list[bool]:
        """Of each block whether it ends with a pool: where the next one is wider."""
        return [after > before for before, after in pairwise([*self.widths, self.widths[-1]])]


def _pooled(options: VggOptions) -> tuple[str, ...]:
    """The blocks that end with a pool."""
    return tuple(f"block{i}" for i, pooled in enumerate(options.pooled, start=1) if pooled)


@register(
    "vgg",
    cut=f"block{_STEM}",
    options=VggOptions,
    blocks=_pooled,
    cuts=lambda options: (f"block{_STEM}", f"block{len(options.widths)}"),
    variants=({"body": (2, 4, 8)}, {"body": (2, 4, 4, 8, 8)}),
)
def vgg(info: DatasetInfo, options: VggOptions) -> nn.Sequential:
    """The ten convolutions of VGG-13 (Simonyan & Zisserman 2015, configuration B), each with BatchNorm and ReLU.

    Images [b, channels, h, w] -> logits [b, classes]. A 2x2 max-pool stands where the width grows and nowhere else, so
    that bodies of other depths that grow as often give maps of the same size; the classifier sees the mean over pixels.
    The paper has two pools more, at its last width, for images of 224 pixels, and dense layers of 4096.
    """
    channels, height, width = info.shape
    children: list[tuple[str, nn.Module]] = []
    for i, (out, pooled) in enumerate(zip(options.widths, options.pooled, strict=True), start=1):
        block: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(channels, out, 3, padding=1), bn=nn.BatchNorm2d(out), relu=nn.ReLU()
        )
        if pooled:
            kernel = (min(2, height), min(2, width))  # a side of one pixel is not pooled any further
            block["pool"] = nn.MaxPool2d(kernel)
            height, width = height // kernel[0], width // kernel[1]
        children.append((f"block{i}", nn.Sequential(block)))
        channels = out
    children += [("avgpool", GlobalAvgPool()), ("fc", nn.Linear(channels, info.classes))]
    return nn.Sequential(OrderedDict(children))
