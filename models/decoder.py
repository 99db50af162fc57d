"""A network that makes images of what crosses a cut: the model of who would like to see the clients' images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutlayer.models.cutting import Crossing, tensors
from cutlayer.models.shapes import trace

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

WIDTH, BLOCKS = 64, 4
_SMALL = 8


class ResidualBlock(nn.Module):
    """Two convolutions, each behind a normalisation, beside a connection that nothing is in: the shape stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = _norm(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class Tokens(nn.Module):
    """Tokens as a map: [b, t, d] -> [b, d, s, s], each place a weighted sum of all tokens, s * s at most t."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.side = math.isqrt(tokens)
        self.places = nn.Linear(tokens, self.side**2)

    def forward(self, x: Tensor) -> Tensor:
        return self.places(x.transpose(1, 2)).unflatten(2, (self.side, self.side))


class Decoder(nn.Module):
    """Smashed data -> images with values 0..1, by residual blocks at the size of the data and transposed convolutions.

    Smashed data is a map [b, c, h, w], tokens [b, t, d] or a vector [b, d], which a linear layer makes a map of at most
    8x8. A map is doubled in size while it is not beyond the images', then brought to that by nearest neighbours: any
    ratio will do. Of several values that cross, all are taken, see `merged_tensor`. Normalisation is over groups of
    channels within a sample: the same in training and in use, and for a batch of one.

    Args:
        z_shape: of one sample of the smashed data, after `merged_tensor`, without the batch.
        image_shape: of an image (c, h, w).
        width: channels of every layer but the first and the last.
        blocks: residual blocks.
    """

    def __init__(
        self, z_shape: Sequence[int], image_shape: Sequence[int], width: int = WIDTH, blocks: int = BLOCKS
    ) -> None:
        super().__init__()
        channels, *self.size = image_shape
        enter: list[nn.Module] = []
        if len(z_shape) == 3:
            given, *side = z_shape
        elif len(z_shape) == 2:
            enter.append(Tokens(z_shape[0]))
            given, *side = z_shape[1], *[math.isqrt(z_shape[0])] * 2
        else:
            side = [min(_SMALL, math.ceil(pixels / 4)) for pixels in self.size]
            enter += [nn.Linear(z_shape[0], width * math.prod(side)), nn.Unflatten(1, (width, *side))]
            given = width
        steps = max(0, int(math.log2(min(pixels / have for pixels, have in zip(self.size, side, strict=True)))))
        grow = [nn.Sequential(_doubling(width), nn.ReLU()) for _ in range(steps)]
        self.enter = nn.Sequential(*enter, nn.Conv2d(given, width, 3, padding=1))
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.grow = nn.Sequential(*grow)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z: Crossing) -> Tensor:
        x = self.grow(self.blocks(self.enter(merged_tensor(z))))
        if list(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="nearest")
        return torch.sigmoid(self.leave(x))


def merged_tensor(z: Crossing) -> Tensor:
    """All floating-point values that cross a cut as one: [b, c, h, w], [b, t, d] or [b, d].

    Of several, maps are brought to the largest one's size and put together by channel, tokens of one number by feature;
    any others are put together as vectors.
    """
    values = [each if each.dim() in (3, 4) else each.flatten(1) for each in tensors(z) if each.is_floating_point()]
    if len(values) == 1:
        return values[0]
    if all(each.dim() == 4 for each in values):
        size = [max(each.shape[axis] for each in values) for axis in (2, 3)]
        return torch.cat([F.interpolate(each, size, mode="nearest") for each in values], 1)
    if all(each.dim() == 3 and each.shape[1] == values[0].shape[1] for each in values):
        return torch.cat(values, 2)
    return torch.cat([each.flatten(1) for each in values], 1)


def build_attacker(info: DatasetInfo, client: nn.Module, width: int = WIDTH, blocks: int = BLOCKS) -> Decoder:
    """A fresh decoder from what the client part gives to the dataset's images; weights from torch's generator."""
    z = trace(client, torch.empty(2, *info.shape, dtype=next(client.parameters()).dtype, device="meta"))
    return Decoder(merged_tensor(z).shape[1:], info.shape, width, blocks)


def _doubling(width: int) -> nn.ConvTranspose2d:
    """A transposed convolution to twice the size, at first of He et al.'s variance: each value is made of 2x2 others.

    torch's own would take 4x4 for it, and let what is behind several of them hardly depend on the input.
    """
    layer = nn.ConvTranspose2d(width, width, 4, 2, 1)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / (4 * width)))
    return layer


def _norm(width: int) -> nn.GroupNorm:
    """About eight channels a group, so that a group is never one value."""
    return nn.GroupNorm(math.gcd(width, max(1, width // 8)), width)
