"""The part of the configuration under `model`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

from cutlayer.models.lora import LoraConfig
from cutlayer.models.part_registry import SLOTS, PartConfig, config_class, refinable
from cutlayer.models.pretrained import base_identity
from cutlayer.models.registry import choices, default_cut, entry, is_known
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError, build, join, plain, scoped

# What a cut may be chosen by, with an example: parameters and MFLOP a sample at the client, MB of a round.
BUDGETS = {"client_params": "20000", "client_mflop": "5", "round_mb": "2.5"}
Section = TypeVar("Section", bound=PartConfig)
# Keys of parts that every saved configuration has; others are in it where they are set, so that what it was saved under
# stays its identity whatever is registered.
_ALWAYS = (
    "client.freeze",
    "auxiliary.size",
    "personal.variants",
    "projector.hidden",
    "projector.width",
    "auxiliary_heads.blocks",
    *(
        f"{part}.{slot}"
        for part in ("client", "server", "auxiliary", "body", "head", "tail", "personal", "projector")
        for slot in SLOTS
    ),
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
    adapted = own.client_norm != "own" or own.server_norm != "own" or own.bottleneck is not None
    return method.layout.cut or adapted


def _has_groups(own: Any, _: Any) -> bool:
    return "group" in (own.client_norm, own.server_norm)


@dataclass(frozen=True)
class ModelConfig:
    """Which model, where it is cut and what it starts from.

    `cut` None is the model's own default cut, a pair cuts it in three: client part, server part and tail. `init` is a
    safetensors file, or a run's folder with a model.safetensors in it, and None means fresh weights; `initialisation`
    is where these come from; `client_norm` and `server_norm` are how the model normalises up to the cut and behind it,
    `group_channels` the channels of a group where it does so by groups, None for a number of groups that the channels
    decide, and `bottleneck` narrows what crosses (see `models/adapting.py`); `base` is a folder with trained weights
    of a language model, `lora` the adapters that are then trained in their place (see `models/pretrained.py` and
    `models/lora.py`); `parts` are the
    sections of registered parts, by name, of which those as by default are left out; `options` are the model's own
    (see its builder), checked when this is made, or when a model from a source is built.
    """

    name: str
    cut: str | tuple[str, ...] | None = field(default=None, metadata=scoped(read_if=_is_cut))
    init: Path | None = None
    initialisation: Literal["own", "xavier"] = "own"
    client_norm: Literal["own", "group"] = "own"
    server_norm: Literal["own", "group"] = "own"
    group_channels: int | None = field(default=None, metadata=scoped(read_if=_has_groups))
    bottleneck: str | None = None
    base: Path | None = field(default=None, metadata=scoped("machine", identifies=base_identity, later=True))
    lora: LoraConfig = field(default_factory=LoraConfig)
    parts: Mapping[str, PartConfig] = field(default_factory=dict[str, PartConfig], metadata={"sections": True})
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_known(self.name):
            raise ConfigError("name", self.name, "a registered model", choices())
        if isinstance(self.cut, tuple) and len(self.cut) != 2:
            raise ConfigError("cut", self.cut, "null, one child of the model, or two as [first,second]")
        _ = self.budget  # it is checked by being read
        if self.group_channels is not None and self.group_channels < 1:
            raise ConfigError("group_channels", self.group_channels, "null, or an integer >= 1")
        if self.base is not None and not self.name.startswith("huggingface/"):
            raise ConfigError("base", str(self.base), f"null with model={self.name}; it is of model=huggingface/<name>")
        if self.base is not None and self.initialisation != "own":
            raise ConfigError("initialisation", self.initialisation, "own with model.base, which has weights")
        if self.bottleneck is not None:
            Bottleneck.read(self.bottleneck)
            if isinstance(self.cut, tuple):
                raise ConfigError("bottleneck", self.bottleneck, "null where the model is cut in three")
        self.typed_options()
        for name in self.parts:
            if name not in refinable():
                raise ConfigError(name, NO_VALUE, "no such part", refinable())
        own = {name: section for name, section in self.parts.items() if section != config_class(name)()}
        object.__setattr__(self, "parts", own)
        for name in refinable():
            self.part(name).check(self)

    @staticmethod
    def sections() -> dict[str, type[PartConfig]]:
        """The sections of registered parts, which stand beside the other keys."""
        return {name: config_class(name) for name in refinable()}

    def part(self, name: str, kind: type[Section] = PartConfig) -> Section:
        """The section of the registered part `name`, of the class `kind` that it is registered with."""
        section = self.parts.get(name) or config_class(name)()
        assert isinstance(section, kind), f"model.{name} is a {type(section).__name__}"
        return section

    def typed_options(self) -> Any:
        """`options` as the model's own dataclass; `ConfigError` for an unknown key or a bad value.

        Those of a model from a source stay a mapping, and are checked when it is built.
        """
        kind = entry(self.name).options
        return self.options if kind is None else build(kind, self.options, "options")

    @property
    def budget(self) -> Budget | None:
        """The budget that the cut is to be chosen by; None where it is given."""
        return Budget.read(self.cut) if isinstance(self.cut, str) and self.cut.startswith("auto") else None

    @property
    def revision(self) -> int:
        """Goes up by one when the same section comes to mean another model: see `Algorithm.revision`."""
        return int(self.client_norm == "group")  # before, weights were standardised by the biased variance

    @property
    def is_adapted(self) -> bool:
        """Whether the model is another than its builder gives."""
        return _has_groups(self, None) or self.bottleneck is not None

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

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "model") -> ModelConfig:
        """Build from plain containers, a part's section under its name; strictly, as by `build`."""
        if not isinstance(cast(object, values), Mapping):
            raise ConfigError(where, values, "a mapping of keys to values")
        own = [field.name for field in fields(cls) if field.name != "parts"]
        for key in values:
            if key not in (*own, *refinable()):
                raise ConfigError.unknown_key(join(where, str(key)), (*own, *refinable()))
        parts = {
            name: build(config_class(name), values[name], join(where, name)) for name in refinable() if name in values
        }
        return build(cls, {**{key: values[key] for key in own if key in values}, "parts": parts}, where)

    def to_mapping(self) -> dict[str, Any]:
        """As JSON-able containers, from which `from_mapping` makes an equal one."""
        mapping = cast(dict[str, Any], plain(self))
        options = mapping.pop("options")
        del mapping["parts"]
        if mapping["base"] is None:
            del mapping["base"]
        for name in refinable():
            default = plain(config_class(name)())
            section = {
                key: value
                for key, value in plain(self.part(name)).items()
                if f"{name}.{key}" in _ALWAYS or value != default[key]
            }
            if section:
                mapping[name] = section
        return {**mapping, "options": options}
