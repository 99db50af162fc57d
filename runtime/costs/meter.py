"""What a party computes and keeps while it works: operations, activations, gradients, what optimizers keep."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cutlayer.models.frozen import frozen_in
from cutlayer.runtime.parties.blueprint import Parts


class _Kept:
    """A tensor that is kept for a backward pass, until the graph lets go of it."""

    def __init__(self, meter: Meter, tensor: Tensor) -> None:
        self.meter, self.tensor = meter, tensor
        meter.keep(tensor)

    def __del__(self) -> None:
        self.meter.forget(self.tensor)


class _Operations(TorchDispatchMode):
    """Counts floating-point operations by torch's own table, of `torch.utils.flop_counter`.

    Its counter keeps hooks in the graph that `torch.autograd.grad` does not allow; this counts each pass separately.
    """

    forward = 0
    backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            operations = count(*args, **kwargs, out_val=output)
            if torch._C._current_graph_task_id() == -1:  # pyright: ignore[reportPrivateUsage]
                self.forward += operations
            else:
                self.backward += operations
        return output


class Meter:
    """What a client computes and keeps while it works.

    Args:
        parts: the client's; their tensors are no activations.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._weights = {_storage(t) for part in parts.values() for t in (*part.parameters(), *part.buffers())}
        self._kept: dict[int, int] = {}  # how often each storage is kept
        self._now = 0
        self._gradients: dict[int, int] = {}
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self.activations = 0
        self.operations = _Operations()

    @contextmanager
    def working(self) -> Generator[None]:
        """What the client does inside is metered; a graph may outlive the block."""
        with ExitStack() as stack:
            stack.enter_context(self.operations)
            stack.enter_context(saved_tensors_hooks(lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor))
            stack.callback(register_optimizer_step_post_hook(self._on_step).remove)
            yield
        self._look(parameter for part in self._parts.values() for parameter in part.parameters())

    def keep(self, tensor: Tensor) -> None:
        """A tensor is kept for a backward pass: its storage counts, once."""
        key = _storage(tensor)
        if key not in self._weights:
            self._kept[key] = self._kept.get(key, 0) + 1
            if self._kept[key] == 1:
                self._now += tensor.untyped_storage().nbytes()
                self.activations = max(self.activations, self._now)

    def forget(self, tensor: Tensor) -> None:
        """It is kept no longer."""
        key = _storage(tensor)
        if key in self._kept:
            self._kept[key] -= 1
            if not self._kept[key]:
                del self._kept[key]
                self._now -= tensor.untyped_storage().nbytes()

    def _on_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._optimizers[id(optimizer)] = optimizer
        self._look(parameter for group in optimizer.param_groups for parameter in group["params"])

    def _look(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                self._gradients[id(parameter)] = parameter.grad.nbytes

    @property
    def gradients(self) -> int:
        """Bytes of all gradients that were seen."""
        return sum(self._gradients.values())

    @property
    def optimizer(self) -> int:
        """Bytes of what the optimizers that took a step keep."""
        entries = (entry for each in self._optimizers.values() for entry in each.state.values())
        return sum(value.nbytes for entry in entries for value in entry.values() if isinstance(value, Tensor))


def frozen_bytes(parts: Parts) -> int:
    """Bytes of what nothing trains, which no state has; what parts share is there once."""
    frozen = {_storage(each): each for part in parts.values() for _, _, each in frozen_in(part)}
    return sum(each.numel() * each.element_size() for each in frozen.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]  its address, which on the meta device is that of no values
