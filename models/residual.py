"""What the residual networks are made of: stages of torchvision's own blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

Block = BasicBlock | Bottleneck
Shortcut = Callable[[int, int, int], nn.Module]


def projection(channels: int, out: int, stride: int) -> nn.Module:
    """A 1x1 convolution with BatchNorm (option B of He et al. 2016), torchvision's shortcut."""
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


def stage(
    block: type[Block], channels: int, planes: int, blocks: int, stride: int, shortcut: Shortcut = projection
) -> nn.Sequential:
    """`blocks` blocks: [b, channels, h, w] -> [b, planes * block.expansion, h / stride, w / stride], sides rounded up.

    Built in torchvision's order, so that the same seed gives the weights that torchvision's own constructor gives.
    """
    out = planes * block.expansion
    down = shortcut(channels, out, stride) if stride != 1 or channels != out else None
    first = block(channels, planes, stride, down)
    return nn.Sequential(first, *(block(out, planes) for _ in range(1, blocks)))


def initialise(model: nn.Module) -> None:
    """He initialisation of every convolution in place, as torchvision does it: normal, fan-out, global generator."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
