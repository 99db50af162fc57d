"""Cut any `nn.Module` at the end of any of its modules, into parts that together are the model, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.models.cutting.parts import (
    Answer,
    Capture,
    Extent,
    Part,
    Plan,
    Sizes,
    Stub,
    Wire,
    ghost,
    shell,
    shells,
)
from cutlayer.models.cutting.recording import (
    BARE,
    INPUT,
    Origin,
    Pass,
    UnreachedError,
    all_tensors,
    called_modules,
    record,
    skeleton_paths,
    units,
)

BATCHES = (2, 3)
"""Batch sizes that a model is recorded at; what grows from one to the other grows with the batch."""

MAY_CROSS = ("mask",)
"""Inputs of the model that may be sent on: those with one of these in the name. Never the samples themselves."""

_MODES = (False, True)


class CutError(Exception):
    """A model cannot be cut there; ``cut`` is the module at fault."""

    def __init__(self, cut: str, why: str) -> None:
        super().__init__(f"{cut}: {why}")
        self.cut, self.why = cut, why


@dataclass(frozen=True)
class Recording:
    """A model's passes at its cuts: by mode (training or not) at each of the sizes."""

    cuts: tuple[str, ...]
    skeleton: frozenset[str]
    passes: dict[bool, tuple[Pass, ...]]
    sizes: tuple[Sizes, ...]
    constant: frozenset[str]
    constants: dict[str, Any]

    def part_of(self, path: str) -> set[int]:
        """The parts that a unit is called in, in either mode."""
        return {call.part for few, *_ in self.passes.values() for call in few.calls.get(path, ())}

    @property
    def bare(self) -> dict[str, set[int]]:
        """Parts that use each parameter and buffer of the skeleton itself."""
        found: dict[str, set[int]] = {}
        for few, *_ in self.passes.values():
            for name, parts in few.bare.items():
                found.setdefault(name, set()).update(parts)
        return found


def length_of(inputs: Mapping[str, Any]) -> int:
    """The length of the sequences among a model's inputs, tokens [b, l]; 0 where there are none."""
    return next((value.shape[1] for value in inputs.values() if _is_text(value)), 0)


