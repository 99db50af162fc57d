"""What happens in a forward pass of a model around its cuts: who runs when, and which values are used behind them.

A model that is cut at the end of one or more of its modules falls into *units* and the modules above them. The modules
that contain a cut (and containers that are never called themselves) are *skeleton*: every part runs their own forward.
All others that the skeleton calls are units, each of which runs in the part in which it is called. The values that can
cross a cut are the outputs of units and the inputs of the model; what skeleton code makes of them is computed again
by each part. A recorded pass finds out which of them are used after a cut: every operation in skeleton code is seen
by a `TorchFunctionMode`, and each tensor carries the set of values that it was made from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

INPUT, BARE = "input:", "parameter:"


class Origin(NamedTuple):
    """A value that may cross: the ``place``-th tensor in the output of the ``call``-th call of the unit ``path``.

    ``path`` is ``input:<name>`` for a tensor among the model's inputs, and ``parameter:<name>`` for a parameter that
    skeleton code uses directly, which never crosses.
    """

    path: str
    call: int
    place: int


@dataclass
class Call:
    """One call of a unit: the part that it happens in, and what it gave.

    ``tree`` (None: a tensor alone) and ``constants`` (None where a tensor belongs) rebuild the output, ``shapes`` and
    ``dtypes`` are those of its tensors by position.
    """

    part: int
    tree: Any
    constants: list[Any]
    shapes: dict[int, tuple[int, ...]]
    dtypes: dict[int, torch.dtype]


@dataclass
class Pass:
    """One recorded forward pass.

    Attributes:
        calls: of each unit, in order.
        inputs: shape and dtype of the tensors among the inputs; None marks one that is not a tensor.
        part_of: the part that makes each value.
        needs: per part, the values of earlier parts that it uses.
        same: values that are one tensor object with an earlier value (Identity, in-place ReLU), by that value.
        rewritten: values that skeleton code overwrites in the part that made them; they are sent as they were.
        overwritten: values that a later part writes into, which therefore works on a copy.
        bare: parameters and buffers of the skeleton, by the parts that use them.
        values: the tensors, to compare passes.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict[str, list[Call]])
    inputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(
        default_factory=dict[str, tuple[tuple[int, ...], torch.dtype]]
    )
    part_of: dict[Origin, int] = field(default_factory=dict[Origin, int])
    needs: list[list[Origin]] = field(default_factory=list[list[Origin]])
    same: dict[Origin, Origin] = field(default_factory=dict[Origin, Origin])
    rewritten: set[Origin] = field(default_factory=set[Origin])
    overwritten: set[Origin] = field(default_factory=set[Origin])
    bare: dict[str, set[int]] = field(default_factory=dict[str, set[int]])
    values: dict[Origin, Tensor] = field(default_factory=dict[Origin, Tensor])


class UnreachedError(Exception):
    """The pass did not end the cuts' modules in their order, each once; ``cut`` is the first that it missed."""

    def __init__(self, cut: str, why: str) -> None:
        super().__init__(f"{cut}: {why}")
        self.cut, self.why = cut, why


def all_tensors(values: Any) -> list[Tensor]:
    """All tensors in a nested value."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def contains_cut(path: str, cuts: Iterable[str]) -> bool:
    """Whether a module is the model itself or holds a cut inside."""
    return not path or any(cut.startswith(f"{path}.") for cut in cuts)


def skeleton_paths(model: nn.Module, cuts: Sequence[str], called: set[str]) -> set[str]:
    """Modules whose own code every part runs: those that hold a cut, and containers that nobody calls."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    inner = {name for name in names if name not in called and any(other.startswith(f"{name}.") for other in called)}
    return {name for name in names if contains_cut(name, cuts) or name in inner}


def units(model: nn.Module, skeleton: set[str]) -> dict[str, nn.Module]:
    """The outermost modules that are no skeleton, by path."""
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module._modules.items():
            if child is not None:
                path = f"{prefix}{name}"
                if path in skeleton:
                    visit(child, f"{path}.")
                else:
                    found[path] = child

    visit(model, "")
    return found


