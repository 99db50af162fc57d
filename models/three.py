"""A model cut in three: its first and last part at the client, and between them the server's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from cutlayer.models.config import ModelConfig
from cutlayer.models.registry import entry
from cutlayer.models.splitting import children_of, cuts, split_in_three
from cutlayer.runtime.ground.config import ConfigError

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

_SHOWN = 20
Thirds = tuple[nn.Module, nn.Module, nn.Module]


def two_cuts(config: ModelConfig, model: nn.Module) -> tuple[str, str]:
    """The two modules that `model` is cut in three after: `config.cut`, or the model's own.

    A model that is registered with none is cut where it is cut in two, and before its classifier. A single cut is a
    `ConfigError`, as is none for a model that has no cut of its own.
    """
    own = entry(config.name)
    if isinstance(config.cut, str) or (config.cut is None and own.is_foreign):
        names = cuts(model) if isinstance(model, nn.Sequential) else [*children_of(model)]
        expected = f"[first,second], as the method cuts the model in three: two of {', '.join(names[:_SHOWN])}"
        raise ConfigError("model.cut", config.cut, expected)
    first, second = (
        config.cut or own.cuts_for(config.typed_options()) or (config.cut_after, list(children_of(model))[-2])
    )
    return first, second


def divide(config: ModelConfig, info: DatasetInfo, model: nn.Module, *, compare: bool = True) -> Thirds:
    """Client part, server part and tail of `model` at its `two_cuts`; see `split_in_three`."""
    return split_in_three(model, *two_cuts(config, model), info.shape, compare=compare)
