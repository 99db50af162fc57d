"""Layers that torch lacks or has in a form that does not fit here."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutlayer.runtime.ground.config import ConfigError


class GlobalAvgPool(nn.AdaptiveAvgPool2d):
    """Mean over height and width: [b, c, h, w] -> [b, c].

    Flattens as well, so that a residual network's children are exactly torchvision's, whose flatten is not a module.
    """

    def __init__(self) -> None:
        super().__init__((1, 1))

    def forward(self, input: Tensor) -> Tensor:
        return torch.flatten(super().forward(input), 1)


class GridOfMeans(nn.Module):
    """Means over `side` x `side` windows, which overlap in maps that are smaller: [b, c, h, w] -> [b, c, side, side].

    The values of `nn.AdaptiveAvgPool2d`, whose backward is not deterministic on CUDA, from two matrix products.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self._windows(length, x) for length in x.shape[2:])
        return rows @ x @ columns.T

    def _windows(self, length: int, like: Tensor) -> Tensor:
        """Of each window the share that each of `length` pixels has: [side, length]."""
        windows = torch.zeros(self.side, length, dtype=like.dtype, device=like.device)
        for i in range(self.side):
            start, end = i * length // self.side, -(-(i + 1) * length // self.side)
            windows[i, start:end] = 1 / (end - start)
        return windows

    def extra_repr(self) -> str:
        return str(self.side)


class FeatureMean(nn.Module):
    """Mean over all but batch and features: [b, c, h, w] -> [b, c], [b, tokens, d] -> [b, d]; [b, d] stays."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) if x.dim() == 3 else x.flatten(2).mean(2) if x.dim() > 3 else x


class LocalResponseNorm(nn.Module):
    """Normalise over `size` neighbouring channels (Krizhevsky et al. 2012, section 3.3): [b, c, h, w] -> same shape.

    The values of `nn.LocalResponseNorm`, from a 2-D pool instead of a 3-D one: the latter's backward is not
    deterministic on CUDA, and it is slower.
    """

    def __init__(self, size: int, alpha: float, beta: float, k: float) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        squares = x.square().flatten(2).unsqueeze(1)
        padded = F.pad(squares, (0, 0, self.size // 2, (self.size - 1) // 2))
        mean = F.avg_pool2d(padded, (self.size, 1), stride=1).view_as(x)
        return x / mean.mul(self.alpha).add(self.k).pow(self.beta)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class PadShortcut(nn.Module):
    """Parameter-free shortcut: every `stride`-th pixel, new channels zero: [b, c, h, w] -> [b, c + added, h', w'].

    Option A of He et al. 2016 (section 3.3), the one their CIFAR networks use (section 4.2).
    """

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.added, self.stride = added, stride

    def forward(self, x: Tensor) -> Tensor:
        # Half of the new channels on each side or all at the end is left open by the paper; all at the end here.
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))

    def extra_repr(self) -> str:
        return f"added={self.added}, stride={self.stride}"


def check_transformer(options: Any, *counts: str) -> None:
    """Raise the `ConfigError` of what a transformer cannot have: a count below 1, heads that do not divide `hidden`."""
    for key in counts:
        if getattr(options, key) < 1:
            raise ConfigError(key, getattr(options, key), "an integer >= 1")
    if options.hidden % options.heads:
        raise ConfigError("heads", options.heads, f"a divisor of hidden={options.hidden}")
    if not 0 <= options.dropout < 1:
        raise ConfigError("dropout", options.dropout, "a number >= 0 and < 1")
