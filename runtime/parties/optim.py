"""Optimizers by name: any class of ``torch.optim``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cutlayer.models.cutting import Crossing, SeveralError
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.crossing import differentiable
from cutlayer.runtime.parties.graphs import PassRecorder
from cutlayer.runtime.parties.updates import ReplayedSteps

OPTIMIZERS = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
# LBFGS needs a closure that evaluates the model again; a split step cannot give it one.
OPTIMIZERS.pop("lbfgs", None)
# SparseAdam takes sparse gradients only, which no model here has.
OPTIMIZERS.pop("sparseadam", None)
# Options that say how a step is computed, and not what.
WAYS = ("fused", "foreach", "capturable", "differentiable")
# One kernel for all parameters, where nothing is said of the way; on a processor torch's loop stays, for its bits.
_FUSED_ON_GPUS = ("sgd", "adam", "adamw")

Keep = Literal["round", "run"]
_KEEP = ("round", "run")


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer of ``torch.optim`` by name (any case) and the arguments of its constructor, ``lr`` among them.

    ``keep`` is how long its state (momenta, moments, steps) lives: a ``round``, the whole ``run``, or, None, as long as
    the method chooses.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    keep: Keep | None = None

    def to_mapping(self) -> dict[str, Any]:
        """The mapping that names it."""
        return {"name": self.name, **self.options, **({} if self.keep is None else {"keep": self.keep})}


def optimizer_config(values: Mapping[str, Any], where: str = "optimizer") -> OptimizerConfig:
    """The optimizer that ``{"name": "sgd", "lr": 0.1, ...}`` names; options left at None keep torch's default.

    Raises:
        ConfigError: unknown name or option, or a value that the optimizer refuses.
    """
    values = dict(values)
    keep = values.pop("keep", None)
    if keep is not None and keep not in _KEEP:
        raise ConfigError(f"{where}.keep", keep, "how long the optimizer's state lives, or null", _KEEP)
    name, options = named_options(values, where, OPTIMIZERS, "params", "keep")
    try:
        OPTIMIZERS[name]([nn.Parameter(torch.zeros(1))], **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(where, dict(values), str(error)) from error
    return OptimizerConfig(name, options, keep)


def optimizer_options(name: str) -> frozenset[str]:
    """The options of an optimizer of that name (any case), ``lr`` among them; none where there is no such optimizer."""
    kind = OPTIMIZERS.get(name.lower())
    return frozenset() if kind is None else frozenset(inspect.signature(kind).parameters) - {"params"}


def named_options(
    values: Mapping[str, Any], where: str, classes: Mapping[str, Any], skip: str, *others: str
) -> tuple[str, dict[str, Any]]:
    """The name and the options of one of the classes; ``skip`` is its argument that no option is.

    Args:
        others: keys that the caller has read.

    Raises:
        ConfigError: unknown name or option.
    """
    name = str(values.get("name", "")).lower()
    if name not in classes:
        raise ConfigError(f"{where}.name", values.get("name"), "a class of torch", sorted(classes))
    known = [key for key in inspect.signature(classes[name]).parameters if key != skip]
    options = {key: value for key, value in values.items() if key != "name" and value is not None}
    for key in options:
        if key not in known:
            raise ConfigError.unknown_key(f"{where}.{key}", (*known, *others))
    return name, {
        key: tuple(cast(list[Any], value)) if isinstance(value, list) else value for key, value in options.items()
    }


Ahead = Callable[[int], Mapping[str, Any]]
"""The options of a parameter group in a step, counted from 0."""


class PartOptimizer:
    """The optimizers of one or several parts, stepped together.

    Args:
        recorder: of the parts' passes, where steps are replayed.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], recorder: PassRecorder | None = None) -> None:
        self._optimizers = optimizers
        self._device = optimizers[0].param_groups[0]["params"][0].device
        self._replayed = None if recorder is None else ReplayedSteps(recorder, optimizers)
        self._ahead: Sequence[Ahead | None] = ()
        self._taken = 0

    def update(
        self,
        output: Crossing,
        gradient: Crossing | None = None,
        *,
        reset: bool = True,
    ) -> None:
        """One step down ``output`` (a loss), or, of what crossed a cut, along ``gradient``: see `crossing.backward`.

        ``reset`` False adds to the gradients that the parameters hold. Autocast is for forward passes: backward pass
        and step are computed without, each in the types it was given.
        """
        self._begin_step()
        if reset:
            self.zero_grad()
        outputs, along = _beginning(output, gradient)
        with self._without_autocast():
            if reset and self._replayed is not None and self._replayed.update(outputs, along):
                return
            if outputs:
                torch.autograd.backward(outputs, along)
            self._take()
            if self._replayed is not None:
                self._replayed.settle()

    def _without_autocast(self) -> AbstractContextManager[Any]:
        kind = self._device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    def zero_grad(self) -> None:
        """Forget the gradients that the parameters hold, without what ``Optimizer.zero_grad`` records for profilers."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def step(self, closure: Callable[[], object] | None = None) -> None:
        """One step along the gradients that the parameters hold.

        Args:
            closure: puts them there first. It computes the same on the same memory whenever it is called, and may be
                recorded with the step (``compile``); its gradients are then written over by its next step.
        """
        self._begin_step()
        with self._without_autocast():
            if closure is not None and self._replayed is not None:
                self._replayed.follow(closure, self._take)
            else:
                if closure is not None:
                    closure()
                self._take()

    def _take(self) -> None:
        for optimizer in self._optimizers:
            if optimizer.param_groups[0].get("fused"):
                _align_gradients(optimizer)
            optimizer.step()

    def set(self, options: Iterable[Mapping[str, Any]]) -> None:
        """Set the options of each part's parameter group, such as the round's learning rate."""
        for optimizer, values in zip(self._optimizers, options, strict=True):
            for group in optimizer.param_groups:
                group.update(values)

    def go_by(self, ahead: Sequence[Ahead | None]) -> None:
        """Have each part's own function say the options of each step from now on; None leaves them as they are."""
        self._ahead, self._taken = ahead, 0

    def _begin_step(self) -> None:
        for optimizer, ahead in zip(self._optimizers, self._ahead, strict=False):
            if ahead is not None:
                options = ahead(self._taken)
                for group in optimizer.param_groups:
                    group.update(options)
        self._taken += 1

    @property
    def rates(self) -> list[float]:
        """The learning rate of each part, in order."""
        return [float(optimizer.param_groups[0]["lr"]) for optimizer in self._optimizers]

    def state_dict(self) -> list[dict[str, Any]]:
        """The states of all parts, in order."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Restore the states that ``state_dict`` gave."""
        for optimizer, values in zip(self._optimizers, state, strict=True):
            optimizer.load_state_dict(values)

    @property
    def lr(self) -> float:
        """The learning rate of the first part."""
        return float(self._optimizers[0].param_groups[0]["lr"])

    def of(self, part: int) -> torch.optim.Optimizer:
        """The optimizer of the part of that number."""
        return self._optimizers[part]

    def renew(self, part: int) -> None:
        """Forget the state of a part's optimizer; the options stay as they are."""
        self._optimizers[part].state.clear()


