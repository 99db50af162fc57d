"""Auxiliary models: the client's small stand-ins for the server part, from one linear layer to a full copy.

All are made from the server part's architecture alone. None holds its weights or a reference to it, and all are twice
differentiable in their input and their weights, which gradient alignment needs.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.config import ModelConfig
from models.registry import entry
from models.residual import Block, initialise, stage
from models.splitting import split
from runtime.config import ConfigError

if TYPE_CHECKING:
    from datasets import DatasetInfo

_REDUCERS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Flatten)


def build_auxiliary(config: ModelConfig, info: DatasetInfo, model: nn.Module) -> nn.Module:
    """A fresh auxiliary model of `config.auxiliary.size` for `model` cut as `config` says: z -> logits [b, classes].

    - `linear`: the server part's pools and its flattening, then one linear layer.
    - `half`, `default`: the server part thinned: narrower layers (how far is said where the model is registered), and
      of each residual stage its first block only.
    - `full`: the server part's architecture, whole.

    For ResNet-18 cut after layer2 on CIFAR-10 these have about the sizes of FSL-SAGE's ablation (Nair et al. 2025):
    0.005, 3.5, 8.0 and 40 MB. Weights come from torch's global generator. `model` is neither changed nor kept.
    """
    client, server = split(model, config.cut_after)
    assert isinstance(server, nn.Sequential)
    size, registered = config.auxiliary.size, entry(config.name)
    if size == "full":
        return split(registered.build(info, config.typed_options()), config.cut_after)[1]
    parameter = next(client.parameters())
    # Two images: BatchNorm in training mode refuses one value a channel.
    z = _trace(client, torch.empty(2, *info.shape, dtype=parameter.dtype, device="meta"))
    z = z.to(torch.get_default_dtype())  # what the new layers are made in
    if size == "linear":
        return _linear(server, z, info.classes)
    return _thinned(server, z, info.classes, registered.thinning[size])


def _trace(module: nn.Module, x: Tensor) -> Tensor:
    """What `module` gives for `x`, both on the meta device: shape only, and the module's own state is not touched."""
    state = {name: t.to("meta") for name, t in chain(module.named_parameters(), module.named_buffers())}
    with torch.no_grad():
        return functional_call(module, state, (x,))


def _linear(server: nn.Sequential, z: Tensor, classes: int) -> nn.Module:
    layers: list[tuple[str, nn.Module]] = []
    for name, module in server.named_children():
        if isinstance(module, _REDUCERS) and z.dim() > 2:
            layers.append((name, copy.deepcopy(module)))
            z = _trace(module, z)
    if z.dim() > 2:
        layers.append(("flatten", nn.Flatten()))
    return nn.Sequential(OrderedDict([*layers, ("classifier", nn.Linear(z.flatten(1).shape[1], classes))]))


def _thinned(server: nn.Sequential, z: Tensor, classes: int, share: float) -> nn.Module:
    layers: list[tuple[str, nn.Module]] = []
    *body, (last, _) = server.named_children()
    for name, module in body:
        layers.append((name, _thin(name, module, z.shape[1], share)))
        z = _trace(layers[-1][1], z)
    return nn.Sequential(OrderedDict([*layers, (last, nn.Linear(z.shape[1], classes))]))


def _thin(name: str, module: nn.Module, channels: int, share: float) -> nn.Module:
    """A fresh `module` for an input of `channels`, its output narrowed to `share`."""
    match module:
        case nn.Conv2d(groups=1, padding_mode="zeros"):
            size, bias = module.kernel_size, module.bias is not None
            out = _narrow(module.out_channels, share)
            return nn.Conv2d(channels, out, size, module.stride, module.padding, module.dilation, bias=bias)  # pyright: ignore[reportArgumentType]
        case nn.Linear():
            return nn.Linear(channels, _narrow(module.out_features, share), bias=module.bias is not None)
        case nn.BatchNorm2d():
            return nn.BatchNorm2d(channels)
        case nn.Sequential() if (first := _first_block(module)) is not None:
            thin = stage(type(first), channels, _narrow(first.conv1.out_channels, share), 1, first.stride)
            initialise(thin)
            return thin
        case _ if not any(True for _ in chain(module.parameters(), module.buffers())):
            return copy.deepcopy(module)
    kind = type(module).__name__
    raise ConfigError("model.auxiliary.size", name, f"a layer that can be thinned, not {kind}; choose linear or full")


def _first_block(stage: nn.Sequential) -> Block | None:
    first = next(stage.children(), None)
    return first if isinstance(first, BasicBlock | Bottleneck) else None


def _narrow(width: int, share: float) -> int:
    """`share` of `width` as a multiple of 8, at least 8 and at most `width`: odd widths are slow and gain nothing."""
    return min(width, max(8, round(width * share / 8) * 8))
