"""A model cut in three: its first and last part at the client, and between them the server's body or a personal one."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.registry import entry
from models.shapes import trace
from models.splitting import cuts, named, split_in_three
from runtime.config import ConfigError

if TYPE_CHECKING:
    from datasets import DatasetInfo


def divide(config: ModelConfig, model: nn.Module) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
    """Client part, server part and tail of `model`: cut by `config.cut`, or by the model's own two cuts.

    A model that is registered with none is cut where it is cut in two, and before its classifier. A single cut is a
    `ConfigError`, as is what `split_in_three` refuses.
    """
    if isinstance(config.cut, str):
        expected = f"[first,second], as the method cuts the model in three: two of {', '.join(cuts(model))}"
        raise ConfigError("model.cut", config.cut, expected)
    own = entry(config.name).cuts_for(config.typed_options())
    first, second = config.cut or own or (config.cut_after, list(named(model))[-2])
    return split_in_three(model, first, second)


def build_personal(config: ModelConfig, info: DatasetInfo, model: nn.Module) -> list[nn.Module]:
    """Fresh personal bodies for `model`, one for each variant: what its client part gives -> what its tail takes.

    A variant's body is what the model with the variant's options has between as many first and last children as the
    client part and the tail of `model` have. Weights come from torch's global generator; `model` is neither changed nor
    kept. A body that does not fit between the two is a `ConfigError`.
    """
    client, server, tail = divide(config, model)
    parameter = next(client.parameters())
    # Two images: BatchNorm in training mode refuses one value a channel.
    z = trace(client, torch.empty(2, *info.shape, dtype=parameter.dtype, device="meta"))
    wanted = list(trace(server, z).shape[1:])
    bodies: list[nn.Module] = []
    for i, options in enumerate(config.personal_options()):
        variant = nn.Sequential(OrderedDict(named(entry(config.name).build(info, options))))
        body = variant[len(client) : len(variant) - len(tail)]
        given = _shape(body, z)
        if given != wanted or not any(True for _ in body.parameters()):
            found = "takes no such input" if given is None else f"gives {given}"
            expected = f"a body with weights from {list(z.shape[1:])} to {wanted}, as the server part has; this {found}"
            raise ConfigError(f"model.personal.variants.{i}", dict(config.variants[i]), expected)
        bodies.append(body)
    return bodies


def _shape(body: nn.Module, z: Tensor) -> list[int] | None:
    """Shape of what `body` gives for one sample of `z`; None where it does not take it."""
    try:
        return list(trace(body, z).shape[1:])
    except RuntimeError:
        return None
