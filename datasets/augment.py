"""Augmentation of whole uint8 batches, one random draw per sample, on the device.

The parameters are drawn apart from the pixels: from a CPU generator, for a whole epoch at once. So the result depends
neither on how the epoch is cut into batches nor on where the images are kept.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.datasets.blur import WIDEST_BLUR, blur
from cutlayer.datasets.boxes import BOX_NUMBERS, RATIO, random_boxes
from cutlayer.datasets.colour import greyscale, jitter_
from cutlayer.datasets.config import Augment
from cutlayer.runtime.ground.devices import moved

PADDING = 4
_AREA = (0.08, 1.0)

# MoCo v2's: least share of the area, and the chances and strengths of what is done to the colours.
_MOCO_AREA = 0.2
_MOCO_JITTERED = 0.8
_MOCO_GREY = 0.2
_MOCO_STRENGTHS = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
_ORDERS = torch.tensor(list(itertools.permutations(range(4))))

Params = Mapping[str, Tensor]
BatchShape = tuple[int, int, int]  # samples, height, width


def crop(x: Tensor, top: Tensor, left: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Cut each image, padded by 4 black pixels on all sides, at its own place; then mirror the `mirrored` ones.

    The same as torchvision's `RandomCrop(size, padding=4)` with these offsets (0..8), and a horizontal flip.

    Args:
        x: uint8 [b, channels, height, width].
        top, left: int64 [b] on the device of x; mirrored: bool [b], or None to mirror none.
    """
    batch, channels, height, width = x.shape
    wide = width + 2 * PADDING
    padded = functional.pad(x, (PADDING,) * 4).view(batch, channels, -1)
    rows = top[:, None] + torch.arange(height, device=x.device)
    places = torch.arange(width, device=x.device)
    if mirrored is not None:
        places = torch.where(mirrored[:, None], places.flip(0), places)
    # One gather by pixel, its index shared by the channels: cheaper than indexing a view of all crops and flipping.
    pixels = (rows * wide + left[:, None])[:, :, None] + places.view(-1, 1, width)
    return padded.gather(2, pixels.view(batch, 1, -1).expand(-1, channels, -1)).view(x.shape)


def flip(x: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the images of x [b, channels, height, width] whose `mirrored` (bool [b]) is set, left to right."""
    return torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)


def resized_crop(x: Tensor, box: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Cut one box out of each image and scale it back to the full size, bilinear without antialiasing.

    The same, to rounding, as torchvision's `resized_crop(..., antialias=False)` on each image, and a horizontal flip.

    Args:
        x: uint8 [b, channels, height, width].
        box: float32 [b, 4]: top, left, height, width in pixels; whole numbers.
        mirrored: bool [b], or None to mirror none.

    Returns:
        float32, the shape of x.
    """
    height, width = x.shape[-2:]
    rows = _places(box[:, 0], box[:, 2], height)
    columns = _places(box[:, 1], box[:, 3], width)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None], columns.flip(-1), columns)
    # grid_sample counts from -1 at the left edge of the first pixel to 1 at the right edge of the last.
    grid_y = ((2 * rows + 1) / height - 1)[:, :, None].expand(-1, -1, width)
    grid_x = ((2 * columns + 1) / width - 1)[:, None, :].expand(-1, height, -1)
    grid = torch.stack([grid_x, grid_y], dim=-1)
    return functional.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


