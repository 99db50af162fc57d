"""Colour jitter and greyscale of whole batches, each image with factors and an order of its own.

The operations are those of torchvision (`adjust_brightness` and its kin) on floats, with values of 0..255 for its 0..1.
No sum is fused with a product, and means go row by row: so an image's values do not depend on the rest of its batch.
"""

import torch
from torch import Tensor

from cutlayer.runtime.ground.devices import queued

# The numbers that torchvision's ColorJitter.get_params gives the operations.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_RED, _GREEN, _BLUE = 0.2989, 0.587, 0.114


def grey(x: Tensor) -> Tensor:
    """Brightness [b, 1, height, width] of the pixels of x [b, 3, height, width]; x itself where it has one channel."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return red.mul(_RED).add_(green.mul(_GREEN)).add_(blue.mul(_BLUE))


def greyscale(x: Tensor, chosen: Tensor) -> Tensor:
    """Take the colours out of the images of x that are `chosen` (bool [b])."""
    return torch.where(chosen.view(-1, 1, 1, 1), grey(x), x)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of each image of x [b, 3, height, width] by its `shift` [b], in turns, -1/6..1/6.

    The way to HSV and back in one step: on the circle of hues a channel is at its highest up to a sixth of a turn away
    from its own hue (red 0, green 2, blue 4 sixths), at its lowest from two sixths on, and linear between.
    """
    red, green, blue = x.split(1, dim=1)
    low, high = red.minimum(green).minimum(blue), red.maximum(green).maximum(blue)
    chroma = high - low
    most_red, most_green = high == red, high == green
    slope = torch.where(most_red, green - blue, torch.where(most_green, blue - red, red - green))
    start = torch.where(most_red, 0.0, torch.where(most_green, 2.0, 4.0))
    turned = slope.div_(torch.where(chroma > 0, chroma, 1.0)).add_(start).add_(6 * shift.view(-1, 1, 1, 1))
    own = 2 * torch.arange(3, device=x.device).view(1, 3, 1, 1)
    # ||d| - 3| is 3 less the distance on the circle, for differences d of -6 to 6.
    return (turned - own).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)


def jitter_(x: Tensor, order: Tensor, factors: Tensor, chosen: Tensor) -> Tensor:
    """Jitter the images of x that are `chosen`, in place, each in its own order.

    Three of the operations blend an image with black, its mean brightness or its own greys: those are one pass over the
    batch, in which each image has its next one. The costly fourth, hue, is computed where it is due.

    Args:
        x: float32 [b, 1 or 3, height, width], 0..255; with one channel saturation and hue do nothing.
        order: int64 [b, 4], a permutation of the operations; factors: float32 [b, 4] by operation; chosen: bool [b].

    Returns:
        x.
    """
    coloured = x.shape[1] > 1
    hue_at = (order == HUE).int().argmax(1)
    places = torch.arange(3, device=x.device)
    kinds = order.gather(1, places + (hue_at[:, None] <= places))
    active = chosen[:, None] if coloured else chosen[:, None] & (kinds != SATURATION)
    keep = torch.where(active, factors.gather(1, kinds), 1.0)
    mean, own = (1 - keep) * (kinds == CONTRAST), (1 - keep) * (kinds == SATURATION)
    for place in range(4):
        if coloured:
            _turn_(x, (hue_at == place) & chosen, factors[:, HUE])
        if place < 3:
            _blend_(x, *(weight[:, place].view(-1, 1, 1, 1) for weight in (keep, mean, own)))
    return x


def _turn_(x: Tensor, due: Tensor, shift: Tensor) -> None:
    """Turn the hue of the images that are `due` (bool [b]); where asking which they are waits, of all."""
    if queued(x.device):
        x.copy_(torch.where(due.view(-1, 1, 1, 1), hue(x, shift), x))
        return
    places = due.nonzero()[:, 0]
    if len(places):
        x[places] = hue(x[places], shift[places])


def _blend_(x: Tensor, keep: Tensor, mean: Tensor, own: Tensor) -> None:
    """Weigh the images with `keep`, their mean brightness with `mean` and their greys with `own`: [b, 1, 1, 1] each."""
    light = grey(x)
    average = light.mean(-1, keepdim=True).mean(-2, keepdim=True)
    x.mul_(keep).add_((light * own).add_(average * mean)).clamp_(0, 255)