def bound(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the model by parameter name; those of ``*args`` cannot be named and are refused."""
    signature = inspect.signature(model.forward)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and given.pop(name, ()):
            raise TypeError(f"{type(model).__name__}.forward takes *{name}; name its inputs")
    return given


@contextmanager
def hooked(modules: Iterable[tuple[nn.Module, Callable[..., Any], Callable[..., Any]]]) -> Iterator[None]:
    """Call the one function before and the other after each forward of the modules, for the length of the block."""
    handles: list[Any] = []
    try:
        for module, before, after in modules:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def called_modules(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """Paths of the modules in the order in which their calls end, one entry for each call; runs the model once."""
    ended: list[str] = []

    def noting(path: str) -> Callable[..., None]:
        return lambda *_: ended.append(path)

    def before(*_: Any) -> None:
        pass

    everyone = [(module, before, noting(path)) for path, module in model.named_modules(remove_duplicate=False) if path]
    with hooked(everyone), torch.no_grad():
        model(**inputs)
    return ended


# Operations that only describe a tensor, and those that make one that has nothing else of it.
_LOOKS = {
    *("__get__", "size", "dim", "ndimension", "__len__", "numel", "nelement", "stride", "element_size", "is_complex"),
    *(
        "is_floating_point",
        "is_contiguous",
        "is_tensor",
        "get_device",
        "storage_offset",
        "type",
        "__hash__",
        "__repr__",
    ),
}
_LIKE = {f"{name}_like" for name in ("zeros", "ones", "empty", "full", "rand", "randn")}
_LIKE |= {f"new_{name}" for name in ("zeros", "ones", "empty", "full", "tensor")}


class Recorder(TorchFunctionMode):
    """Records one forward pass of a model at given cuts; use through `record`."""

    def __init__(self, model: nn.Module, cuts: Sequence[str], skeleton: set[str]) -> None:
        super().__init__()
        self.found = Pass(needs=[[] for _ in range(len(cuts) + 1)])
        self._model, self._cuts, self._skeleton = model, cuts, skeleton
        self._part = 0
        self._depth = 0  # how many units are running
        self._made_from: dict[int, set[Origin]] = {}  # by id of a tensor
        self._is: dict[int, Origin] = {}  # the first value that a tensor object is, by its id
        self._alive: list[Tensor] = []  # ids are of these
        self._versions: dict[Origin, int] = {}  # how often a value had been written to when its part ended
        own = {*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)}
        self._names = {id(tensor): name for name, tensor in own}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._depth:
            return func(*args, **kwargs)
        taken = all_tensors((args, kwargs))
        versions = [tensor._version for tensor in taken]
        output = func(*args, **kwargs)
        made = all_tensors(output)
        name = getattr(func, "__name__", "")
        if name in _LIKE or (name in _LOOKS and not made):
            return output
        before: set[Origin] = set()
        for tensor in taken:
            before |= self._made_from.get(id(tensor), set()) | self._bare(tensor)
        self._use(before)
        if not made and name != "__set__":
            # A number: code may branch on it, and later parts run that code again. A look at the inputs, which never
            # cross, is left to them (mostly it only warns); where it matters, the comparison with the model shows it.
            for part in range(self._part + 1, len(self._cuts) + 1):
                self._need(part, {value for value in before if not value.path.startswith(INPUT)})
        for tensor, version in zip(taken, versions, strict=True):
            if tensor._version != version:
                value = self._is.pop(id(tensor), None)
                if value is not None and self.found.part_of[value] == self._part:
                    self.found.rewritten.add(value)
                self._note(tensor, before)
        for tensor in made:
            if id(tensor) not in self._is:
                self._note(tensor, before)
        return output

    def run(self, inputs: Mapping[str, Any]) -> Pass:
        """Run the model, and give what was seen."""
        for name, value in inputs.items():
            for index, tensor in enumerate(all_tensors(value)):
                if index:
                    raise TypeError(f"input {name} holds several tensors; each must be an input of its own")
                self.found.inputs[name] = tuple(tensor.shape), tensor.dtype
                self._appear(Origin(f"{INPUT}{name}", 0, 0), tensor)
        everyone = units(self._model, self._skeleton)
        hooks = ((unit, self._before, self._after(path)) for path, unit in everyone.items())
        with hooked(hooks), torch.no_grad(), self:
            output = self._model(**inputs)
        if self._part < len(self._cuts):
            cut = self._cuts[self._part]
            ran = cut in self.found.calls
            raise UnreachedError(cut, "it ends before the cut named before it" if ran else "no forward pass calls it")
        for path in self._cuts:
            if len(self.found.calls[path]) > 1:
                raise UnreachedError(path, f"it runs {len(self.found.calls[path])} times in a forward pass")
        self._use(set().union(*(self._made_from.get(id(tensor), set()) for tensor in all_tensors(output))))
        for value, at_end in self._versions.items():
            if self.found.values[value]._version != at_end:
                self.found.overwritten.add(value)
        return self.found

    def _bare(self, tensor: Tensor) -> set[Origin]:
        """A parameter or buffer that skeleton code uses itself."""
        name = self._names.get(id(tensor))
        if name is None:
            return set()
        self.found.bare.setdefault(name, set()).add(self._part)
        if not isinstance(tensor, nn.Parameter):
            return set()
        value = Origin(f"{BARE}{name}", 0, 0)
        self.found.part_of.setdefault(value, self._part)
        return {value}

    def _use(self, values: set[Origin]) -> None:
        self._need(self._part, values)

    def _need(self, part: int, values: set[Origin]) -> None:
        for value in sorted(values):
            if self.found.part_of[value] < part and value not in self.found.needs[part]:
                self.found.needs[part].append(value)

    def _note(self, tensor: Tensor, made_from: set[Origin]) -> None:
        self._made_from[id(tensor)] = set(made_from)
        self._alive.append(tensor)

    def _appear(self, value: Origin, tensor: Tensor) -> None:
        """A value comes into being, or is found to be the same object as an earlier one."""
        self.found.part_of[value] = self._part
        self.found.values[value] = tensor
        first = self._is.get(id(tensor))
        if first is None:
            self._is[id(tensor)] = value
            self._note(tensor, {value})
        else:
            self.found.same[value] = first
            self._made_from[id(tensor)].add(value)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._depth:
            for tensor in all_tensors((args, kwargs)):
                self._use(self._made_from.get(id(tensor), set()) | self._bare(tensor))
        self._depth += 1

    def _after(self, path: str) -> Callable[..., None]:
        def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            self._depth -= 1
            if self._depth:
                return
            calls = self.found.calls.setdefault(path, [])
            leaves, tree = pytree.tree_flatten(output)
            places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            shapes = {index: tuple(leaves[index].shape) for index in places}
            dtypes = {index: leaves[index].dtype for index in places}
            for index in places:
                self._appear(Origin(path, len(calls), index), leaves[index])
            tree = None if isinstance(output, Tensor) else tree
            calls.append(Call(self._part, tree, constants, shapes, dtypes))
            if self._part < len(self._cuts) and path == self._cuts[self._part]:
                for value, tensor in self.found.values.items():
                    self._versions.setdefault(value, tensor._version)
                self._part += 1

        return after


def record(model: nn.Module, cuts: Sequence[str], skeleton: set[str], inputs: Mapping[str, Any]) -> Pass:
    """Run the model once in its present mode and record what happens around its cuts; changes its running statistics.

    Raises:
        UnreachedError: a cut is not reached, not in this order, or more than once.
    """
    return Recorder(model, cuts, skeleton).run(inputs)
