"""Passes of a part of several clients that are recorded and replayed as one (``compile`` with ``cohort.together``)."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cutlayer.runtime.parties.graphs import PassRecorder, ReplayedForward, is_recordable
from cutlayer.runtime.parties.per_client import PerClient, whole


class AllClients(nn.Module):
    """A part of several clients, of ordinary tensors: x [clients, b, ...] -> [clients, b, ...].

    Its parameters and buffers are in the memory of the clients'.

    Args:
        part: its parameters and buffers are `PerClient`. single: the same of one client.
    """

    def __init__(self, part: nn.Module, single: nn.Module) -> None:
        super().__init__()
        self._single = [single]  # in a list: it is no module of this one
        self._names = [name for name, _ in part.named_parameters()]
        self._buffer_names = [name for name, _ in part.named_buffers()]
        for index, parameter in enumerate(part.parameters()):
            own = nn.Parameter(whole(parameter.detach()), requires_grad=parameter.requires_grad)
            self.register_parameter(f"parameter{index}", own)
        for index, buffer in enumerate(part.buffers()):
            self.register_buffer(f"buffer{index}", whole(buffer))

    def forward(self, x: Tensor) -> Tensor:
        """The output of each client."""
        state = {
            **dict(zip(self._names, self.parameters(), strict=True)),
            **dict(zip(self._buffer_names, self.buffers(), strict=True)),
        }

        def of_one(state: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self._single[0], state, (x,))

        return torch.vmap(of_one)(state, x)


class StackedForward:
    """The forward pass of such a part: replayed where that gives the same, else computed operation by operation."""

    def __init__(self, part: nn.Module, single: nn.Module, recorder: PassRecorder) -> None:
        self._part, self._own = part, type(part).forward
        self._leaves, self._modules = [*part.parameters()], [*part.modules()]
        self._replayed = ReplayedForward(AllClients(part, single), recorder)

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Any:
        """A copy of the part computes by itself."""
        return types.MethodType(self._own, memo[id(self._part)])

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if len(inputs) == 1 and not named and isinstance(inputs[0], PerClient) and self._is_training():
            for ordinary, leaf in zip(self._replayed.parameters, self._leaves, strict=True):
                ordinary.requires_grad_(leaf.requires_grad)
            found = self._replayed.replay(whole(inputs[0]), [whole(leaf) for leaf in self._leaves])
            if found is not None:
                return found.as_subclass(PerClient)
        return self._own(self._part, *inputs, **named)

    def _is_training(self) -> bool:
        return all(module.training for module in self._modules)


def let_replay(part: nn.Module, single: nn.Module, recorder: PassRecorder) -> None:
    """Let a part of several clients, whose modules are those of one's, replay its passes, where it can be recorded."""
    if is_recordable([whole(parameter) for parameter in part.parameters()]):
        part.forward = StackedForward(part, single, recorder)
