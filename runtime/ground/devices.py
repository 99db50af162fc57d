"""Devices that work through a queue: what is asked of them, and how to ask without waiting for it.

A GPU computes what was enqueued while the program enqueues more. The program waits for all of it wherever it reads a
value (`float(tensor)`, an index of bools, whose result has a size that nobody knows yet) or copies memory of the host
that the system may move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor


def queued(device: torch.device) -> bool:
    """Whether work on a device is enqueued, so that reading a value from it waits for all that was asked before."""
    return device.type != "cpu"


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; one of the host gets there without waiting for what the device has to do before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def read_numbers(values: Sequence[Tensor | float]) -> list[float]:
    """Tensors of one value, and numbers, as numbers; those of one device and dtype are read together."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            alike.setdefault((value.device, value.dtype), []).append(index)
    read: dict[int, float] = {}
    for places in alike.values():
        together: Any = torch.stack([torch.as_tensor(values[index]).detach().reshape(()) for index in places])
        read |= dict(zip(places, cast(list[float], together.tolist()), strict=True))
    return [float(read[index] if isinstance(value, Tensor) else value) for index, value in enumerate(values)]
