"""Whether the parts of a cut model do what the model does: outputs, gradients and running statistics, in both modes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.models.cutting.recording import all_tensors
from cutlayer.models.cutting.splitter import BATCHES, CutError, Recording, build_parts, example, length_of
from cutlayer.models.frozen import frozen_in

# Relative; what is wrong is wrong by far more.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


def composed(parts: Sequence[nn.Module], **inputs: Any) -> Any:
    """The parts one after another on the model's inputs."""
    crossed: Any = parts[0](**inputs)
    for part in parts[1:]:
        crossed = part(crossed)
    return crossed


def verify(model: nn.Module, recording: Recording, inputs: Mapping[str, Any]) -> None:
    """Compare the parts with the whole model on a disturbed copy; the model is left as it is.

    In double precision, but for models with frozen weights: of these there is one copy in memory.

    Raises:
        CutError: they differ, and in what.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        shares = bool(frozen_in(model))
        whole = _disturbed(model, double=not shares)
        parts = build_parts(whole, recording, untie=True)
        length = length_of(inputs)
        # Normalisation may refuse to train on one sample.
        for mode, batch, shorter in ((False, 1, 0), (True, BATCHES[0], length // 2)):
            drawn = example(inputs, batch, seed=batch, length=length - shorter)
            given = drawn if shares else {name: _double(value) for name, value in drawn.items()}
            buffers = {name: tensor for name, tensor in whole.named_buffers() if name in whole.state_dict()}
            before = {name: tensor.clone() for name, tensor in buffers.items()}
            expected = _outcome([whole.train(mode)], whole, given)
            for name, tensor in buffers.items():
                tensor.copy_(before[name])
            for part in parts:
                part.train(mode)
            try:
                found = _outcome(parts, whole, given)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise CutError(recording.cuts[0], f"its parts do not run by themselves ({reason})") from error
            for name, value in expected.items():
                if name not in found or not _close(value, found[name]):
                    reason = f"the parts' {name} is not the model's: something reaches past the cut"
                    raise CutError(recording.cuts[0], reason)


def _disturbed(model: nn.Module, *, double: bool) -> nn.Module:
    """A copy with other weights: what a zero or a one hides, shows."""
    twin = copy.deepcopy(model).double() if double else copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            reach = 0.1 * float(parameter.std(correction=0)) + 0.01
            parameter.add_(torch.empty_like(parameter).uniform_(-reach, reach))
    return twin


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _outcome(modules: Sequence[nn.Module], whole: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a pass of the composed modules leaves: outputs, gradients summed over owners, buffers; all by name."""
    torch.manual_seed(2)
    for module in modules:
        module.zero_grad(set_to_none=True)
    outputs = [output for output in all_tensors(composed(modules, **inputs)) if output.requires_grad]
    weights = torch.Generator().manual_seed(3)
    noise = (torch.randn(output.shape, generator=weights, dtype=output.dtype) for output in outputs)
    torch.autograd.backward(outputs, list(noise))
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    first = _first_names(whole)
    counted: set[int] = set()
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and id(parameter) not in counted:
                counted.add(id(parameter))
                key = f"gradient of {first[name]}"
                found[key] = found[key] + parameter.grad if key in found else parameter.grad
        found |= {name: tensor.clone() for name, tensor in module.named_buffers() if name in module.state_dict()}
    return found


def _first_names(model: nn.Module) -> dict[str, str]:
    """By each name of a parameter the first that the same tensor has."""
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(value), name) for name, value in model.named_parameters(remove_duplicate=False)}


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    scale = float(one.detach().abs().max()) if one.numel() else 0.0
    return bool((one - other).abs().max() <= _TOLERANCES[one.dtype] * max(scale, 1e-3)) if one.numel() else True
