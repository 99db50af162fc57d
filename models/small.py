"""Small models: three convolutional networks and a perceptron."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod
from typing import TYPE_CHECKING

from torch import nn

from cutlayer.models.layers import LocalResponseNorm
from cutlayer.models.registry import register
from cutlayer.runtime.ground.config import ConfigError, NoOptions

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

# The largest map that the convolutional models hand to their first dense layer, in pixels a side: what a 32x32 image
# leaves after two halvings. Without a bound a 224x224 image would give that layer 77 million weights.
_LARGEST_MAP = 8


def _to_vector(height: int, width: int) -> list[tuple[str, nn.Module]]:
    """Flatten a map, after an average pool `shrink` where the map is larger than `_LARGEST_MAP` a side."""
    children: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    if max(height, width) > _LARGEST_MAP:
        # A plain pool, not an adaptive one, whose backward is not deterministic on CUDA.
        children.insert(0, ("shrink", nn.AvgPool2d((ceil(height / _LARGEST_MAP), ceil(width / _LARGEST_MAP)))))
    return children


def _vector_size(channels: int, height: int, width: int) -> int:
    """Elements of what `_to_vector` makes of one [channels, height, width] map."""
    return channels * prod(side // ceil(side / _LARGEST_MAP) for side in (height, width))


@register("simple_conv", cut="pool2")
def simple_conv(info: DatasetInfo, _: NoOptions) -> nn.Sequential:
    """Two 5x5 convolutions of 64 filters with local response normalisation, then dense 384 and 192.

    The network of TensorFlow's CIFAR-10 tutorial, which CSE-FSL (Mu & Shen 2023) and others after it cut between the
    convolutional and the dense layers: images [b, channels, h, w] -> logits [b, classes]. Its normalisation has radius
    4, bias 1, alpha 0.001 / 9 per squared neighbour and beta 0.75. The tutorial crops to 24x24; here the dense part
    follows the image's size, see `_LARGEST_MAP`.
    """
    height, width = (ceil(ceil(side / 2) / 2) for side in (info.height, info.width))
    children: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(info.channels, 64, 5, padding=2)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(3, stride=2, padding=1)),
        ("norm1", LocalResponseNorm(9, alpha=1e-3, beta=0.75, k=1.0)),
        ("conv2", nn.Conv2d(64, 64, 5, padding=2)),
        ("relu2", nn.ReLU()),
        ("norm2", LocalResponseNorm(9, alpha=1e-3, beta=0.75, k=1.0)),
        ("pool2", nn.MaxPool2d(3, stride=2, padding=1)),
        *_to_vector(height, width),
        ("fc1", nn.Linear(_vector_size(64, height, width), 384)),
        ("relu3", nn.ReLU()),
        ("fc2", nn.Linear(384, 192)),
        ("relu4", nn.ReLU()),
        ("fc3", nn.Linear(192, info.outputs)),
    ]
    return nn.Sequential(OrderedDict(children))


@register("cnn2", cut="pool2")
def cnn2(info: DatasetInfo, _: NoOptions) -> nn.Sequential:
    """Two 3x3 convolutions of 32 and 64 filters with 2x2 max-pooling, then dense 128.

    The small network of many federated-learning benchmarks: images [b, channels, h, w] -> logits [b, classes].
    """
    height, width = info.height, info.width
    pools: list[nn.Module] = []
    for _layer in range(2):
        kernel = (min(2, height), min(2, width))  # a side of one pixel is not pooled any further
        pools.append(nn.MaxPool2d(kernel))
        height, width = height // kernel[0], width // kernel[1]
    children: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(info.channels, 32, 3, padding=1)),
        ("relu1", nn.ReLU()),
        ("pool1", pools[0]),
        ("conv2", nn.Conv2d(32, 64, 3, padding=1)),
        ("relu2", nn.ReLU()),
        ("pool2", pools[1]),
        *_to_vector(height, width),
        ("fc1", nn.Linear(_vector_size(64, height, width), 128)),
        ("relu3", nn.ReLU()),
        ("fc2", nn.Linear(128, info.outputs)),
    ]
    return nn.Sequential(OrderedDict(children))


@dataclass(frozen=True)
class Cnn4Options:
    """`width`: channels of each block."""

    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError("width", self.width, "an integer >= 1")


@register(
    "cnn4",
    cut="block2",
    options=Cnn4Options,
    blocks=("block1", "block2", "block3"),
)
def cnn4(info: DatasetInfo, options: Cnn4Options) -> nn.Sequential:
    """Four blocks of 3x3 convolution, BatchNorm, ReLU and 2x2 max-pooling, then the classifier.

    The embedding network of few-shot learning (Vinyals et al. 2016), which papers on personalised federated learning
    took up: images [b, channels, h, w] -> logits [b, classes].
    """
    channels, height, width = info.shape
    children: list[tuple[str, nn.Module]] = []
    for i in range(1, 5):
        kernel = (min(2, height), min(2, width))  # a side of one pixel is not pooled any further
        block: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(channels, options.width, 3, padding=1),
            bn=nn.BatchNorm2d(options.width),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(kernel),
        )
        children.append((f"block{i}", nn.Sequential(block)))
        channels, height, width = options.width, height // kernel[0], width // kernel[1]
    children += [("flatten", nn.Flatten()), ("fc", nn.Linear(channels * height * width, info.outputs))]
    return nn.Sequential(OrderedDict(children))


@dataclass(frozen=True)
class MlpOptions:
    """`hidden`: widths of the hidden layers, first to last; at least one."""

    hidden: tuple[int, ...] = (128, 64)

    def __post_init__(self) -> None:
        if not self.hidden or min(self.hidden) < 1:
            raise ConfigError("hidden", self.hidden, "a list of one or more integers >= 1")


@register("mlp", cut="relu1", options=MlpOptions)
def mlp(info: DatasetInfo, options: MlpOptions) -> nn.Sequential:
    """A perceptron, by default pixels-128 | 128-64-classes: images [b, channels, h, w] -> logits [b, classes]."""
    children: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for i, (before, after) in enumerate(pairwise((prod(info.shape), *options.hidden)), start=1):
        children += [(f"fc{i}", nn.Linear(before, after)), (f"relu{i}", nn.ReLU())]
    children.append((f"fc{len(options.hidden) + 1}", nn.Linear(options.hidden[-1], info.outputs)))
    return nn.Sequential(OrderedDict(children))
