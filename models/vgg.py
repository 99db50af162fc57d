"""VGG for small images, and the shallower networks that go between its first and last layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import nn

from cutlayer.models.layers import GlobalAvgPool, GridOfMeans
from cutlayer.models.registry import register
from cutlayer.runtime.ground.config import ConfigError

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

_POOL: Literal["M"] = "M"
_GRID = 7  # pixels a side that the dense layers see, as in the paper's networks


class Layer(NamedTuple):
    """A child before the classifier: channels of its convolution, 0 for a pool alone; whether it ends with a pool."""

    name: str
    channels: int
    pool: bool


@dataclass(frozen=True)
class VggOptions:
    """`width`: channels of the `stem` first blocks; `body`: those of the blocks after them, as multiples of `width`.

    An M in `body` is a pool, a child by itself; with none, the blocks end with a pool where the next one is wider.
    `classifier` are the widths of dense layers before the last; with some, these see a map of 7x7 means. Without
    `batch_norm` weights are drawn as for VGG in torchvision.
    """

    width: int = 64
    body: tuple[int | Literal["M"], ...] = (2, 2, 4, 4, 8, 8, 8, 8)
    stem: int = 2
    batch_norm: bool = True
    classifier: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key in ("width", "stem"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "an integer >= 1")
        multiples = [each for each in self.body if each != _POOL]
        if not multiples or min(multiples) < 1:
            raise ConfigError("body", self.body, "a list of one or more integers >= 1, and M for a pool")
        if any(width < 1 for width in self.classifier):
            raise ConfigError("classifier", self.classifier, "a list of integers >= 1")

    @property
    def layers(self) -> list[Layer]:
        """The children before the classifier."""
        found: list[Layer] = []
        blocks, pools = count(1), count(1)
        for each, after in pairwise([*[1] * self.stem, *self.body, 0]):
            if isinstance(each, str):
                found.append(Layer(f"pool{next(pools)}", 0, pool=True))
            else:
                wider = _POOL not in self.body and isinstance(after, int) and after > each
                found.append(Layer(f"block{next(blocks)}", self.width * each, pool=wider))
        return found


def _pooled(options: VggOptions) -> tuple[str, ...]:
    """The children that end with a pool, but for the last."""
    return tuple(layer.name for layer in options.layers[:-1] if layer.pool)


@register(
    "vgg",
    cut="block2",
    options=VggOptions,
    blocks=_pooled,
    cuts=lambda options: (f"block{options.stem}", options.layers[-1].name),
    variants=({"body": (2, 4, 8)}, {"body": (2, 4, 4, 8, 8)}),
)
def vgg(info: DatasetInfo, options: VggOptions) -> nn.Sequential:
    """The ten convolutions of VGG-13 (Simonyan & Zisserman 2015, configuration B), each with BatchNorm and ReLU.

    Images [b, channels, h, w] -> logits [b, classes]. By default a 2x2 max-pool stands where the width grows and
    nowhere else, so that bodies of other depths that grow as often give maps of the same size; the classifier sees the
    mean over pixels. The paper has two pools more, at its last width, for images of 224 pixels, and dense layers of
    4096: `body` [M,2,2,M,4,4,M,8,8,M,8,8,M] and `classifier` [4096,4096], here without dropout.
    """
    channels, height, width = info.shape
    children: list[tuple[str, nn.Module]] = []
    for name, out, pooled in options.layers:
        block: OrderedDict[str, nn.Module] = OrderedDict()
        if out:
            block["conv"] = nn.Conv2d(channels, out, 3, padding=1)
            if options.batch_norm:
                block["bn"] = nn.BatchNorm2d(out)
            block["relu"] = nn.ReLU()
            channels = out
        if pooled:
            kernel = (min(2, height), min(2, width))  # a side of one pixel is not pooled any further
            block["pool"] = nn.MaxPool2d(kernel)
            height, width = height // kernel[0], width // kernel[1]
        children.append((name, nn.Sequential(block) if out else block["pool"]))
    model = nn.Sequential(OrderedDict([*children, *_classifier(channels, options.classifier, info.outputs)]))
    if not options.batch_norm:
        model.apply(_draw)
    return model


def _classifier(features: int, hidden: Sequence[int], classes: int) -> list[tuple[str, nn.Module]]:
    """What follows the convolutions: the mean over pixels, or a grid of means and dense layers; then the last layer."""
    if not hidden:
        return [("avgpool", GlobalAvgPool()), ("fc", nn.Linear(features, classes))]
    layers: list[tuple[str, nn.Module]] = [("avgpool", GridOfMeans(_GRID)), ("flatten", nn.Flatten())]
    for i, (wide, narrow) in enumerate(pairwise([features * _GRID**2, *hidden]), start=1):
        layers += [(f"fc{i}", nn.Linear(wide, narrow)), (f"relu{i}", nn.ReLU())]
    return [*layers, ("fc", nn.Linear(hidden[-1], classes))]


def _draw(module: nn.Module) -> None:
    """Weights as torchvision draws them, without which a deep network without BatchNorm would not begin to learn."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
