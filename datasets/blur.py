"""Gaussian blur of whole batches, each image by a deviation of its own."""

import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.runtime.ground.devices import queued

WIDEST_BLUR = 2.0
"""The largest deviation, in pixels."""
_REACH = 8


def blur(x: Tensor, deviation: Tensor, chosen: Tensor) -> Tensor:
    """Blur the images of x that are `chosen`, beyond their edges continued by the pixels at these.

    The window is cut off at 8 pixels, four times the largest deviation. Rows and columns are weighted one shift after
    another, so that an image's values do not depend on the rest of its batch.

    Args:
        x: float32 [b, channels, height, width].
        deviation: float32 [b], in pixels, above 0 and at most 2; chosen: bool [b].
    """
    if queued(x.device):  # where it is not known yet how many are chosen
        return torch.where(chosen.view(-1, 1, 1, 1), _blurred(x, deviation), x)
    if not bool(chosen.any()):
        return x
    result = x.clone()
    result[chosen] = _blurred(x[chosen], deviation[chosen])
    return result


def _blurred(x: Tensor, deviation: Tensor) -> Tensor:
    places = torch.arange(-_REACH, _REACH + 1, device=x.device, dtype=torch.float64)
    window = torch.exp(-(places**2) / (2 * deviation.double()[:, None] ** 2))
    window = (window / window.sum(1, keepdim=True)).float()
    return _weighted(_weighted(x, window, 2), window, 3)


def _weighted(x: Tensor, window: Tensor, axis: int) -> Tensor:
    """Sums of x [k, channels, height, width] along an axis, weighted by each image's window [k, 17]."""
    size = x.shape[axis]
    sides = (0, 0, _REACH, _REACH) if axis == 2 else (_REACH, _REACH, 0, 0)
    padded = functional.pad(x, sides, mode="replicate")
    total = torch.zeros_like(x)
    for place in range(window.shape[1]):
        total.add_(padded.narrow(axis, place, size).mul(window[:, place].view(-1, 1, 1, 1)))
    return total
