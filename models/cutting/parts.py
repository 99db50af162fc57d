"""The parts of a cut model: each runs the model's own forward, with what it does not own answered from what crossed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cutlayer.models.cutting.crossing import as_crossing
from cutlayer.models.cutting.recording import INPUT, Origin


class Reached(Exception):
    """The forward pass of a part has come to its cut."""


Sizes = tuple[int, int]
"""A batch's number of samples, and the length of its sequences: 0 where there are none."""


@dataclass(frozen=True)
class Extent:
    """A tensor's shape as a function of batch size b and length l: per dimension a * b + k * l + c, as (a, k, c)."""

    dims: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, shapes: Sequence[Sequence[int]], sizes: Sequence[Sizes]) -> Extent:
        """From the shapes at (b, l), at (b + 1, l) and, where there are sequences, at (b, l + 1)."""
        counts = {len(shape) for shape in shapes}
        if len(counts) > 1:
            raise ValueError(f"a value has {' and '.join(map(str, sorted(counts)))} dimensions at different sizes")
        (batch, length), dims = sizes[0], list[tuple[int, int, int]]()
        for first, *others in zip(*shapes, strict=True):
            a, k = [other - first for other in others] + [0] * (2 - len(others))
            dims.append((a, k, first - a * batch - k * length))
        return cls(tuple(dims))

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape at a batch size and a length."""
        return tuple(a * sizes[0] + k * sizes[1] + c for a, k, c in self.dims)

    def sizes(self, shape: Sequence[int]) -> tuple[int | None, int | None]:
        """The batch size and the length at which a tensor has this shape; None for one that it does not tell.

        Raises:
            ValueError: at none.
        """
        wrong = f"{list(shape)} is no shape that crosses this cut; the model was cut for inputs of one size"
        if len(shape) != len(self.dims):
            raise ValueError(wrong)
        pairs = [*zip(shape, self.dims, strict=True)]
        batch = next(((side - c) // a for side, (a, k, c) in pairs if a and not k), None)
        length = next(((side - c) // k for side, (a, k, c) in pairs if k and not a), None)
        if self.shape((batch or 0, length or 0)) != tuple(shape) and not self._mixed(pairs):
            raise ValueError(wrong)
        return batch, length

    def _mixed(self, pairs: Sequence[tuple[int, tuple[int, int, int]]]) -> bool:
        """Whether a side depends on batch size and length, so that they are told by other tensors."""
        return any(a and k for _, (a, k, _) in pairs)


@dataclass(frozen=True)
class Answer:
    """What a unit of an earlier part gave in one call: how to put it together again, and its tensors' looks."""

    tree: Any
    constants: tuple[Any, ...]
    extents: dict[int, Extent]
    dtypes: dict[int, torch.dtype]


@dataclass(frozen=True)
class Plan:
    """What one part does in one mode (training or evaluation).

    Attributes:
        first: whether it takes the model's own inputs.
        takes, gives: the values that cross into it and out of it, in order.
        extents: of the values in ``takes``.
        inputs: the model's inputs: a tensor's looks, or the constant itself.
        answers: per unit, what it answers call by call; None for a call that this part makes itself.
        same: values that are the object of another.
        copied_out: values copied when they appear, as the model writes into them later.
        copied_in: received values that the part writes into.
        length: of the sequences that it was recorded with, for a part to which nothing that crosses tells it.
    """

    first: bool
    takes: tuple[Origin, ...]
    gives: tuple[Origin, ...]
    extents: dict[Origin, Extent]
    inputs: dict[str, tuple[Extent, torch.dtype] | None]
    constants: dict[str, Any]
    answers: dict[str, tuple[Answer | None, ...]]
    same: dict[Origin, Origin]
    copied_out: frozenset[Origin]
    copied_in: frozenset[Origin]
    length: int

    def __deepcopy__(self, _: Any) -> Plan:
        """Itself: nothing in it changes, and a copied part has the same plan."""
        return self


