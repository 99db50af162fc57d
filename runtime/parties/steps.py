"""A step of an optimizer of torch that is recorded: what decides how it steps, and what it keeps, in fixed memory."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Hashable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cutlayer.runtime.parties.recording import Replay

_copy: Any = cast(Any, torch)._foreach_copy_
Kept = tuple[tuple[tuple[str, Hashable], ...], ...]
"""By parameter, what an optimizer keeps of it: names, with the kind of each tensor, or None."""


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that an optimizer steps, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def options_of(optimizer: torch.optim.Optimizer) -> list[Any] | None:
    """The options of all groups, rates among them; None where one is a tensor, of which nobody knows who changes it."""
    found = [value for group in optimizer.param_groups for name, value in group.items() if name != "params"]
    return None if any(isinstance(value, Tensor) for value in found) else [type(optimizer), *found]


def kept_by(optimizer: torch.optim.Optimizer) -> Kept | None:
    """What an optimizer keeps; None where that is a number of Python's, which a recorded step would not change."""
    found: list[tuple[tuple[str, Hashable], ...]] = []
    for parameter in parameters_of(optimizer):
        entry: dict[str, Any] = optimizer.state.get(parameter, {})
        if not all(value is None or isinstance(value, Tensor) for value in entry.values()):
            return None
        found.append(tuple((name, _kind(value)) for name, value in entry.items()))
    return tuple(found)


def _kind(value: Tensor | None) -> Hashable:
    return None if value is None else (value.shape, value.stride(), value.dtype, value.device)


class StateInPlace:
    """The tensors that an optimizer keeps at this moment."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._state: Any = optimizer.state
        self._entries: list[dict[str, Any]] = [*self._state.values()]
        self._places = [*map(id, self._entries)]
        self._bound = [(entry, name, value) for entry in self._entries for name, value in entry.items()]

    def still(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it keeps the same tensors, not others in their place."""
        return (
            optimizer.state is self._state
            and [*map(id, self._state.values())] == self._places
            and sum(map(len, self._entries)) == len(self._bound)
            and all(entry.get(name) is value for entry, name, value in self._bound)
        )

    def put_back(self) -> None:
        """Let it keep these tensors again."""
        for entry in self._entries:
            entry.clear()
        for entry, name, value in self._bound:
            entry[name] = value
        for key in [key for key, entry in self._state.items() if id(entry) not in self._places]:
            del self._state[key]

    def leave(self) -> None:
        """Let it keep copies from now on, where it keeps these tensors yet."""
        for entry, name, value in self._bound:
            if entry.get(name) is value and value is not None:
                entry[name] = value.clone()


class StepState:
    """The memory of what optimizers of a kind keep of the same parameters: at any time it is one optimizer's.

    Args:
        optimizer: whose tensors it is, and who has it first. kept: what it keeps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, kept: Kept) -> None:
        self.kept, self._kind = kept, type(optimizer)
        self._tensors = _tensors(optimizer)
        self._owner, self._place = weakref.ref(optimizer), StateInPlace(optimizer)

    def take(self, optimizer: torch.optim.Optimizer) -> bool:
        """Let it be an optimizer's, with what that keeps; False where that keeps something else.

        The one before, where it lives yet, goes on with copies.
        """
        before = self._owner()
        if before is optimizer and self._place.still(optimizer):
            return True
        if type(optimizer) is not self._kind or kept_by(optimizer) != self.kept:
            return False
        if before is not None and before is not optimizer:
            self._place.leave()
        own = _tensors(optimizer)
        if own:
            _copy(self._tensors, own)
        tensors = iter(self._tensors)
        for parameter in parameters_of(optimizer):
            entry: dict[str, Any] = optimizer.state.get(parameter, {})
            entry.update({name: next(tensors) for name, value in entry.items() if value is not None})
        self._owner, self._place = weakref.ref(optimizer), StateInPlace(optimizer)
        return True


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    entries = [optimizer.state[each] for each in parameters_of(optimizer) if each in optimizer.state]
    return [value for entry in entries for value in entry.values() if value is not None]


class RecordedStep(NamedTuple):
    """A step along the gradients in the row of some passes."""

    options: list[Any]
    state: StepState
    replay: Replay


@contextmanager
def recordable(optimizers: Sequence[torch.optim.Optimizer]) -> Generator[None]:
    """Steps of these optimizers, along the gradients that parameters hold, are recorded inside.

    Afterwards parameters hold the gradients that they held, and optimizers keep what they kept.

    Raises:
        RuntimeError: a step puts other tensors in the place of those that an optimizer keeps; what it keeps is not
            where its parameters are, so that a replay would not change it; or hooks look on.
    """
    held = [(parameter, parameter.grad) for each in optimizers for parameter in parameters_of(each)]
    states = [StateInPlace(each) for each in optimizers]
    # Torch refuses to record Adam's step unless this is set, which a fused one does not read.
    fused = [g for each in optimizers for g in each.param_groups if g.get("fused") and g.get("capturable") is False]
    if any(each._optimizer_step_pre_hooks or each._optimizer_step_post_hooks for each in optimizers):  # pyright: ignore[reportPrivateUsage]  there is no other way to know
        raise RuntimeError("an optimizer has hooks")
    for each in optimizers:
        if {kept.device for kept in _tensors(each)} - {parameter.device for parameter in parameters_of(each)}:
            raise RuntimeError("an optimizer keeps tensors elsewhere than its parameters are")
    try:
        for group in fused:
            group["capturable"] = True
        yield
        if not all(state.still(each) for state, each in zip(states, optimizers, strict=True)):
            raise RuntimeError("what an optimizer keeps is made anew in each step")
    finally:
        for group in fused:
            group["capturable"] = False
        for state in states:
            state.put_back()
        for parameter, gradient in held:
            parameter.grad = gradient
