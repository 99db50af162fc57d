"""The registry of models: by name the builder, its own cut, its options and how its auxiliary models are thinned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from runtime.config import ConfigError

if TYPE_CHECKING:
    from datasets import DatasetInfo

Builder = Callable[["DatasetInfo", Any], nn.Sequential]
# Names of blocks, or what gives them for the model's options.
Blocks = tuple[str, ...] | Callable[[Any], tuple[str, ...]]

# Width of the thinned auxiliary models as a share of the server part's width, by size. Chosen so that a model whose
# bytes lie in dense layers gets about a fifth (default) and a twelfth (half) of its server part, the shares that the
# FSL-SAGE paper's sizes (8.0 and 3.5 of 42 MB) are of ResNet-18's. Models of few units set larger shares of their own.
DENSE_THINNING: Mapping[str, float] = {"half": 0.09, "default": 0.2}
# The same for residual networks, where only one block of each stage stays and bytes fall with the width's square.
RESIDUAL_THINNING: Mapping[str, float] = {"half": 0.4, "default": 0.65}


@dataclass(frozen=True)
class NoOptions:
    """A model without options of its own."""


@dataclass(frozen=True)
class Entry:
    """What the registry knows of a model.

    `build(info, options)` returns an `nn.Sequential` of named children ending in the linear classifier, with fresh
    weights from torch's global generator; `cut` is the child that ends the client part by default, `blocks` are the
    modules that auxiliary heads are attached to by default, None where a general rule finds them.
    """

    name: str
    build: Builder
    cut: str
    options: type
    thinning: Mapping[str, float]
    blocks: Blocks | None = None

    def blocks_for(self, options: Any) -> tuple[str, ...] | None:
        """The default blocks of the model with these `options`; None if it is registered with none."""
        return self.blocks(options) if callable(self.blocks) else self.blocks


_ENTRIES: dict[str, Entry] = {}


def register(
    name: str,
    *,
    cut: str,
    options: type = NoOptions,
    thinning: Mapping[str, float] = DENSE_THINNING,
    blocks: Blocks | None = None,
) -> Callable[[Builder], Builder]:
    """Register `build(info, options) -> nn.Sequential` as model `name`, cut after its child `cut` by default.

    `options` is the frozen dataclass that `model.options` is checked against, `thinning` the share of the server part's
    width that the auxiliary models `half` and `default` keep, `blocks` the modules that have an auxiliary head by
    default (see `models/heads.py`), or a function that gives them for the model's options.
    """

    def add(build: Builder) -> Builder:
        assert name not in _ENTRIES, f"model {name} is registered twice"
        _ENTRIES[name] = Entry(name, build, cut, options, thinning, blocks)
        return build

    return add


def names() -> tuple[str, ...]:
    """The registered models, sorted."""
    return tuple(sorted(_ENTRIES))


def entry(name: str) -> Entry:
    """The registered model `name`; `ConfigError` if there is none."""
    if name not in _ENTRIES:
        raise ConfigError("model.name", name, "a registered model", names())
    return _ENTRIES[name]


def default_cut(name: str) -> str:
    """The child after which model `name` is cut when the config names no cut."""
    return entry(name).cut
