"""The registry of models: by name the builder, its own cut, its options and its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cutlayer.runtime.ground.config import ConfigError, NoOptions
from cutlayer.runtime.ground.registry import Registry

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

Builder = Callable[["DatasetInfo", Any], nn.Module]
# From a name in a source and the model's options, both checked, to what builds the model.
ModelSource = Callable[[str, Mapping[str, Any]], Callable[["DatasetInfo"], nn.Module]]
# Names of blocks, or what gives them for the model's options.
Blocks = tuple[str, ...] | Callable[[Any], tuple[str, ...]]
# The two children that end the client part and the server part of a model cut in three, or what gives them likewise.
Cuts = tuple[str, str] | Callable[[Any], tuple[str, str]]

# From the state of a model, its options and its dataset to the model of transformers that has the same logits.
Twin = Callable[[Mapping[str, Tensor], Any, "DatasetInfo"], Any]


@dataclass(frozen=True)
class Entry:
    """What the registry knows of a model.

    `build(info, options)` returns the model with fresh weights from torch's global generator: an `nn.Sequential` of
    named children ending in the linear classifier or, from a source, any module. `cut` is the child that ends the
    client part by default, None where the model has none; `options` is None where the source checks them; `blocks` are
    the modules that auxiliary heads are attached to by default, None where a general rule finds them. `cuts` are the
    two cuts into three parts, None for `cut` and the child before the classifier; `variants` are the options, over the
    configured ones, of the models whose bodies are the clients' personal ones by default; `text` says that it takes
    tokens, not images; `twin` makes its twin of transformers, with which that generates text.
    """

    name: str
    build: Builder
    cut: str | None
    options: type | None
    blocks: Blocks | None = None
    cuts: Cuts | None = None
    variants: tuple[Mapping[str, Any], ...] = ({},)
    text: bool = False
    twin: Twin | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether the model is of another library: any module, which need not follow the dataset's shape."""
        return self.options is None

    def blocks_for(self, options: Any) -> tuple[str, ...] | None:
        """The default blocks of the model with these `options`; None if it is registered with none."""
        return self.blocks(options) if callable(self.blocks) else self.blocks

    def cuts_for(self, options: Any) -> tuple[str, str] | None:
        """The default cuts into three parts of the model with these `options`; None if it is registered with none."""
        return self.cuts(options) if callable(self.cuts) else self.cuts


_ENTRIES: Registry[Entry] = Registry("model")
_SOURCES: Registry[ModelSource] = Registry("source of models")


def register(
    name: str,
    *,
    cut: str,
    options: type = NoOptions,
    blocks: Blocks | None = None,
    cuts: Cuts | None = None,
    variants: tuple[Mapping[str, Any], ...] = ({},),
    text: bool = False,
    twin: Twin | None = None,
) -> Callable[[Builder], Builder]:
    """Register `build(info, options) -> nn.Sequential` as model `name`, cut after its child `cut` by default.

    `options` is the frozen dataclass that `model.options` is checked against, `blocks` the modules that have an
    auxiliary head by default (see `models/parts/auxiliary_heads.py`), or a function that gives them for the model's
    options; `text` of a model that takes tokens, and `twin` what generates text with it. `cuts` and `variants` are of
    methods that cut the model in three (see `models/three.py` and `models/parts/personal.py`).
    """

    def add(build: Builder) -> Builder:
        _ENTRIES.add(name, Entry(name, build, cut, options, blocks, cuts, variants, text, twin))
        return build

    return add


def register_source(name: str) -> Callable[[ModelSource], ModelSource]:
    """Register `find(inner, options)`, which gives the builder of model `<name>/<inner>` or raises a `ConfigError`."""

    def add(find: ModelSource) -> ModelSource:
        _SOURCES.add(name, find)
        return find

    return add


def names() -> tuple[str, ...]:
    """The registered models, sorted."""
    return _ENTRIES.names()


def is_known(name: str) -> bool:
    """Whether `name` is a registered model's, or that of one that a source may have."""
    source, _, inner = name.partition("/")
    return name in _ENTRIES or (source in _SOURCES and bool(inner))


def choices() -> tuple[str, ...]:
    """What a model's name may be, as named in messages."""
    return (*names(), *(f"{source}/<name>" for source in sources()))


def sources() -> tuple[str, ...]:
    """The registered sources of further models, sorted."""
    return _SOURCES.names()


def check_input(name: str, info: DatasetInfo) -> None:
    """Raise the `ConfigError` of a registered model that takes images where samples are text, or text for images."""
    if name in _ENTRIES and _ENTRIES[name].text != bool(info.length):
        kind, fitting = "text" if info.length else "images", bool(info.length)
        names = [each for each in _ENTRIES if _ENTRIES[each].text == fitting]
        raise ConfigError("model.name", name, f"a model that takes {kind}, of which {info.name} is", names)


def entry(name: str) -> Entry:
    """The registered model `name`, or one from a source; `ConfigError` if there is none of either.

    A source looks for the model when it is built, not here: its library may be slow to import.
    """
    if not is_known(name):
        raise ConfigError("model.name", name, "a registered model", choices())
    if name in _ENTRIES:
        return _ENTRIES[name]
    return Entry(name, partial(_build, name), None, None)


def find(name: str, options: Mapping[str, Any]) -> Callable[[DatasetInfo], nn.Module] | None:
    """What builds the model `name` of a source, None for a registered one; `ConfigError` if the source has none."""
    source, _, inner = name.partition("/")
    return None if name in _ENTRIES else _SOURCES[source](inner, options)


def _build(name: str, info: DatasetInfo, options: Mapping[str, Any]) -> nn.Module:
    builder = find(name, options)
    assert builder is not None, "registered models have builders of their own"
    return builder(info)


def default_cut(name: str) -> str:
    """The child after which model `name` is cut when the config names no cut; `ConfigError` if it has none."""
    cut = entry(name).cut
    if cut is None:
        raise ConfigError("model.cut", None, f"a module of the model, as {name} has no cut of its own")
    return cut
