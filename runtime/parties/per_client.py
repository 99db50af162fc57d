"""Tensors of several clients as one: whoever computes with such a tensor computes with that of a client, of all at once.

In memory a `PerClient` is [clients, ...]; its shape, and what any function of torch makes of it, are those of one
client. A function is computed by ``torch.vmap`` over the clients, and autograd records what vmap computes. So a client's
program runs once, unchanged, for many clients. What cannot be the same computation for all of them (a value that is
read, a random number, a selection by value) raises `ApartError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from cutlayer.runtime.ground.memory import ran_out

T = TypeVar("T")


class ApartError(Exception):
    """These clients cannot be computed as one; the text says why."""


class PerClient(Tensor):
    """A tensor for each of several clients; see this module. Made by `stacked`, taken apart by `apart`."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OF_ONE:
            return _one(func, args, kwargs)
        if func in _AS_STORED:
            return super().__torch_function__(func, types, args, kwargs)
        if func in _READING:
            raise ApartError(f"a value is read by {_name(func)}")
        if func in _ELEMENTWISE and _alike(args, kwargs):
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]  what torch's own default does
            if func is torch.autograd.grad:
                return _gradients(*args, **kwargs)
            if func is torch.autograd.backward:
                return _backward(*args, **kwargs)
            return _mapped(func, args, kwargs)


_OF_ONE: set[Any] = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.stride),
    *(Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.nbytes.__get__, torch.numel, Tensor.is_contiguous),
    *(torch.is_same_size, Tensor.is_same_size),
}
"""What is said of one client's tensor."""

_AS_STORED: set[Any] = {
    *(
        Tensor.device.__get__,
        Tensor.dtype.__get__,
        Tensor.layout.__get__,
        Tensor.is_cuda.__get__,
        Tensor.is_cpu.__get__,
    ),
    *(Tensor.is_meta.__get__, Tensor.is_sparse.__get__, Tensor.is_quantized.__get__, Tensor.is_nested.__get__),
    *(Tensor.is_mkldnn.__get__, Tensor.is_leaf.__get__, Tensor.itemsize.__get__, Tensor.element_size),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex, Tensor.is_inference),
    *(Tensor.requires_grad.__get__, Tensor.requires_grad.__set__, Tensor.requires_grad_, Tensor.retain_grad),
    *(Tensor.grad.__get__, Tensor.grad.__set__, Tensor.grad_fn.__get__, Tensor.data.__get__, Tensor._version.__get__),  # pyright: ignore[reportPrivateUsage]
    *(Tensor.detach, Tensor.detach_, Tensor.clone, torch.clone, Tensor.__deepcopy__, Tensor.get_device),
    *(Tensor.as_subclass, Tensor._backward_hooks.__get__, Tensor.is_set_to, Tensor.data_ptr),  # pyright: ignore
}
"""What is the same of all clients' tensors, or is done to each element."""

_ELEMENTWISE: set[Any] = {
    *(
        Tensor.add,
        Tensor.sub,
        Tensor.mul,
        Tensor.div,
        Tensor.__add__,
        Tensor.__sub__,
        Tensor.__mul__,
        Tensor.__truediv__,
    ),
    *(Tensor.__radd__, Tensor.__rmul__, Tensor.__neg__, Tensor.neg, Tensor.square, Tensor.lerp, Tensor.lerp_),
    *(Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_, Tensor.__iadd__, Tensor.__isub__, Tensor.__imul__),
    *(Tensor.copy_, Tensor.zero_, torch.zeros_like, torch.ones_like, torch.relu, torch.nn.functional.relu),
}
"""What is done to each element alone, with that of the same place where there is a second tensor."""

_READING: set[Any] = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__),
    *(Tensor.__complex__, Tensor.__contains__, Tensor.__array__, torch.equal, Tensor.equal, torch.allclose),
    *(Tensor.allclose, Tensor.is_nonzero, torch.is_nonzero, Tensor.backward),
}
"""What needs one client's value. A backward pass is that of ``torch.autograd``, as of methods' optimizers."""


def stacked(tensors: Sequence[Tensor]) -> PerClient:
    """Equal shapes [...] of clients, in their order, as one.

    Raises:
        ApartError: shapes or types differ.
    """
    first = tensors[0]
    if any(each.shape != first.shape or each.dtype != first.dtype for each in tensors):
        raise ApartError("tensors of different shapes or types")
    return torch.stack([*tensors]).as_subclass(PerClient)


