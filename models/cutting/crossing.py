"""What crosses a cut: one tensor for most cuts, several where layers behind the cut use what earlier ones gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError


class SeveralError(ConfigError, AttributeError):
    """Several tensors crossed a cut, and what met them takes one."""

    @classmethod
    def by(cls, user: str, count: int) -> SeveralError:
        """The error of a ``user``, such as the name of an operation, that met ``count`` tensors."""
        reason = f"another cut, as {count} tensors cross this one and the method takes one ({user})"
        return cls("model.cut", NO_VALUE, f"expected {reason}; crossing.mapped applies a function to each of several")


class Several(tuple[Tensor, ...]):
    """The tensors that cross a cut where more than one does, in an order that is the cut's own.

    A tuple, and no more: used as if it were one tensor (``z + 1``, ``z.detach()``, ``torch.empty_like(z)``), it raises
    `SeveralError`.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if hasattr(Tensor, name):
            raise SeveralError.by(f"z.{name}", len(self))
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (*args, *(kwargs or {}).values())
        count = next((len(value) for value in given if isinstance(value, cls)), 0)
        raise SeveralError.by(getattr(function, "__name__", str(function)), count)


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: Several, *_: object) -> Any:
        raise SeveralError.by(f"z.{name}", len(self))

    return refuse


# What Python looks up in the class, past `__getattr__`; a tuple adds, multiplies and compares by order.
_OPERATORS = "add sub mul matmul truediv floordiv mod pow"
for _name in (
    *(f"__{side}{operator}__" for operator in _OPERATORS.split() for side in ("", "r", "i")),
    *("__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__"),
):
    setattr(Several, _name, _refusing(_name))

Crossing: TypeAlias = Tensor | tuple[Tensor, ...]
"""What crosses a cut: a tensor, or a tuple of several, which is then a `Several`."""


def tensors(crossing: Crossing) -> tuple[Tensor, ...]:
    """All that crosses, one tensor too as a tuple."""
    return crossing if isinstance(crossing, tuple) else (crossing,)


def as_crossing(found: tuple[Tensor, ...]) -> Crossing:
    """The inverse of `tensors`."""
    return found[0] if len(found) == 1 else Several(found)
