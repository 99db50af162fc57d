"""What a module makes of an input's shape, found without computing or touching anything."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cutlayer.models.cutting import Crossing


def sample(
    shape: Sequence[int], count: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Zeros as a model takes them: images [count, c, h, w] of this dtype, or tokens, int64 [count, l]."""
    return torch.zeros(count, *shape, dtype=torch.int64 if len(shape) == 1 else dtype, device=device)


def trace(module: nn.Module, x: Crossing) -> Any:
    """What `module` gives for `x`, both on the meta device: shape only, and the module's own state is not touched."""
    state = {name: t.to("meta") for name, t in chain(module.named_parameters(), module.named_buffers())}
    with torch.no_grad():
        return functional_call(module, state, (x,))


def output_width(output: Tensor) -> int:
    """The width of what a layer gives: c of [b, c, h, w], d of [b, tokens, d] and of [b, d]."""
    return output.shape[-1] if output.dim() == 3 else output.shape[1]