def repeated(tensor: Tensor, clients: int) -> PerClient:
    """One tensor as that of each of so many clients; each has its own memory."""
    return tensor.detach().expand(clients, *tensor.shape).clone().as_subclass(PerClient)


def whole(tensor: Tensor) -> Tensor:
    """All clients' tensors as an ordinary one, [clients, ...], in the same memory."""
    with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
        return tensor.as_subclass(Tensor)


def apart(value: T, clients: int) -> list[T]:
    """What each client has of a value: its own tensor, a view; of anything else the value itself."""
    if isinstance(value, PerClient):
        return cast("list[T]", [*whole(value).unbind(0)])
    return [value] * clients


def _one(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
        return func(*(each.detach().select(0, 0) if isinstance(each, PerClient) else each for each in args), **kwargs)


def _alike(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether all tensors among the arguments are of clients, and of one shape."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    shapes = {whole(each).shape for each in tensors}
    return len(shapes) == 1 and all(isinstance(each, PerClient) for each in tensors)


def _gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``: what is a number for each client is summed over them, as none depends on another."""
    outs = _several(outputs)
    found = torch.autograd.grad(outs, inputs, _along(outs, grad_outputs), *args, **kwargs)
    return cast(tuple[Any, ...], _wrapped(found))


def _backward(tensors: Tensor | Sequence[Tensor], grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    """``torch.autograd.backward``, likewise."""
    outs = _several(tensors)
    torch.autograd.backward(outs, _along(outs, grad_tensors), *args, **kwargs)


def _several(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else [*tensors]


def _along(outs: Sequence[Tensor], given: Any) -> list[Tensor]:
    """The gradients that a backward pass begins with: ones where none are given."""
    along = [None] * len(outs) if given is None else _several(given)
    return [torch.ones_like(out) if each is None else each for out, each in zip(outs, along, strict=True)]


def _mapped(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A function of torch for each client."""
    if "out" in kwargs:
        raise ApartError(f"{_name(func)} writes into a given tensor")
    found: list[Tensor] = []
    _collect((args, kwargs), found)
    in_place = _writes(func)

    def of_one(*tensors: Tensor) -> Any:
        given = iter(tensors)
        own = cast(tuple[Sequence[Any], Mapping[str, Any]], _filled((args, kwargs), given))
        result = func(*own[0], **own[1])
        return own[0][0] if in_place else result

    try:
        result = torch.vmap(of_one)(*found)
    except (RuntimeError, ValueError, TypeError) as error:
        if ran_out(error):
            raise
        raise ApartError(
            f"{_name(func)}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    return args[0] if in_place else _wrapped(result)


def _writes(func: Any) -> bool:
    name = _name(func)
    return name in _WRITING or (name.endswith("_") and not name.endswith("__"))


_WRITING = frozenset(
    f"__{name}__"
    for name in "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul".split()
)


def _collect(value: Any, found: list[Tensor]) -> None:
    """All tensors of clients in nested arguments, in order."""
    if isinstance(value, PerClient):
        found.append(value)
    elif isinstance(value, tuple | list):
        for each in cast("Sequence[Any]", value):
            _collect(each, found)
    elif isinstance(value, dict):
        for each in cast("dict[Any, Any]", value).values():
            _collect(each, found)


def _filled(value: Any, given: Iterator[Tensor]) -> Any:
    """The same arguments with other tensors in the place of clients'."""
    if isinstance(value, PerClient):
        return next(given)
    if isinstance(value, tuple | list):
        items = [_filled(each, given) for each in cast("Sequence[Any]", value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _filled(each, given) for key, each in cast("dict[Any, Any]", value).items()}
    return value


def _wrapped(result: Any) -> Any:
    """What vmap gives, as clients'."""
    if isinstance(result, Tensor):
        return result.as_subclass(PerClient)
    if isinstance(result, tuple | list):
        items = [_wrapped(each) for each in cast("Sequence[Any]", result)]
        if isinstance(result, list):
            return items
        kind = cast("type[Any]", type(result))
        return tuple(items) if kind is tuple else kind(*items) if hasattr(kind, "_fields") else kind(items)
    return result


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
