"""Residual networks: torchvision's with the ImageNet stem, and those that He et al. 2016 train on CIFAR."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from cutlayer.models.layers import GlobalAvgPool, PadShortcut
from cutlayer.models.registry import register
from cutlayer.models.residual import Block, initialise, stage
from cutlayer.runtime.ground.config import ConfigError

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo


def _check_width(width: int) -> None:
    if width < 1:
        raise ConfigError("width", width, "an integer >= 1")


@dataclass(frozen=True)
class ResNetOptions:
    """`width`: channels of the stem and of the first stage's blocks; each later stage doubles it. `stem`: of ImageNet,
    or `small`, which leaves images their size."""

    width: int = 64
    stem: Literal["imagenet", "small"] = "imagenet"

    def __post_init__(self) -> None:
        _check_width(self.width)


@dataclass(frozen=True)
class CifarResNetOptions:
    """`width`: channels of the stem and of the first stage; the two later stages double it."""

    width: int = 16

    def __post_init__(self) -> None:
        _check_width(self.width)


def resnet(block: type[Block], blocks: tuple[int, ...], info: DatasetInfo, options: ResNetOptions) -> nn.Sequential:
    """He et al. 2016 as torchvision builds it: images [b, channels, h, w] -> logits [b, classes].

    Children, state dict and outputs are those of torchvision's model with the same blocks (for three channels and the
    default width). The stem divides height and width by 4, rounding up, so that any image of at least 1x1 passes; a
    small one, for images of about 32x32, is a 3x3 convolution of stride 1, and has no pool.
    """
    width, small = options.width, options.stem == "small"
    kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
    # No ReLU here works in place: a cut may put it first in the server part, and its input is then a leaf.
    children: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(info.channels, width, kernel, stride, padding, bias=False)),
        ("bn1", nn.BatchNorm2d(width)),
        ("relu", nn.ReLU()),
    ]
    if not small:
        children.append(("maxpool", nn.MaxPool2d(3, stride=2, padding=1)))
    channels = width
    for i, count in enumerate(blocks):
        planes = width * 2**i
        children.append((f"layer{i + 1}", stage(block, channels, planes, count, stride=1 if i == 0 else 2)))
        channels = planes * block.expansion
    children += [("avgpool", GlobalAvgPool()), ("fc", nn.Linear(channels, info.outputs))]
    model = nn.Sequential(OrderedDict(children))
    initialise(model)
    return model


def cifar_resnet(depth: int, info: DatasetInfo, options: CifarResNetOptions) -> nn.Sequential:
    """The networks of He et al. 2016, section 4.2: images [b, channels, h, w] -> logits [b, classes].

    A 3x3 stem and three stages of (depth - 2) / 6 blocks. Shortcuts are option A, without parameters, as the paper says
    of these networks: each then has exactly the depth, width and parameters of its plain counterpart, and the published
    counts come out.
    """
    assert (depth - 2) % 6 == 0, f"depth {depth} is not 6n + 2"
    width, blocks = options.width, (depth - 2) // 6
    children: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(info.channels, width, 3, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(width)),
        ("relu", nn.ReLU()),
    ]
    channels = width
    for i in range(3):
        planes = width * 2**i
        children.append(
            (f"layer{i + 1}", stage(BasicBlock, channels, planes, blocks, 1 if i == 0 else 2, shortcut=_pad_shortcut))
        )
        channels = planes
    children += [("avgpool", GlobalAvgPool()), ("fc", nn.Linear(channels, info.outputs))]
    model = nn.Sequential(OrderedDict(children))
    initialise(model)
    return model


def _pad_shortcut(channels: int, out: int, stride: int) -> nn.Module:
    return PadShortcut(out - channels, stride)


def _register_all() -> None:
    imagenet: dict[int, tuple[type[Block], tuple[int, ...]]] = {
        18: (BasicBlock, (2, 2, 2, 2)),
        50: (Bottleneck, (3, 4, 6, 3)),
        152: (Bottleneck, (3, 8, 36, 3)),
    }
    for depth, (block, blocks) in imagenet.items():
        register(
            f"resnet{depth}",
            cut="layer2",
            options=ResNetOptions,
            blocks=("layer1", "layer2", "layer3"),
        )(partial(resnet, block, blocks))
    for depth in (20, 32, 56, 110, 1202):
        register(
            f"resnet{depth}",
            cut="layer1",
            options=CifarResNetOptions,
            blocks=("layer1", "layer2"),
        )(partial(cifar_resnet, depth))


_register_all()
