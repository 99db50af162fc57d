"""The part of the configuration under `model`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cutlayer.models.registry import choices, default_cut, entry, is_known
from cutlayer.runtime.ground.config import ConfigError, build, scoped

# What a cut may be chosen by, with an example: parameters and MFLOP a sample at the client, MB of a round.
BUDGETS = {"client_params": "20000", "client_mflop": "5", "round_mb": "2.5"}
AUXILIARY_SIZES = ("linear", "half", "default", "full")


@dataclass(frozen=True)
class PartConfig:
    """Refinements of the top-level optimizer and scheduler for one part of the model; empty means none."""

    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientPartConfig(PartConfig):
    """Of the client part: with `freeze` its weights and its running statistics stay as they are at the start."""

    freeze: bool = False


@dataclass(frozen=True)
class AuxiliaryConfig:
    """The auxiliary model: its size (one of `AUXILIARY_SIZES`) and its optimizer's refinements."""

    size: str = "default"
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size not in AUXILIARY_SIZES:
            raise ConfigError("size", self.size, "a size of auxiliary model", AUXILIARY_SIZES)


@dataclass(frozen=True)
class AuxiliaryHeadsConfig:
    """Auxiliary heads: `blocks` are the modules after which one is attached; None means the model's own."""

    blocks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None and not self.blocks:
            raise ConfigError("blocks", self.blocks, "null or a list of one or more modules of the model")


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector of self-supervised methods: features -> `hidden` -> `width`, where they are compared."""

    hidden: int = 1024
    width: int = 1024
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("hidden", "width"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "an integer >= 1")


@dataclass(frozen=True)
class PersonalConfig:
    """The clients' personal bodies, and refinements of their optimizer and scheduler.

    `variants` are options over those of the model: a body is what such a model has between the two cuts, which the key
    `cut` gives where they are not the model's. They are given to the clients in turn: of n variants, client i has
    variant i mod n. None means the model's own.
    """

    variants: tuple[dict[str, Any], ...] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.variants is not None and not self.variants:
            raise ConfigError(
                "variants", self.variants, "null or a list of one or more mappings of the model's options"
            )


class Budget(NamedTuple):
    """A limit on what a cut may cost, in whose terms the cut is chosen: `auto:<measure><=<limit>`."""

    measure: str
    limit: float

    @classmethod
    def read(cls, text: str) -> Budget:
        """The budget that `text` writes; a `ConfigError` if it writes none."""
        found = re.fullmatch(r"auto:(\w+)<=(\d+(?:\.\d+)?(?:e\d+)?)", text)
        if found is None or found[1] not in BUDGETS:
            choices = [f"auto:{measure}<={limit}" for measure, limit in BUDGETS.items()]
            raise ConfigError("cut", text, "a budget", choices)
        return cls(found[1], float(found[2]))


class Bottleneck(NamedTuple):
    """What is narrowed at the cut: to how many `channels`, with a convolution of which `stride`."""

    channels: int
    stride: int

    @classmethod
    def read(cls, text: str) -> Bottleneck:
        """The bottleneck that `text` writes, `C4S2`; a `ConfigError` if it writes none."""
        found = re.fullmatch(r"C([1-9]\d{0,4})S([1-9]\d?)", text)
        if found is None:
            expected = "null, or C and S with a number each: C4S2 is 4 channels by a convolution of stride 2"
            raise ConfigError("bottleneck", text, expected)
        return cls(int(found[1]), int(found[2]))


def _is_cut(own: Any, method: Any) -> bool:
    """Whether a method cuts the model, or the model is another up to the cut."""
    return method.layout.cut or own.client_norm != "own" or own.bottleneck is not None


@dataclass(frozen=True)
class ModelConfig:
    """Which model, where it is cut and what it starts from.

    `cut` None is the model's own default cut, a pair cuts it in three: client part, server part and tail. `init` is a
    safetensors file, or a run's folder with a model.safetensors in it, and None means fresh weights; `client_norm` is
    how the client part normalises, and `bottleneck` narrows what crosses (see `models/adapting.py`); `auxiliary_heads`
    are for methods that train on what is inside the model; `options` are the model's own (see its builder). They and
    those of `personal` are checked when this is made, or when a model from a source is built.
    """

    name: str
    cut: str | tuple[str, ...] | None = field(default=None, metadata=scoped(read_if=_is_cut))
    init: Path | None = None
    client_norm: Literal["own", "group"] = "own"
    bottleneck: str | None = None
    client: ClientPartConfig = field(default_factory=ClientPartConfig)
    server: PartConfig = field(default_factory=PartConfig)
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)
    body: PartConfig = field(default_factory=PartConfig)
    head: PartConfig = field(default_factory=PartConfig)
    tail: PartConfig = field(default_factory=PartConfig)
    personal: PersonalConfig = field(default_factory=PersonalConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    auxiliary_heads: AuxiliaryHeadsConfig = field(default_factory=AuxiliaryHeadsConfig)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_known(self.name):
            raise ConfigError("name", self.name, "a registered model", choices())
        if isinstance(self.cut, tuple) and len(self.cut) != 2:
            raise ConfigError("cut", self.cut, "null, one child of the model, or two as [first,second]")
        _ = self.budget  # it is checked by being read
        if self.bottleneck is not None:
            Bottleneck.read(self.bottleneck)
            if isinstance(self.cut, tuple):
                raise ConfigError("bottleneck", self.bottleneck, "null where the model is cut in three")
        self.typed_options()
        self.personal_options()

    def typed_options(self) -> Any:
        """`options` as the model's own dataclass; `ConfigError` for an unknown key or a bad value.

        Those of a model from a source stay a mapping, and are checked when it is built.
        """
        kind = entry(self.name).options
        return self.options if kind is None else build(kind, self.options, "options")

    @property
    def variants(self) -> tuple[Mapping[str, Any], ...]:
        """The options of each variant of the personal body, over those of the model."""
        return entry(self.name).variants if self.personal.variants is None else self.personal.variants

    def personal_options(self) -> list[tuple[Any, tuple[str, str] | None]]:
        """As `typed_options`, of the models that variants' bodies are from; and where each is cut, if it says."""
        kind = entry(self.name).options
        found: list[tuple[Any, tuple[str, str] | None]] = []
        for i, variant in enumerate(self.variants):
            options, where = {**self.options, **variant}, f"personal.variants.{i}"
            cut = options.pop("cut", None)
            if cut is not None and not (len(cut) == 2 and all(isinstance(name, str) for name in cut)):
                raise ConfigError(f"{where}.cut", cut, "two modules as [first,second]")
            typed = options if kind is None else build(kind, options, where)
            found.append((typed, None if cut is None else (cut[0], cut[1])))
        return found

    @property
    def budget(self) -> Budget | None:
        """The budget that the cut is to be chosen by; None where it is given."""
        return Budget.read(self.cut) if isinstance(self.cut, str) and self.cut.startswith("auto") else None

    @property
    def is_adapted(self) -> bool:
        """Whether the model is another than its builder gives."""
        return self.client_norm != "own" or self.bottleneck is not None

    @property
    def client_end(self) -> str:
        """The module that ends the client part, before a bottleneck: the first that `cut` names, or the model's own."""
        cut = self.cut[0] if isinstance(self.cut, tuple) else self.cut
        return default_cut(self.name) if cut is None else cut

    @property
    def cut_after(self) -> str:
        """The module after which the model is cut in two: `cut`, or the model's own default, or a bottleneck's middle.

        Two cuts are a `ConfigError`.
        """
        if isinstance(self.cut, tuple):
            raise ConfigError("model.cut", self.cut, "one child of the model: the method cuts it in two, not in three")
        return self.client_end if self.bottleneck is None else f"{self.client_end}.down"
