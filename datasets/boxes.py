"""Random boxes in images, as ImageNet's crop draws them."""

import math

import torch
from torch import Tensor

from cutlayer.runtime.ground.devices import moved

RATIO = (3 / 4, 4 / 3)
_TRIES = 10
BOX_NUMBERS = 2 * _TRIES + 2
"""Uniform numbers that decide on a box."""


def random_boxes(uniform: Tensor, height: int, width: int, area: tuple[float, float]) -> Tensor:
    """Boxes as torchvision's `RandomResizedCrop` draws them, of images of one size, from uniform numbers.

    Args:
        uniform: [n, 22 or more], of which the first 22 decide. area: least and largest share of the image's.

    Returns:
        float32 [n, 4]: top, left, height, width. The first of ten with a ratio of 3:4 to 4:3 that fits into the image,
        else one from the middle.
    """
    u = uniform.double()  # so that no rounding, which may differ with the batch's size, can move a box by a pixel
    tries, corners = u[:, : 2 * _TRIES].unflatten(1, (2, _TRIES)), u[:, 2 * _TRIES : BOX_NUMBERS]
    areas = height * width * (area[0] + tries[:, 0] * (area[1] - area[0]))
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = torch.exp(low + tries[:, 1] * (high - low))
    sizes = torch.stack([(areas / ratio).sqrt(), (areas * ratio).sqrt()], -1).round()
    image = moved(torch.tensor([height, width], dtype=u.dtype), u.device)
    fits = ((sizes >= 1) & (sizes <= image)).all(-1)
    first = sizes[torch.arange(len(u), device=u.device), fits.int().argmax(1)]
    middle = moved(torch.tensor(_middle(height, width), dtype=u.dtype), u.device)
    fitting = fits.any(1, keepdim=True)
    size = torch.where(fitting, first, middle[2:])
    corner = torch.where(fitting, (corners * (image - size + 1)).floor(), middle[:2])
    return torch.cat([corner, size], 1).float()


def _middle(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest box of an allowed ratio in the middle of an image."""
    box_height = min(height, round(width / RATIO[0]))
    box_width = min(width, round(height * RATIO[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