def _is_text(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def example(inputs: Mapping[str, Any], batch: int, seed: int = 0, *, length: int = 0) -> dict[str, Any]:
    """Inputs of another batch size: each tensor's samples drawn again from its own, floating ones with other values.

    Args:
        length: of sequences, up to that of the inputs'; 0 for theirs.
    """
    generator = torch.Generator().manual_seed(seed)

    def sized(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        chosen = value[torch.randint(len(value), (batch,), generator=generator)]
        if length and _is_text(value):
            chosen = chosen[:, :length]
        if chosen.is_floating_point():
            return torch.randn(chosen.shape, generator=generator, dtype=chosen.dtype)
        return chosen

    return {name: sized(value) for name, value in inputs.items()}


def record_modes(model: nn.Module, cuts: Sequence[str], inputs: Mapping[str, Any]) -> Recording:
    """Run a copy of the model in both modes; neither it nor the random state is changed.

    Raises:
        CutError: it cannot be cut there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin = copy.deepcopy(model)
        called: set[str] = set()
        for mode in _MODES:
            called.update(called_modules(twin.train(mode), example(inputs, BATCHES[0])))
        skeleton = skeleton_paths(model, cuts, called)
        passes: dict[bool, tuple[Pass, ...]] = {}
        sizes = _sizes(length_of(inputs))
        try:
            other = record(twin.eval(), cuts, skeleton, example(inputs, BATCHES[0], seed=1, length=sizes[0][1]))
            for mode in _MODES:
                passes[mode] = tuple(
                    record(twin.train(mode), cuts, skeleton, example(inputs, batch, length=length))
                    for batch, length in sizes
                )
        except UnreachedError as error:
            raise CutError(error.cut, error.why) from error
    constant = _constant(model, skeleton, passes[False][0], other)
    given = {name: value for name, value in inputs.items() if not all_tensors(value)}
    return Recording(tuple(cuts), frozenset(skeleton), passes, sizes, frozenset(constant), given)


def _sizes(length: int) -> tuple[Sizes, ...]:
    """Batch sizes and lengths that a model is recorded at, for inputs of this length."""
    if not length:
        return tuple((batch, 0) for batch in BATCHES)
    shorter = max(1, length - 1)
    return (*((batch, shorter) for batch in BATCHES), (BATCHES[0], shorter + 1))


def _constant(model: nn.Module, skeleton: set[str], one: Pass, other: Pass) -> set[str]:
    """Units without parameters that give the same whatever the input, as a table of positions: every part runs them."""
    found: set[str] = set()
    for path, unit in units(model, skeleton).items():
        mine = [value for value in one.values if value.path == path]
        if mine and not any(True for _ in unit.parameters()):
            same = (value in other.values and _equal(one.values[value], other.values[value]) for value in mine)
            if all(same):
                found.add(path)
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))


def _plans(recording: Recording) -> list[dict[bool, Plan]]:
    """What each part does, by mode."""
    plans = [{mode: _plan(recording, mode, part) for mode in _MODES} for part in range(len(recording.cuts) + 1)]
    for part, cut in enumerate(recording.cuts):
        for mode in _MODES:
            if not plans[part][mode].gives:
                raise CutError(cut, "nothing that depends on the input crosses there")
    return plans


def _crossing(recording: Recording, mode: bool, boundary: int) -> tuple[Origin, ...]:
    """The values that go over the cut number ``boundary``: made before it, used after it, each object once."""
    few = recording.passes[mode][0]
    wanted = [
        few.same.get(value, value)
        for needs in few.needs[boundary + 1 :]
        for value in needs
        if few.part_of[value] <= boundary and value.path not in recording.constant
    ]
    for value in wanted:
        name = value.path.partition(":")[2]
        if value.path.startswith(BARE):
            raise CutError(
                recording.cuts[boundary],
                f"a value made with the parameter {name} itself would cross; cut at the end of the module around it",
            )
        if value.path.startswith(INPUT) and not any(text in name for text in MAY_CROSS):
            raise CutError(recording.cuts[boundary], f"the model uses its input {name} again behind the cut")
    order = list(few.values)
    return tuple(sorted(set(wanted), key=order.index))


def _answers(
    recording: Recording, mode: bool, part: int, extent: Callable[..., Extent]
) -> dict[str, tuple[Answer | None, ...]]:
    """What calls of modules before a part gave, by path, for those whose shape or constants it may ask for."""
    few, *others = recording.passes[mode]
    answers: dict[str, tuple[Answer | None, ...]] = {}
    for path, calls in few.calls.items():
        if path in recording.constant or not any(call.part < part for call in calls):
            continue
        if any(len(other.calls.get(path, ())) != len(calls) for other in others):
            raise CutError(recording.cuts[part - 1], f"{path} is called more often with a larger batch")
        pairs = zip(calls, *(other.calls[path] for other in others), strict=True)
        answers[path] = tuple(
            Answer(
                call.tree,
                tuple(call.constants),
                {index: extent(shape, *(twin.shapes[index] for twin in twins)) for index, shape in call.shapes.items()},
                call.dtypes,
            )
            if call.part < part
            else None
            for call, *twins in pairs
        )
    return answers


def _plan(recording: Recording, mode: bool, part: int) -> Plan:
    few, *others = recording.passes[mode]
    takes = _crossing(recording, mode, part - 1) if part else ()
    gives = _crossing(recording, mode, part) if part < len(recording.cuts) else ()

    def extent(*shapes: Sequence[int]) -> Extent:
        try:
            return Extent.of(shapes, recording.sizes)
        except ValueError as error:
            raise CutError(
                recording.cuts[max(0, part - 1)], f"{error}: shapes that the batch does not determine"
            ) from error

    inputs = {
        name: (extent(shape, *(other.inputs[name][0] for other in others)), dtype)
        for name, (shape, dtype) in few.inputs.items()
    }
    return Plan(
        first=part == 0,
        takes=takes,
        gives=gives,
        extents={value: extent(*(each.values[value].shape for each in recording.passes[mode])) for value in takes},
        inputs={**inputs},
        constants=recording.constants,
        answers=_answers(recording, mode, part, extent),
        same=dict(few.same),
        copied_out=frozenset(few.rewritten),
        copied_in=frozenset(few.overwritten),
        length=recording.sizes[-1][1],
    )


def build_parts(model: nn.Module, recording: Recording, *, untie: bool = False) -> list[Part]:
    """The parts of a model (or of another of the same architecture) as recorded; they share its tensors only.

    Raises:
        CutError: a tensor would belong to two parts, and ``untie`` does not ask for a copy for the later one.
    """
    plans = _plans(recording)
    parts = [_part(model, recording, number, plans[number]) for number in range(len(plans))]
    owners: dict[int, int] = {}
    for number, part in enumerate(parts):
        for module in part.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None or name in module._non_persistent_buffers_set:
                        continue
                    if owners.setdefault(id(tensor), number) == number:
                        continue
                    if not untie:
                        raise CutError(recording.cuts[number - 1], _tied(parts, owners[id(tensor)], number, tensor))
                    table[name] = _copy(tensor)  # pyright: ignore[reportArgumentType]
    return parts


def _copy(tensor: Tensor) -> Tensor:
    twin = tensor.detach().clone()
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _tied(parts: Sequence[nn.Module], first: int, second: int, tensor: Tensor) -> str:
    names = [
        next(name for name, value in parts[number].state_dict(keep_vars=True).items() if value is tensor)
        for number in (first, second)
    ]
    one, other = names
    return f"both sides own {one}" if one == other else f"{one} and {other}, on either side, are one tensor"


def _part(model: nn.Module, recording: Recording, number: int, plans: dict[bool, Plan]) -> Part:
    wire = Wire()
    last = number == len(recording.cuts)
    gives = {value.path for plan in plans.values() for value in plan.gives}
    answered = {path for plan in plans.values() for path in plan.answers}

    def unit(module: nn.Module, path: str) -> nn.Module:
        owners = recording.part_of(path)
        if number not in owners and path not in recording.constant and (owners or not last):
            return ghost(module, wire, path)
        own = shells(module)
        is_cut = not last and path == recording.cuts[number]
        if is_cut or path in gives:
            own.register_forward_hook(Capture(wire, path, is_cut=is_cut))
        if path in answered:
            vars(own)["forward"] = Stub(wire, path, own)
        return own

    def visit(module: nn.Module, prefix: str) -> nn.Module:
        twin = shell(module)
        for name, child in module._modules.items():
            if child is not None:
                path = f"{prefix}{name}"
                twin._modules[name] = visit(child, f"{path}.") if path in recording.skeleton else unit(child, path)
        _keep_own(twin, prefix, number, recording)
        return twin

    return Part(visit(model, ""), wire, plans)


def _keep_own(module: nn.Module, prefix: str, number: int, recording: Recording) -> None:
    """Leave a skeleton module the tensors that this part uses; stand-ins for the others keep its code running."""
    used = recording.bare
    for name, tensor in list(module._parameters.items()):
        if tensor is not None and number not in used.get(f"{prefix}{name}", {0}):
            del module._parameters[name]
            module.register_buffer(name, torch.zeros_like(tensor, requires_grad=False), persistent=False)
    for name, tensor in module._buffers.items():
        # Constants, as a rule: every part may use them, the first that does saves them.
        if tensor is not None and number != min(used.get(f"{prefix}{name}", {0})):
            module._non_persistent_buffers_set.add(name)
