"""How like two images are: SSIM, PSNR and mean squared error, differentiable; of images [b, c, h, w], values 0..1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
MOST_PSNR = 100.0


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each image: [b], float32 or wider."""
    return (_wide(x) - _wide(y)).square().flatten(1).mean(1)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, for a peak of 1: [b]; at most 100, where it would be infinite."""
    return -10 * mse(x, y).clamp(min=10 ** (-MOST_PSNR / 10)).log10()


def ssim(x: Tensor, y: Tensor, *, padded: bool = False) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004, equation 13): [b], from -1 to 1.

    As published: a Gaussian window of 11x11 pixels with a deviation of 1.5, C1 = 0.01^2, C2 = 0.03^2, the mean over all
    windows that lie within the image; of several channels the mean. In smaller images the window has the largest odd
    side that fits. With `padded` there is a window around every pixel, and both images are black beyond their edges,
    where they are alike: the value is higher.
    """
    x, y = _wide(x), _wide(y)
    with torch.autocast(x.device.type, enabled=False):  # the variances are small differences of larger numbers
        window = _window(min(x.shape[-2:]), x)
        if padded:
            x, y = (F.pad(each, [len(window) // 2] * 4) for each in (x, y))
        mean_x, mean_y, square_x, square_y, product = _blurred(torch.stack([x, y, x * x, y * y, x * y]), window)
        variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
        covariance = product - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
        structure = (2 * covariance + K2**2) / (variance_x + variance_y + K2**2)
        return (luminance * structure).flatten(1).mean(1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _window(side: int, like: Tensor) -> Tensor:
    """The window's profile for images whose shorter side is `side`; it sums to one."""
    length = min(WINDOW, side - 1 + side % 2)
    places = torch.arange(length, dtype=like.dtype, device=like.device) - length // 2
    profile = torch.exp(-(places**2) / (2 * SIGMA**2))
    return profile / profile.sum()


def _blurred(images: Tensor, window: Tensor) -> Tensor:
    """Weighted means over all windows within the images: [..., h, w] -> [..., h', w']."""
    flat = images.flatten(0, -3).unsqueeze(1)
    flat = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return flat.view(*images.shape[:-2], *flat.shape[-2:])