def _beginning(output: Crossing, gradient: Crossing | None) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """The tensors that a backward pass begins with, and a gradient for each; None for that of a loss."""
    if gradient is not None:
        return differentiable(output, gradient)
    if not isinstance(output, Tensor):
        raise SeveralError.by("a loss", len(output))
    return [output], [None]


def _align_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Let the values of gradients lie in memory as their parameters' do, which fused steps on a GPU need."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state (momenta, moments, steps) as a flat mapping, ``<number of the parameter>/<name>``."""
    return {
        f"{index}/{key}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what ``optimizer_tensors`` gave; the options stay as they are.

    Raises:
        ValueError: the state is one of another kind of optimizer, or of other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, key = name.split("/")[-2:]  # earlier versions put the number of the part before
        state.setdefault(int(index), {})[key] = value
    for index, entry in state.items():
        if index >= len(parameters):
            raise ValueError(f"it is of more than the {len(parameters)} parameters that there are")
        _check_entry(optimizer, parameters[index], entry)
        entry.update({key: _like(parameters[index], value) for key, value in entry.items()})
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of a state, for the optimizer to write into; of one of the parameter's shape laid out as that is."""
    return (
        value.clone() if value.shape != parameter.shape else torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    )


def _check_entry(optimizer: torch.optim.Optimizer, parameter: Tensor, entry: Mapping[str, Any]) -> None:
    """Raises ValueError if a parameter's state is not one that the optimizer makes."""
    options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    key = (type(optimizer).__name__, parameter.shape, repr({**options, "lr": None}))
    if key not in _ENTRIES:
        _ENTRIES[key] = _entry_shapes(type(optimizer), parameter, options)
    made, found = _ENTRIES[key], {name: value.shape for name, value in entry.items()}
    if made != found:
        raise ValueError(f"{key[0]} keeps {_shapes(made)} of a parameter here, not {_shapes(found)}")


# What an optimizer keeps of a parameter of some shape, by its kind and options.
_ENTRIES: dict[tuple[str, torch.Size, str], dict[str, torch.Size]] = {}


def _entry_shapes(kind: Any, parameter: Tensor, options: Mapping[str, Any]) -> dict[str, torch.Size]:
    """The state that one step along a gradient of zero makes, by name."""
    twin = torch.zeros_like(parameter).requires_grad_()
    optimizer = kind([twin], lr=options["lr"])
    optimizer.param_groups[0].update(options)
    twin.grad = torch.zeros_like(twin)
    optimizer.step()
    return {name: torch.as_tensor(value).shape for name, value in optimizer.state[twin].items() if value is not None}


def kept_bytes(config: OptimizerConfig, parameters: Iterable[Tensor]) -> int:
    """Bytes of what an optimizer keeps of these parameters, wherever they are, from step to step."""
    total = 0
    for parameter in parameters:
        key = repr(config), parameter.shape, parameter.dtype
        if key not in _KEPT:
            twin = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype))
            twin.grad = torch.zeros_like(twin)
            optimizer = make_optimizer(config, [twin])
            optimizer.step()
            _KEPT[key] = sum(value.nbytes for value in optimizer.state[twin].values() if isinstance(value, Tensor))
        total += _KEPT[key]
    return total


_KEPT: dict[tuple[str, torch.Size, torch.dtype], int] = {}


def _shapes(state: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{key} {list(shape)}" for key, shape in sorted(state.items())) or "nothing"


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """A fresh torch optimizer; on a GPU one that takes a step of all parameters at once, unless told otherwise."""
    made, kind = [*parameters], cast(Any, OPTIMIZERS[config.name])
    return kind(made, **_options_on(config, {parameter.device.type for parameter in made}))


def _options_on(config: OptimizerConfig, devices: Collection[str]) -> dict[str, Any]:
    """The options of an optimizer whose parameters are on devices of these types."""
    said = any(config.options.get(key) is not None for key in WAYS)
    fused = [*devices] == ["cuda"] and config.name in _FUSED_ON_GPUS and not said
    return {**config.options, "fused": True} if fused else config.options
