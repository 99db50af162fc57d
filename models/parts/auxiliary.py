"""Auxiliary models: the client's small stand-ins for the server part, from one linear layer to a full copy.

All are made from the server part's architecture alone. None holds its weights or a reference to it, and all are twice
differentiable in their input and their weights, which gradient alignment needs.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cutlayer.models.adapting import fresh
from cutlayer.models.config import ModelConfig
from cutlayer.models.layers import FeatureMean
from cutlayer.models.part_registry import WHOLE, Making, PartConfig, part
from cutlayer.models.registry import entry
from cutlayer.models.shapes import trace
from cutlayer.models.splitting import split
from cutlayer.models.thinning import thinned
from cutlayer.models.vit import ClassToken
from cutlayer.runtime.ground.config import ConfigError

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

AUXILIARY_SIZES = ("linear", "half", "default", "full")
_REDUCERS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Flatten, FeatureMean)


@dataclass(frozen=True)
class AuxiliaryConfig(PartConfig):
    """The auxiliary model: its size, one of `AUXILIARY_SIZES`."""

    size: str = "default"

    def __post_init__(self) -> None:
        if self.size not in AUXILIARY_SIZES:
            raise ConfigError("size", self.size, "a size of auxiliary model", AUXILIARY_SIZES)


@part("auxiliary", config=AuxiliaryConfig)
def _auxiliary(making: Making) -> nn.Module:
    return build_auxiliary(making.config, making.info, making.parts[WHOLE])


def build_auxiliary(config: ModelConfig, info: DatasetInfo, model: nn.Module) -> nn.Module:
    """A fresh auxiliary model of the configured size for `model` cut as `config` says: z -> logits [b, classes].

    - `linear`: the server part's pools and its flattening, or the mean over tokens, then one linear layer.
    - `half`, `default`: the server part thinned: narrower layers (how far is said where the model is registered), and
      of equal blocks the first few only (see `models/thinning.py`).
    - `full`: the server part's architecture, whole.

    For ResNet-18 cut after layer2 on CIFAR-10 these have about the sizes of FSL-SAGE's ablation (Nair et al. 2025):
    0.005, 3.5, 8.0 and 40 MB. Weights come from torch's global generator. `model` is neither changed nor kept.
    """
    client, server = split(model, config.cut_after, info.shape)
    size, registered = config.part("auxiliary", AuxiliaryConfig).size, entry(config.name)
    parameter = next(client.parameters())
    # Two images: BatchNorm in training mode refuses one value a channel.
    z = trace(client, torch.empty(2, *info.shape, dtype=parameter.dtype, device="meta"))
    if isinstance(z, tuple):
        expected = f"a cut that one value crosses, as {len(z)} do here: an auxiliary model takes one"
        raise ConfigError("model.cut", config.cut_after, expected)
    if size == "full":
        return split(fresh(config, info), config.cut_after, info.shape)[1]
    z = z.to(torch.get_default_dtype())  # what the new layers are made in
    if isinstance(server, nn.Sequential):
        plain = server
    elif size == "linear":
        plain = nn.Sequential(OrderedDict(pool=FeatureMean())) if z.dim() > 2 else nn.Sequential()
    else:
        expected = "linear or full: only models of this project that are cut between two children can be thinned"
        raise ConfigError("model.auxiliary.size", size, expected)
    if size == "linear":
        return _linear(plain, z, info.classes)
    return thinned(plain, z, info.classes, registered.thinning[size])


def _linear(server: nn.Sequential, z: Tensor, classes: int) -> nn.Module:
    layers: list[tuple[str, nn.Module]] = []
    for name, module in _flat(server):
        if isinstance(module, _REDUCERS) and z.dim() > 2:
            layers.append((name, copy.deepcopy(module)))
            z = trace(module, z)
        elif isinstance(module, ClassToken):
            # The class token before its blocks knows nothing of the image; the mean does, and reaches every token.
            layers.append((name, FeatureMean()))
            z = trace(layers[-1][1], z)
    if z.dim() > 2:
        layers.append(("flatten", nn.Flatten()))
    return nn.Sequential(OrderedDict([*layers, ("classifier", nn.Linear(z.flatten(1).shape[1], classes))]))


def _flat(sequence: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a sequence and of the sequences in it, in order, with names that are no paths."""
    for name, module in sequence.named_children():
        if isinstance(module, nn.Sequential):
            yield from _flat(module, f"{prefix}{name}_")
        else:
            yield prefix + name, module
