"""Weights that nothing trains: all copies of a model have them in one memory, and no state of it holds them.

They are buffers of a module that are not persistent, so that they are neither sent, nor kept, averaged or saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class FrozenTensor(torch.Tensor):
    """A tensor that never changes: a copy of it is itself. What is computed with it are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    def __deepcopy__(self, _: Any) -> FrozenTensor:
        return self


def share_frozen(model: nn.Module) -> None:
    """Make buffers of the parameters of a model that need no gradient, in place; a tied one stays tied."""
    made: dict[int, FrozenTensor] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                del module._parameters[name]
                shared = made.setdefault(id(parameter), parameter.detach().as_subclass(FrozenTensor))
                module.register_buffer(name, shared, persistent=False)


def unshare(model: nn.Module) -> None:
    """Make parameters of them again that need no gradient, in the same memory."""
    made: dict[int, nn.Parameter] = {}
    for module, name, shared in frozen_in(model):
        del module._buffers[name]
        module._non_persistent_buffers_set.discard(name)
        plain = nn.Parameter(shared.as_subclass(Tensor), requires_grad=False)
        module.register_parameter(name, made.setdefault(id(shared), plain))


def share_again(found: tuple[nn.Module, str, FrozenTensor], moved: dict[int, FrozenTensor]) -> None:
    """Share again what became a plain tensor as its module went to a device.

    Args:
        found: of `frozen_in`, before. moved: what shared tensors became, of all modules so far; those of one model's
            parts stay one.
    """
    module, name, before = found
    now = module._buffers[name]
    assert now is not None
    after = moved.setdefault(id(before), now.as_subclass(FrozenTensor))
    moved[id(after)] = after
    module._buffers[name] = after


def fill_whole(model: nn.Module, state: Mapping[str, Tensor], parts: Iterable[nn.Module]) -> None:
    """Give a whole model the tensors of a state, and of its parts those that no state has, in the same memory.

    It shares none itself, see `unshare`.
    """
    loaded: Any = model.load_state_dict(dict(state), strict=False)
    assert not loaded.unexpected_keys
    buffers = {name: each for part in parts for name, each in part.named_buffers(remove_duplicate=False)}
    for name in loaded.missing_keys:
        model.get_parameter(name).data = buffers[name].as_subclass(Tensor)


def thaw(model: nn.Module) -> None:
    """Make parameters of them that learn, in memory of their own."""
    unshare(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_()


def frozen_in(model: nn.Module) -> list[tuple[nn.Module, str, FrozenTensor]]:
    """The shared tensors of a model: the module that has each, its name there, the tensor."""
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if isinstance(buffer, FrozenTensor)
    ]
