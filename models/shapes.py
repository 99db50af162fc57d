"""What a module makes of an input's shape, found without computing or touching anything."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from cutlayer.models.cutting import Crossing


def sample(
    shape: Sequence[int], count: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Zeros as a model takes them: images [count, c, h, w] of this dtype, or tokens, int64 [count, l]."""
    return torch.zeros(count, *shape, dtype=torch.int64 if len(shape) == 1 else dtype, device=device)


class QuickShapes(TorchFunctionMode):
    """In the block batch normalisation on the meta device gives its input's shape at once.

    Torch works it out in Python there, operation by operation: most of what a pass of a deep network takes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_normalised if func is F.batch_norm else func)(*args, **(kwargs or {}))


class KnownIntegers(TorchDispatchMode):
    """In the block integers on the meta device keep their values beside it, so that a model may branch on them.

    So positions and masks of texts are as on a processor; what is made of weights has no values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        taken = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and taken[0] in self._known:
            return self._known[taken[0]].item()
        output = func(*args, **kwargs)
        made = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        meta = bool(made) and all(each.is_meta and not each.is_floating_point() for each in made)
        if meta and all(each in self._known or not each.is_meta for each in taken):
            given, named = tree_map(self._value, (args, kwargs))
            values = tree_leaves(func(*given, **named))
            self._known.update(zip(made, (each for each in values if isinstance(each, Tensor)), strict=True))
        return output

    def _value(self, each: Any) -> Any:
        if isinstance(each, Tensor):
            return self._known.get(each, each)
        return torch.device("cpu") if isinstance(each, torch.device) else each


def _normalised(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    **more: float,
) -> Tensor:
    """What `F.batch_norm` gives; torch itself is asked where it may refuse."""
    lengths = {len(values) for values in (running_mean, running_var, weight, bias) if values is not None}
    fits = input.is_meta and input.dim() > 1 and lengths <= {input.shape[1]}
    if fits and not (training and input.numel() <= input.shape[1]):
        return torch.empty_like(input)
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, **more)


def trace(module: nn.Module, x: Crossing) -> Any:
    """What `module` gives for `x`, both on the meta device: shape only, and the module's own state is not touched."""
    state = {name: t.to("meta") for name, t in chain(module.named_parameters(), module.named_buffers())}
    with torch.no_grad(), QuickShapes():
        return functional_call(module, state, (x,))


def output_width(output: Tensor) -> int:
    """The width of what a layer gives: c of [b, c, h, w], d of [b, tokens, d] and of [b, d]."""
    return output.shape[-1] if output.dim() == 3 else output.shape[1]