def _places(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Pixel positions [b, size] at which `size` outputs sample a stretch; kept inside it, so nothing leaks in."""
    steps = torch.arange(size, device=start.device, dtype=torch.float32) + 0.5
    inside = steps * (length / size)[:, None] - 0.5
    return inside.clamp(min=0).minimum((length - 1)[:, None]) + start[:, None]


def _draw_crop(extent: BatchShape, generator: torch.Generator) -> dict[str, Tensor]:
    offsets = torch.randint(0, 2 * PADDING + 1, (2, extent[0]), generator=generator)
    return {"top": offsets[0], "left": offsets[1]}


def _draw_flip(extent: BatchShape, generator: torch.Generator) -> dict[str, Tensor]:
    return {"mirrored": torch.rand(extent[0], generator=generator) < 0.5}


def _draw_crop_flip(extent: BatchShape, generator: torch.Generator) -> dict[str, Tensor]:
    return _draw_crop(extent, generator) | _draw_flip(extent, generator)


def _draw_resized(extent: BatchShape, generator: torch.Generator) -> dict[str, Tensor]:
    """Boxes of 8% to 100% of the area with a ratio of 3:4 to 4:3; one that does not fit is clipped to the image.

    torchvision draws again instead, as `moco` does here.
    """
    n, height, width = extent
    u = torch.rand(4, n, generator=generator)
    area = height * width * (_AREA[0] + u[0] * (_AREA[1] - _AREA[0]))
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = torch.exp(low + u[1] * (high - low))
    box_height = (area / ratio).sqrt().round().clamp(1, height)
    box_width = (area * ratio).sqrt().round().clamp(1, width)
    top = (u[2] * (height - box_height + 1)).floor().minimum(height - box_height)
    left = (u[3] * (width - box_width + 1)).floor().minimum(width - box_width)
    return {"box": torch.stack([top, left, box_height, box_width], 1)} | _draw_flip(extent, generator)


def moco_parameters(uniform: Tensor, height: int, width: int, least: float = _MOCO_AREA) -> dict[str, Tensor]:
    """What MoCo v2 does to each image, from uniform numbers [n, 30], or [n, 32] where some are blurred.

    Args:
        least: share of the area that a box has at least.

    Returns:
        box: float32 [n, 4] as `resized_crop` takes it: `random_boxes` of `least` to 100% of the area.
        order, factors: int64 and float32 [n, 4] for `colour.jitter_`.
        mirrored, jittered, grey: bool [n].
    """
    u = uniform.double()
    rest = u[:, BOX_NUMBERS:]
    strengths = moved(torch.tensor(_MOCO_STRENGTHS, dtype=u.dtype), u.device)
    centres = moved(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=u.dtype), u.device)
    return {
        "box": random_boxes(uniform, height, width, (least, 1.0)),
        "mirrored": rest[:, 0] < 0.5,
        "jittered": rest[:, 1] < _MOCO_JITTERED,
        "grey": rest[:, 2] < _MOCO_GREY,
        "order": moved(_ORDERS, u.device)[(rest[:, 3] * len(_ORDERS)).long()],
        "factors": (centres + strengths * (2 * rest[:, 4:8] - 1)).float(),
    }


def blur_parameters(uniform: Tensor, chance: float) -> tuple[Tensor, Tensor]:
    """By which deviation each image is blurred, float32 [n] of 0.1 to 2 pixels, and which are, from numbers [n, 32]."""
    u = uniform[:, -2:].double()
    return (0.1 + (WIDEST_BLUR - 0.1) * u[:, 1]).float(), u[:, 0] < chance


def _moco(area: float, blurred: float, whole: bool = False) -> "Augmentation":
    """MoCo v2's views; of pictures that were cut when they were read (`whole`) all but the crop."""
    numbers = BOX_NUMBERS + 8 + (2 if blurred else 0)
    apply = partial(_apply_moco, area=area, blurred=blurred, whole=whole)
    return Augmentation(partial(_draw_numbers, numbers=numbers), apply, (area, 1.0) if whole else None)


def _draw_numbers(extent: BatchShape, generator: torch.Generator, *, numbers: int) -> Params:
    """Bare uniform numbers: drawing for one sample is cheap, and `apply` reads those of a whole batch at once."""
    return {"uniform": torch.rand(extent[0], numbers, generator=generator)}


def _apply_moco(x: Tensor, params: Params, *, area: float, blurred: float, whole: bool) -> Tensor:
    p = moco_parameters(params["uniform"], x.shape[2], x.shape[3], area)
    cut = flip(x, p["mirrored"]).float() if whole else resized_crop(x, p["box"], p["mirrored"])
    coloured = _coloured(cut, p)
    return blur(coloured, *blur_parameters(params["uniform"], blurred)) if blurred else coloured


def _coloured(x: Tensor, p: Params) -> Tensor:
    x = jitter_(x, p["order"], p["factors"], p["jittered"])
    return x if x.shape[1] == 1 else greyscale(x, p["grey"])


def _draw_whole(extent: BatchShape, generator: torch.Generator) -> dict[str, Tensor]:
    return {"uniform": torch.rand(extent[0], BOX_NUMBERS, generator=generator)} | _draw_flip(extent, generator)


def _apply_flip(x: Tensor, p: Params) -> Tensor:
    return flip(x, p["mirrored"])


def _apply_crop(x: Tensor, p: Params) -> Tensor:
    return crop(x, p["top"], p["left"], p.get("mirrored"))


def _apply_resized(x: Tensor, p: Params) -> Tensor:
    return resized_crop(x, p["box"], p["mirrored"])


@dataclass(frozen=True)
class Augmentation:
    """One named augmentation: `draw` its parameters (CPU, [n, ...] each) and `apply` them to a batch on the device.

    Both are functions that pickle.

    Attributes:
        area: None, or of one that wants its images cut out of the whole pictures when they are read: what
            `random_boxes` is to take, with the parameter `uniform`. Then `apply` does the rest.
    """

    draw: Callable[[BatchShape, torch.Generator], Mapping[str, Tensor]]
    apply: Callable[[Tensor, Params], Tensor]
    area: tuple[float, float] | None = None


_AUGMENTATIONS: dict[str, Augmentation | None] = {
    "none": None,
    "flip": Augmentation(_draw_flip, _apply_flip),
    "crop": Augmentation(_draw_crop, _apply_crop),
    "crop_flip": Augmentation(_draw_crop_flip, _apply_crop),
    "resized_crop_flip": Augmentation(_draw_resized, _apply_resized),
    "moco": _moco(_MOCO_AREA, 0.0),
}
assert set(_AUGMENTATIONS) == set(get_args(Augment)), "the configuration lists exactly these"


_OF_WHOLE: dict[str, Augmentation] = {
    "resized_crop_flip": Augmentation(_draw_whole, _apply_flip, _AREA),
}


def augmentation(name: Augment, moco_area: float = _MOCO_AREA, moco_blur: float = 0.0) -> Augmentation | None:
    """The augmentation `name`; None for "none". Least area and chance of a blur are those of `moco`."""
    return _moco(moco_area, moco_blur) if name == "moco" else _AUGMENTATIONS[name]


def of_whole_pictures(name: Augment, moco_area: float = _MOCO_AREA, moco_blur: float = 0.0) -> Augmentation | None:
    """The augmentation `name` with its crops cut out of whole pictures as they are read; None if it cuts no boxes."""
    return _moco(moco_area, moco_blur, whole=True) if name == "moco" else _OF_WHOLE.get(name)
