"""What a module makes of an input's shape, found without computing or touching anything."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cutlayer.models.cutting import Crossing


class QuickShapes(TorchFunctionMode):
    """In the block batch normalisation on the meta device gives its input's shape at once.

    Torch works it out in Python there, operation by operation: most of what a pass of a deep network takes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_normalised if func is F.batch_norm else func)(*args, **(kwargs or {}))


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
