"""The registry of parts: what a model is divided into and what stands beside it, by name.

A part has a builder, the names of the parts that it needs, and a configuration with a place for its optimizer and its
schedule, which `model.<name>` holds. Everything else follows from the name: the stream of its random numbers, its keys
on the command line, what a stranger may set of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Collection

    from cutlayer.datasets import DatasetInfo

WHOLE = "model"
"""The part that is the whole model; its optimizer and schedule are the top-level ones."""
MOMENTUM = "_momentum"
"""How the name of a copy ends that learns nothing by itself, such as a moving average of the part named before it."""
SLOTS = ("optimizer", "scheduler")
# Keys under `model` that are no parts.
MODEL_KEYS = (
    *(
        "name",
        "cut",
        "init",
        "initialisation",
        "client_norm",
        "server_norm",
        "group_channels",
        "bottleneck",
        "base",
        "lora",
    ),
    *("options", "parts"),
)


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """A part's section under `model`: refinements of the top-level optimizer and scheduler; empty means none.

    The `config` that the methods get is the `ModelConfig` that the section is in.

    A part with keys of its own is registered with a subclass that has them, each with a default.
    """

    not_inherited: ClassVar[Mapping[str, Any]] = {}
    """Options of an optimizer that the part does not inherit, and what it has instead unless its section says so."""

    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    @property
    def names_modules(self) -> bool:
        """Whether the section names modules of the model, which `try_on` then looks for."""
        return False

    def check(self, config: Any) -> None:
        """Raise a `ConfigError`, with its key below `model`, for what does not go with the rest of `config`."""

    def try_on(self, model: nn.Module, config: Any, info: DatasetInfo, parts: Collection[str]) -> None:
        """Raise the `ConfigError` that making the part would raise, as far as a `model` without memory shows it.

        `parts` are those that the method has; none where none is known.
        """

    def ready(self, part: nn.Module) -> None:
        """What is done to a fresh part, on its device and in training mode, before anyone gets a copy of it."""

    def absent(self) -> None:
        """Raise a `ConfigError`, with its key below the section, for what only a method with the part can have."""


@dataclass(frozen=True)
class Making:
    """What a part is made of.

    `config` is the `ModelConfig`. `parts` has the whole model and what the part needs, by name. `options` are what the
    method's own configuration says of the part. `compare` False leaves out the comparison of a model that is cut with
    the whole one.
    """

    config: Any
    info: DatasetInfo
    parts: Mapping[str, nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    compare: bool = True


# A fresh part, its weights from torch's global generator; several of them are variants, given to the clients in turn.
PartBuilder = Callable[[Making], nn.Module | Sequence[nn.Module]]
# The parts of the whole model, in the order in which data goes through them, made of its own tensors.
Divider = Callable[[Making], Sequence[nn.Module]]
# What a part asks of the whole model is done to it in place, before anything is made of it.
Prepare = Callable[[nn.Module, "DatasetInfo"], object]


@dataclass(frozen=True)
class RegisteredPart:
    """What the registry knows of a part that has a builder of its own."""

    name: str
    build: PartBuilder
    needs: tuple[str, ...]
    prepare: Prepare | None = None


_PARTS: Registry[RegisteredPart] = Registry("part")
_DIVISIONS: dict[tuple[str, ...], Divider] = {}
_CONFIGS: dict[str, type[PartConfig]] = {}


def part(
    name: str, *, needs: Sequence[str] = (), config: type[PartConfig] = PartConfig, prepare: Prepare | None = None
) -> Callable[[PartBuilder], PartBuilder]:
    """Register what builds the part `name`.

    `needs` are the parts that are made before it; the whole model always is. `config` is the frozen dataclass of its
    section under `model`. `prepare(model, info)` is called with the whole model before anything is made of it.
    """

    def add(build: PartBuilder) -> PartBuilder:
        if name.endswith(MOMENTUM):
            raise ValueError(f"part {name!r} has the name of a copy, which ends in {MOMENTUM}")
        if name in _CONFIGS:
            raise ValueError(f"part {name!r} is registered twice")
        _PARTS.add(name, RegisteredPart(name, build, tuple(needs), prepare))
        if name != WHOLE:
            _add_config(name, config)
        return build

    return add


def division(*names: str, **configs: type[PartConfig]) -> Callable[[Divider], Divider]:
    """Register what divides the whole model into the parts `names`; `configs` are the classes of their sections."""

    def add(divide: Divider) -> Divider:
        if names in _DIVISIONS or _PARTS.keys() & {*names}:
            raise ValueError(f"one of the parts {', '.join(names)} is registered twice")
        _DIVISIONS[names] = divide
        for name in names:
            if name not in _CONFIGS or name in configs:
                _add_config(name, configs.get(name, PartConfig))
        return divide

    return add


def _add_config(name: str, config: type[PartConfig]) -> None:
    if name in MODEL_KEYS:
        raise ValueError(f"part {name!r} has the name of a key of every model")
    _CONFIGS[name] = config


def names() -> tuple[str, ...]:
    """All registered parts, sorted; a copy of one, `<name>_momentum`, is none of them."""
    return tuple(sorted({*_PARTS, *refinable()}))


def refinable() -> tuple[str, ...]:
    """The parts with a section under `model`, where optimizer and schedule may be refined: all but the whole model."""
    return tuple(sorted(_CONFIGS))


def config_class(name: str) -> type[PartConfig]:
    """The class of a part's section under `model`."""
    return _CONFIGS[name]


def divisions() -> tuple[tuple[str, ...], ...]:
    """The ways to divide the whole model, the finest first; in the last the whole is its only part."""
    return (*sorted(_DIVISIONS, key=len, reverse=True), (WHOLE,))


def divider(names: tuple[str, ...]) -> Divider:
    """What divides the model into these parts."""
    return _DIVISIONS[names]


def registered_part(name: str) -> RegisteredPart | None:
    """The registered part `name`, or a copy of one; None for one that the model is divided into.

    Raises:
        ConfigError: there is none.
    """
    if name.endswith(MOMENTUM):
        return _copy_of(name.removesuffix(MOMENTUM), name)
    if name not in names():
        raise ConfigError("part", name, "a registered part", names())
    return _PARTS.get(name)


def _copy_of(original: str, name: str) -> RegisteredPart:
    def build(making: Making) -> nn.Module:
        return copy.deepcopy(making.parts[original]).requires_grad_(False)

    return RegisteredPart(name, build, (original,))
