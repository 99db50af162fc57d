"""What crosses a cut, as methods work with it: one tensor or several, and what is done to all of them alike.

Most cuts are crossed by one tensor. Inside a residual block, say, several do, and among them may be what has no
gradient: a mask, or indices. A method that uses these functions runs at every cut::

    z = model(x)
    reply = yield ask("smashed", z=mapped(noisy, z), y=y)      # several travel as z/0, z/1, ...
    optimizer.update(z, crossed(reply, "grad"))

    z = require_gradients(crossed(message, "z"))               # the server, on the other side
    optimizer.update(ctx.loss(model(z), y))
    return {"grad": gradients(z)}

What treats several as one tensor (``z + noise``, ``z.detach()``) ends in one line that names the cut, never in other
figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from cutlayer.models.cutting import Crossing, Several, SeveralError, as_crossing, tensors

V = TypeVar("V", bound=Tensor | float)  # the values of a payload: an int may stand for a float


def mapped(function: Callable[[Tensor], Tensor], crossing: Crossing) -> Crossing:
    """What a function makes of each tensor that can have a gradient; masks and indices stay as they are."""
    return as_crossing(tuple(function(each) if each.is_floating_point() else each for each in tensors(crossing)))


def scaled(crossing: Crossing, factor: float) -> Crossing:
    """Each of the `mapped` tensors times a number."""
    return mapped(lambda each: each * factor, crossing)


def detached(crossing: Crossing) -> Crossing:
    """The same values without the graph that they came from."""
    return as_crossing(tuple(each.detach() for each in tensors(crossing)))


def floating(crossing: Crossing) -> list[Tensor]:
    """Those of the tensors that can have a gradient: not a mask, nor indices."""
    return [each for each in tensors(crossing) if each.is_floating_point()]


def require_gradients(crossing: Crossing) -> Crossing:
    """Let what crossed gather gradients from now on, in place; gives it back."""
    for each in floating(crossing):
        each.requires_grad_()
    return crossing


def gradients(crossing: Crossing) -> Crossing:
    """The gradients that `floating` tensors have gathered, to be sent back: zeros where nothing depends on a tensor."""
    return as_crossing(tuple(torch.zeros_like(each) if each.grad is None else each.grad for each in floating(crossing)))


def differentiable(crossing: Crossing, along: Crossing) -> tuple[list[Tensor], list[Tensor]]:
    """What a backward pass from what crossed begins with: tensors, and ``along`` the gradients that came back for them.

    There is one for each of the `floating` tensors. Those that need none, as of a frozen part, are left out.

    Raises:
        ValueError: another number of gradients than of tensors.
    """
    pairs = zip(floating(crossing), tensors(along), strict=True)
    used = [(each, gradient) for each, gradient in pairs if each.requires_grad]
    return [each for each, _ in used], [gradient for _, gradient in used]


def backward(crossing: Crossing, along: Crossing) -> None:
    """A backward pass from what crossed; see `differentiable`."""
    outputs, gradients = differentiable(crossing, along)
    if outputs:
        torch.autograd.backward(outputs, gradients)


def joined(crossings: Sequence[Crossing]) -> Crossing:
    """What crossed from several clients as one batch, in their order.

    Raises:
        ValueError: from some fewer tensors crossed than from others.
    """
    rows = [tensors(each) for each in crossings]
    return as_crossing(tuple(torch.cat(each) for each in zip(*rows, strict=True)))


def appended(one: Tensor, other: Tensor, fill: float) -> Tensor:
    """Samples [b, ...] and more of them, as one tensor; where sequences [b, l, ...] differ in length, filled up."""
    length = max((each.shape[1] for each in (one, other) if each.dim() > 1), default=0)
    rows = [
        each
        if each.dim() == 1 or each.shape[1] == length
        else torch.cat([each, each.new_full((len(each), length - each.shape[1], *each.shape[2:]), fill)], 1)
        for each in (one, other)
    ]
    return torch.cat(rows)


def divided(crossing: Crossing, sizes: Sequence[int]) -> list[Crossing]:
    """The inverse of `joined`: of ``sizes`` samples each."""
    pieces: list[tuple[Tensor, ...]] = [torch.split(each, [*sizes]) for each in tensors(crossing)]
    return [as_crossing(tuple(each[index] for each in pieces)) for index in range(len(sizes))]


def packed(fields: Mapping[str, V | tuple[Tensor, ...]]) -> dict[str, V | Tensor]:
    """The fields of a message with several tensors ``z`` as entries ``z/0``, ``z/1`` and so on."""
    entries: dict[str, V | Tensor] = {}
    for name, value in fields.items():
        if isinstance(value, tuple):
            entries |= {f"{name}/{index}": each for index, each in enumerate(value)}
        else:
            entries[name] = value
    return entries


def crossed(message: Mapping[str, object], name: str) -> Crossing:
    """What crossed under a name: a tensor, or several.

    Raises:
        KeyError, TypeError: as `tensor`.
    """
    count = sum(1 for _ in _numbered(message, name))
    return Several(tensor(message, f"{name}/{index}") for index in range(count)) if count else tensor(message, name)


def tensor(message: Mapping[str, object], name: str) -> Tensor:
    """One tensor out of a received message.

    Raises:
        KeyError: if the message has no such field.
        SeveralError: if several crossed under this name.
        TypeError: if the field holds a number.
    """
    if name not in message:
        several = [*_numbered(message, name)]
        if several:
            raise SeveralError.by(f"tensor(message, {name!r})", len(several))
        raise KeyError(f"message has no field {name!r}; it has {', '.join(message) or 'none'}")
    value = message[name]
    if not isinstance(value, Tensor):
        raise TypeError(f"field {name!r} is a {type(value).__name__}, expected a tensor")
    return value


def _numbered(message: Mapping[str, object], name: str) -> Iterable[str]:
    """The entries that `packed` made of several tensors."""
    return () if f"{name}/0" not in message else (key for key in message if key.startswith(f"{name}/"))