class Wire:
    """What a part holds during one forward pass: what it received, what it has to give so far, whose turn it is."""

    def __init__(self) -> None:
        self.close()

    def open(self, plan: Plan, received: Sequence[Tensor]) -> None:
        """Begin a pass.

        Raises:
            TypeError: another number of tensors than cross here.
            ValueError: a tensor of a shape that does not.
        """
        if len(received) != len(plan.takes):
            raise TypeError(f"expected {len(plan.takes)} tensors, got {len(received)}")
        self.plan = plan
        self.counts = {}
        self.values = dict(zip(plan.takes, received, strict=True))
        found = [plan.extents[value].sizes(tensor.shape) for value, tensor in self.values.items()]
        batches, lengths = ({*each} - {None} for each in zip(*found, (None, None), strict=True))
        if len(batches) > 1 or len(lengths) > 1:
            told = sorted(map(str, batches if len(batches) > 1 else lengths))
            raise ValueError(f"the tensors that crossed are of different batch sizes or lengths: {told}")
        self.sizes = next(iter(batches), None) or 0, next(iter(lengths), None) or plan.length
        self.like = next((tensor for tensor in received if tensor.is_floating_point()), None)
        for value in plan.copied_in & self.values.keys():
            self.values[value] = self.values[value].clone()

    def close(self) -> None:
        """End a pass: let go of all tensors."""
        self.plan: Plan | None = None
        self.values: dict[Origin, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.sizes: Sizes = (0, 0)
        self.like: Tensor | None = None

    def next_call(self, path: str) -> int:
        """The number of this call of a unit, from 0."""
        number = self.counts.get(path, 0)
        self.counts[path] = number + 1
        return number

    def blank(self, extent: Extent, dtype: torch.dtype) -> Tensor:
        """A stand-in for a value that nothing here depends on, only its shape."""
        if self.like is None:
            return torch.zeros(extent.shape(self.sizes), dtype=dtype)
        dtype = self.like.dtype if dtype.is_floating_point else dtype
        return torch.zeros(extent.shape(self.sizes), dtype=dtype, device=self.like.device)

    def answer(self, path: str, call: int) -> Any:
        """What the unit gave in the part that it belongs to."""
        assert self.plan is not None
        answer = self.plan.answers[path][call]
        assert answer is not None
        leaves = list(answer.constants)
        for index, extent in answer.extents.items():
            value = Origin(path, call, index)
            tensor = self.values.get(self.plan.same.get(value, value))
            leaves[index] = self.blank(extent, answer.dtypes[index]) if tensor is None else tensor
        return leaves[0] if answer.tree is None else pytree.tree_unflatten(leaves, answer.tree)

    def arguments(self) -> dict[str, Any]:
        """The inputs of the model as a part behind the first sees them."""
        assert self.plan is not None
        given = dict(self.plan.constants)
        for name, looks in self.plan.inputs.items():
            if looks is not None:
                tensor = self.values.get(Origin(f"{INPUT}{name}", 0, 0))
                given[name] = self.blank(*looks) if tensor is None else tensor
        return given


class Stub:
    """The forward of a unit that belongs to another part, in whole or in some of its calls."""

    def __init__(self, wire: Wire, path: str, own: nn.Module | None = None) -> None:
        self.wire, self.path, self.own = wire, path, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.wire.plan
        if plan is None or self.path not in plan.answers:
            raise RuntimeError(f"this part does not own {self.path}")
        call = self.wire.next_call(self.path)
        if plan.answers[self.path][call] is not None:
            return self.wire.answer(self.path, call)
        assert self.own is not None
        return type(self.own).forward(self.own, *args, **kwargs)


class Capture:
    """A forward hook that keeps what a unit of this part gives, if that crosses, and ends the pass at the cut."""

    def __init__(self, wire: Wire, path: str, *, is_cut: bool) -> None:
        self.wire, self.path, self.is_cut = wire, path, is_cut
        self.name = f"{path} "  # a count of its own, beside a stub's

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        plan = self.wire.plan
        if plan is None:
            return
        call = self.wire.next_call(self.name)
        for index, leaf in enumerate(pytree.tree_leaves(output)):
            value = Origin(self.path, call, index)
            if isinstance(leaf, Tensor) and value in plan.gives and value not in self.wire.values:
                self.wire.values[value] = leaf.clone() if value in plan.copied_out else leaf
        if self.is_cut:
            raise Reached


class Part(nn.Module):
    """One part of a cut model.

    The first takes the model's inputs, each other what crossed the cut before it, of several tensors all as one tuple
    or as arguments of their own. All but the last return what crosses the cut after them; the last returns the model's
    output. Parameters and buffers have the model's own names.
    """

    skeleton: nn.Module

    def __init__(self, skeleton: nn.Module, wire: Wire, plans: dict[bool, Plan]) -> None:
        super().__init__()
        state = vars(self)
        state["skeleton"] = skeleton  # not a child: its children, parameters and buffers are this module's own
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            state[name] = getattr(skeleton, name)
        self._wire, self._plans = wire, plans
        self.training = skeleton.training

    def train(self, mode: bool = True) -> Part:
        super().train(mode)
        self.skeleton.training = mode
        return self

    @property
    def crossing(self) -> int:
        """How many tensors this part gives in its present mode; 0 for the last part."""
        return len(self._plans[self.training].gives)

    def forward(self, *received: Any, **inputs: Any) -> Any:
        """Run this part.

        Raises:
            TypeError, ValueError: what was received does not fit.
        """
        plan, wire = self._plans[self.training], self._wire
        if not plan.first and len(received) == 1 and isinstance(received[0], tuple):
            received = received[0]
        wire.open(plan, () if plan.first else received)
        try:
            if not plan.first:
                return self.skeleton(**wire.arguments())
            for name, value in zip(plan.inputs, received, strict=False):
                inputs[name] = value
            for value in plan.gives:
                if value.path.startswith(INPUT):
                    wire.values[value] = inputs[value.path.removeprefix(INPUT)]
            return self.skeleton(**{**plan.constants, **inputs})
        except Reached:
            return as_crossing(tuple(wire.values[value] for value in plan.gives))
        finally:
            wire.close()


def shell(module: nn.Module) -> nn.Module:
    """A module with the tables of another, copied, so that entries may be exchanged: what is in them is shared."""
    twin = type(module).__new__(type(module))
    vars(twin).update(vars(module))
    for name, value in vars(module).items():
        if name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set") or "_hooks" in name:
            vars(twin)[name] = copy.copy(value)
    return twin


def shells(module: nn.Module) -> nn.Module:
    """`shell` of a module and of all in it."""
    twin = shell(module)
    for name, child in twin._modules.items():
        if child is not None:
            twin._modules[name] = shells(child)
    return twin


def ghost(module: nn.Module, wire: Wire, path: str) -> nn.Module:
    """A module of another part: the same class, attributes and children, but no parameters, and answers for a forward.

    Code that asks for its kind, walks through its children or looks at a weight's dtype sees what it expects.
    """
    twin = shell(module)
    for table in ("_parameters", "_buffers"):
        for name, tensor in list(vars(twin)[table].items()):
            if tensor is not None:
                del vars(twin)[table][name]
                vars(twin)[name] = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    for name in vars(twin):
        if "_hooks" in name:
            vars(twin)[name] = OrderedDict()
    for name, child in twin._modules.items():
        if child is not None:
            twin._modules[name] = ghost(child, wire, f"{path}.{name}")
    vars(twin)["forward"] = Stub(wire, path)
    vars(twin)["_load_from_state_dict"] = _load_nothing  # BatchNorm's own would ask for its statistics
    return twin


def is_ghost(module: nn.Module) -> bool:
    """Whether a module in a part belongs to another part in all its calls."""
    forward = vars(module).get("forward")
    return isinstance(forward, Stub) and forward.own is None


def _load_nothing(
    state: dict[str, Any], prefix: str, _metadata: Any, strict: bool, _missing: Any, unexpected: list[str], _errors: Any
) -> None:
    """What a ghost loads of a state dict; it has no place for anything."""
    if strict:
        unexpected += [key for key in state if key.startswith(prefix) and key not in unexpected]
