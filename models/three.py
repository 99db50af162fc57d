"""A model cut in three: its first and last part at the client, and between them the server's body or a personal one."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import nn

from cutlayer.models.config import ModelConfig
from cutlayer.models.cutting import Crossing, tensors
from cutlayer.models.registry import entry
from cutlayer.models.shapes import trace
from cutlayer.models.splitting import cuts, named, split_in_three
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
        names = cuts(model) if isinstance(model, nn.Sequential) else [*named(model)]
        expected = f"[first,second], as the method cuts the model in three: two of {', '.join(names[:_SHOWN])}"
        raise ConfigError("model.cut", config.cut, expected)
    first, second = config.cut or own.cuts_for(config.typed_options()) or (config.cut_after, list(named(model))[-2])
    return first, second


def divide(config: ModelConfig, info: DatasetInfo, model: nn.Module, *, compare: bool = True) -> Thirds:
    """Client part, server part and tail of `model` at its `two_cuts`; see `split_in_three`."""
    return split_in_three(model, *two_cuts(config, model), info.shape, compare=compare)


def build_personal(config: ModelConfig, info: DatasetInfo, thirds: Thirds) -> list[nn.Module]:
    """Fresh personal bodies for a model in thirds, one a variant: what its client part gives -> what its tail takes.

    A variant's body is the server part of the model with the variant's options: cut where the variant says, else
    between as many first and last children as client part and tail have or, of parts that are no sequences, where the
    model itself is cut. Weights come from torch's global generator; the thirds are neither changed nor kept. A body
    that does not fit between the two is a `ConfigError`.
    """
    client, server, tail = thirds
    # Two images: BatchNorm in training mode refuses one value a channel.
    z = trace(client, torch.empty(2, *info.shape, dtype=next(client.parameters()).dtype, device="meta"))
    wanted = _shapes(trace(server, z))
    bodies: list[nn.Module] = []
    for i, (options, chosen) in enumerate(config.personal_options()):
        variant = entry(config.name).build(info, options)
        if chosen is None and isinstance(client, nn.Sequential) and isinstance(tail, nn.Sequential):
            children = OrderedDict(list(named(variant).items())[len(client) : -len(tail)])
            body: nn.Module = nn.Sequential(children)
        else:
            body = split_in_three(variant, *(chosen or two_cuts(config, variant)), info.shape)[1]
        try:
            given = _shapes(trace(body, z))
            found = f"gives {given}"
        except (RuntimeError, TypeError, ValueError):
            given, found = "", "takes no such input"
        if given != wanted or not any(True for _ in body.parameters()):
            expected = f"a body with weights from {_shapes(z)} to {wanted}, as the server part has; this {found}"
            raise ConfigError(f"model.personal.variants.{i}", dict(config.variants[i]), expected)
        bodies.append(body)
    return bodies


def _shapes(crossing: Crossing) -> str:
    """The shapes of what crosses for one sample, as text."""
    return " and ".join(str(list(each.shape[1:])) for each in tensors(crossing))
