"""Tensors of several clients as one: what is computed with such a tensor is computed with that of each client.

In memory a `PerClient` is [clients, ...]; its shape, and what any function of torch makes of it, are those of one
client. A function is computed by ``torch.vmap`` over the clients, and autograd records what vmap computes. So a
client's program runs once, unchanged, for many clients. What cannot be the same computation for all of them (a value
that is read, a random number, a selection by value) raises `ApartError`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.runtime.ground.memory import ran_out

# Slower, but right; where it matters `cohort.together=auto` finds out.
warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented the batching rule")
T = TypeVar("T")


class ApartError(Exception):
    """These clients cannot be computed as one; the text says why."""


class PerClient(Tensor):
    """A tensor for each of several clients; see this module. Made by `stacked`, taken apart by `apart`."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, stored = kwargs or {}, cast(Any, super()).__torch_function__
        if func in _OF_ONE:
            return _one(func, args, kwargs)
        if func in _AS_STORED:
            found = stored(func, types, args, kwargs)
            # A gradient is not made a subclass's by torch.
            return found.as_subclass(cls) if func == _T.grad.__get__ and found is not None else found
        if func in _READING:
            raise ApartError(f"a value is read by {_name(func)}")
        if func in _ELEMENTWISE and _alike(args, kwargs):
            return stored(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]  what torch's own default does
            if func is torch.autograd.grad:
                return _gradients(*args, **kwargs)
            if func is torch.autograd.backward:
                return _backward(*args, **kwargs)
            return _mapped(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            twin = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)] = nn.Parameter(twin, self.requires_grad) if isinstance(self, nn.Parameter) else twin
        return memo[id(self)]


_T: Any = Tensor  # its methods and properties, as torch names them
_OF_ONE: set[Any] = {
    *(_T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.__len__, _T.stride),
    *(_T.shape.__get__, _T.ndim.__get__, _T.nbytes.__get__, torch.numel, _T.is_contiguous),
    *(torch.is_same_size, _T.is_same_size),
}
"""What is said of one client's tensor."""

_AS_STORED: set[Any] = {
    *(
        _T.device.__get__,
        _T.dtype.__get__,
        _T.layout.__get__,
        _T.is_cuda.__get__,
        _T.is_cpu.__get__,
    ),
    *(_T.is_meta.__get__, _T.is_sparse.__get__, _T.is_quantized.__get__, _T.is_nested.__get__),
    *(_T.is_mkldnn.__get__, _T.is_leaf.__get__, _T.itemsize.__get__, _T.element_size),
    *(_T.is_floating_point, torch.is_floating_point, _T.is_complex, torch.is_complex, _T.is_inference),
    *(_T.requires_grad.__get__, _T.requires_grad.__set__, _T.requires_grad_, _T.retain_grad),
    *(_T.grad.__get__, _T.grad.__set__, _T.grad_fn.__get__, _T.data.__get__, _T._version.__get__),
    *(_T.detach, _T.detach_, _T.clone, torch.clone, _T.get_device),
    *(_T.as_subclass, _T._backward_hooks.__get__, _T.is_set_to, _T.data_ptr),
}
"""What is the same of all clients' tensors, or is done to each element."""

_ELEMENTWISE: set[Any] = {
    *(
        _T.add,
        _T.sub,
        _T.mul,
        _T.div,
        _T.__add__,
        _T.__sub__,
        _T.__mul__,
        _T.__truediv__,
    ),
    *(_T.__radd__, _T.__rmul__, _T.__neg__, _T.neg, _T.square, _T.lerp, _T.lerp_),
    *(_T.add_, _T.sub_, _T.mul_, _T.div_, _T.__iadd__, _T.__isub__, _T.__imul__),
    *(_T.copy_, _T.zero_, torch.zeros_like, torch.ones_like, torch.relu, functional.relu),
}
"""What is done to each element alone, with that of the same place where there is a second tensor."""

_READING: set[Any] = {
    *(_T.item, _T.tolist, _T.numpy, _T.__bool__, _T.__float__, _T.__int__, _T.__index__),
    *(_T.__complex__, _T.__contains__, _T.__array__, torch.equal, _T.equal, torch.allclose),
    *(_T.allclose, _T.is_nonzero, torch.is_nonzero, _T.backward),
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
    func = _on_a_gpu.get(func, func) if found[0].is_cuda else func
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


def unfolded_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` as one matrix product.

    With weights of each client a convolution becomes a grouped one, which cuDNN computes one group after the other.

    Args:
        input: [b, C, H, W]. weight: [O, C, h, w]. bias: [O].
    """
    if groups != 1 or isinstance(padding, str):
        return functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    (rows, columns), out = weight.shape[2:], len(weight)
    height, width = (
        (side + 2 * pad - dilate * (kernel - 1) - 1) // step + 1
        for side, pad, dilate, kernel, step in zip(
            input.shape[2:], _pair(padding), _pair(dilation), (rows, columns), _pair(stride), strict=True
        )
    )
    patches = functional.unfold(input, (rows, columns), dilation, padding, stride)  # [b, C * h * w, places]
    product = weight.reshape(out, -1) @ patches.transpose(0, 1).reshape(patches.shape[1], -1)
    result = product.view(out, len(input), height, width).transpose(0, 1)
    return result if bias is None else result + bias.view(-1, 1, 1)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


_on_a_gpu: dict[Any, Any] = {functional.conv2d: unfolded_conv2d, torch.conv2d: unfolded_conv2d}


def _writes(func: Any) -> bool:
    name = _name(func)
    return name in _WRITING or (name.endswith("_") and not name.endswith("__"))


_WRITING = frozenset(
    f"__{name}__"
    for name in (
        *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift", "imatmul"),
    )
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
        kind = cast(Any, type)(result)
        return tuple(items) if kind is tuple else kind(*items) if hasattr(kind, "_fields") else kind(items)
    return result


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
