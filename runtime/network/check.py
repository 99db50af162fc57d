"""What a receiver checks of a payload before a model sees it: values within bounds, and the shapes it waits for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from cutlayer.runtime.messages.boundary import Payload, Value, field_of
from cutlayer.runtime.messages.bounds import WireError, shown

Kind: TypeAlias = torch.dtype | type[bool] | type[int] | type[float]
"""A tensor's dtype, or the type of a plain number."""

TARGETS = "y"
"""The field of what a model is to give."""

LARGEST = 1e18
"""The largest value that is taken: squares and sums of such are finite in float32."""


def check_values(payload: Payload, wrong: Callable[[Tensor], str | None] | None = None) -> None:
    """Values that training can use: up to ``LARGEST``, and targets (field ``y``) that the task has.

    Args:
        wrong: gives what is wrong with targets, see `Task.wrong`; None where there are none.

    Raises:
        WireError: at a NaN, an infinity, a value that is too large or targets that the task does not have.
    """
    for name, value in payload.items():
        if wrong is not None and field_of(name) == TARGETS:
            reason = wrong(value.detach()) if isinstance(value, Tensor) else "a plain number"
            if reason is not None:
                raise WireError(f"{shown(name)} has {reason}")
            continue
        if not _may_be_infinite(value):
            continue
        least, most = _range(value)
        if not (math.isfinite(least) and math.isfinite(most)):
            raise WireError(f"{shown(name)} has values that are not finite")
        if not -LARGEST <= least <= most <= LARGEST:
            raise WireError(f"{shown(name)} has values from {least:.3g} to {most:.3g}; {LARGEST:.0e} is the largest")


def _may_be_infinite(value: Value) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float)


def _range(value: Value) -> tuple[float, float]:
    """The least and the largest value, both NaN if any is; 0 of an empty tensor."""
    if not isinstance(value, Tensor):
        return value, value
    if not value.numel():
        return 0, 0
    least, most = torch.aminmax(value.detach())
    return least.item(), most.item()


class Shapes:
    """The names, dtypes and shapes that a message has to have.

    A size of None is any from 1 up; those that lead (batches) are the same in all fields of a message.
    """

    def __init__(self, fields: Mapping[str, tuple[Kind, tuple[int | None, ...]]]) -> None:
        """``fields``: by name, the dtype and shape of a tensor, or bool, int or float and ``()`` of a plain number."""
        self._fields = dict(fields)

    @property
    def fields(self) -> int:
        """Their number."""
        return len(self._fields)

    def check(self, payload: Payload) -> None:
        """Compare a message.

        Raises:
            WireError: where it differs.
        """
        if payload.keys() != self._fields.keys():
            wrong = sorted(payload.keys() ^ self._fields.keys())
            raise WireError(f"fields {shown(', '.join(wrong))} are missing, or not expected")
        batch: int | None = None
        for name, (kind, shape) in self._fields.items():
            value = payload[name]
            got = value.dtype if isinstance(value, Tensor) else type(value)
            sizes = _sizes(value)
            if got != kind or not _fits(sizes, shape):
                raise WireError(f"{shown(name)} is {_shown(got, sizes)}, expected {_shown(kind, shape)}")
            if shape and shape[0] is None:
                if batch not in (None, sizes[0]):
                    raise WireError(f"{shown(name)} has {sizes[0]} samples, where another field has {batch}")
                batch = sizes[0]


def _sizes(value: Value) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _fits(sizes: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    pairs = zip(sizes, shape, strict=False)
    return len(sizes) == len(shape) and all(size >= 1 if wanted is None else size == wanted for size, wanted in pairs)


def _shown(kind: Kind, shape: tuple[int | None, ...]) -> str:
    name = str(kind).removeprefix("torch.") if isinstance(kind, torch.dtype) else kind.__name__
    return f"{name}[{', '.join('any' if size is None else str(size) for size in shape)}]"
