"""What stands in for a GPU's graphs on a processor: passes whose results the next ones write over."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cutlayer.runtime.parties.graphs import WARM_UP, joined_gradients


class ReplayedPasses:
    """As `GraphPasses`: one input, one output and one row of gradients, for good; what a pass needs is kept once."""

    made = 0

    def __init__(self, run: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> None:
        type(self).made += 1
        self._run, self._parameters = run, parameters
        self._x = x.detach().clone().requires_grad_(x.requires_grad)
        for _ in range(WARM_UP):
            output = run(self._x)
            own, joined = joined_gradients(output, self._x, parameters, torch.ones_like(output))
        self._output = torch.full_like(output, torch.nan)
        self._own, self._joined = own, torch.full_like(joined, torch.nan)
        self._graph: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self._x.copy_(x)
        with torch.enable_grad():
            self._graph = self._run(self._x)
        return self._output.copy_(self._graph.detach())

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        assert self._graph is not None, "a backward pass whose activations are gone"
        own, joined = joined_gradients(self._graph, self._x, self._parameters, gradient)
        self._graph = None
        if own is not None and self._own is not None:
            self._own.copy_(own)
        return self._own, self._joined.copy_(joined)
