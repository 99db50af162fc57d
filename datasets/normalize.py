"""Mean and deviation, and the arithmetic that turns uint8 pixels into normalised floats."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cutlayer.datasets.config import Normalize
from cutlayer.datasets.images import EncodedImages
from cutlayer.runtime.ground.config import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_SAMPLED = 4096
_BLOCK = 4096


def channel_statistics(images: Tensor | EncodedImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in 0..1, over all pixels.

    Exact for images in memory; of encoded files, 4096 evenly spread ones are read. A channel that never varies gets a
    deviation of one grey level, so that dividing by it is safe.
    """
    if isinstance(images, EncodedImages):
        spread = np.unique(np.linspace(0, len(images) - 1, min(len(images), _SAMPLED)).astype(np.int64))
        images = images.subset(spread).decode_all(workers=4)
    channels = images.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for block in images.split(_BLOCK):
        for channel in range(channels):
            counts[channel] += torch.bincount(block[:, channel].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    mean = (share * levels).sum(1)
    std = (share * (levels - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


def moments(
    kind: Normalize, images: Tensor | EncodedImages, channels: int, known: tuple[Sequence[float], Sequence[float]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel for `dataset.normalize`.

    Args:
        kind: "dataset" takes the `known` ones or, where these are empty, measures `images` (the training images);
            "imagenet" takes ImageNet's, averaged over the colours for grey images; "none" gives 0 and 1.

    Raises:
        ConfigError: ImageNet's for images with neither 1 nor 3 channels.
    """
    if kind == "none":
        return (0.0,) * channels, (1.0,) * channels
    if kind == "imagenet":
        if channels == 1:
            return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
        if channels != 3:
            raise ConfigError("dataset.normalize", kind, f"dataset or none for images of {channels} channels")
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = tuple(known[0]), tuple(known[1])
    return (mean, std) if len(mean) == channels else channel_statistics(images)


class Normalizer:
    """`(x / 255 - mean) / std` on the device, in float32 or wider, then cast to `dtype`.

    Args:
        mean, std: per channel, in 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        self._dtype = dtype
        # bfloat16 cannot distinguish neighbouring grey levels after the subtraction: compute wider, then round once.
        self._work = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        if len(self.mean) == 1:
            self._shift: Tensor | float = 255 * self.mean[0]
            self._scale: Tensor | float = 1 / (255 * self.std[0])
        else:
            options = {"device": device, "dtype": torch.float64}
            self._shift = (255 * torch.tensor(self.mean, **options)).view(-1, 1, 1).to(self._work)
            self._scale = (1 / (255 * torch.tensor(self.std, **options))).view(-1, 1, 1).to(self._work)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [b, channels, height, width] with values 0..255, uint8 or float32; a new tensor of the same shape."""
        return x.to(self._work, copy=True).sub_(self._shift).mul_(self._scale).to(self._dtype)
