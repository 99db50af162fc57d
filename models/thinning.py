"""Thinned copies of a server part: what the auxiliary models between `linear` and `full` are made of."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain, groupby
from math import ceil

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from cutlayer.models.mobilenet import SeparableBlock
from cutlayer.models.residual import Block, initialise, stage
from cutlayer.models.shapes import output_width, trace
from cutlayer.models.vit import TransformerBlock
from cutlayer.runtime.ground.config import ConfigError


def thinned(server: nn.Sequential, z: Tensor, classes: int, share: float) -> nn.Sequential:
    """A fresh, smaller `server` for the smashed data `z` (on the meta device): z -> logits [b, classes].

    Layers are narrowed to `share` of their width, and blocks left out: of each residual stage all but the first, of a
    row of separable blocks that keep their shape likewise, and of a row of transformer blocks all but `share`.
    """
    *body, (last, _) = server.named_children()
    layers: list[tuple[str, nn.Module]] = []
    for name, module, kept in _fewer(body, share):
        layers.append((name, _thin(name, module, z, kept)))
        z = trace(layers[-1][1], z)
    return nn.Sequential(OrderedDict([*layers, (last, nn.Linear(output_width(z), classes))]))


def _fewer(body: list[tuple[str, nn.Module]], share: float) -> Iterator[tuple[str, nn.Module, float]]:
    """The children that stay, and the share of its width that each keeps."""
    for kind, row in groupby(body, key=lambda child: _repeated(child[1])):
        children = list(row)
        if kind is SeparableBlock:
            del children[1:]
        elif kind is TransformerBlock:
            # A residual block is as wide as its input: fewer, with a narrower hidden layer, keep to the share instead.
            wanted = share * len(children)
            del children[ceil(wanted) :]
            yield from ((name, module, wanted / ceil(wanted)) for name, module in children)
            continue
        yield from ((name, module, share) for name, module in children)


def _repeated(module: nn.Module) -> type | None:
    """The kind of a block that gives what it takes in shape, so that one more or less of it fits."""
    if isinstance(module, SeparableBlock) and module.channels == module.out and module.stride == 1:
        return SeparableBlock
    return TransformerBlock if isinstance(module, TransformerBlock) else None


def _thin(name: str, module: nn.Module, z: Tensor, share: float) -> nn.Module:
    """A fresh `module` for the input `z`, its output narrowed to `share`."""
    width = output_width(z)
    match module:
        case nn.Conv2d(groups=1, padding_mode="zeros"):
            size, bias = module.kernel_size, module.bias is not None
            out = _narrow(module.out_channels, share)
            return nn.Conv2d(width, out, size, module.stride, module.padding, module.dilation, bias=bias)  # pyright: ignore[reportArgumentType]
        case nn.Linear():
            return nn.Linear(width, _narrow(module.out_features, share), bias=module.bias is not None)
        case nn.BatchNorm2d():
            return nn.BatchNorm2d(width)
        case nn.LayerNorm(normalized_shape=(_,)):
            return nn.LayerNorm(width, eps=module.eps)
        case SeparableBlock():
            return SeparableBlock(width, _narrow(module.out, share), module.stride)
        case TransformerBlock(widths=(heads, hidden, mlp, dropout)):
            return TransformerBlock(heads, hidden, _narrow(mlp, share), dropout)
        case nn.Sequential():
            return _thin_sequence(name, module, z, share)
        case _ if not any(True for _ in chain(module.parameters(), module.buffers())):
            return copy.deepcopy(module)
    kind = type(module).__name__
    raise ConfigError("model.auxiliary.size", name, f"a layer that can be thinned, not {kind}; choose linear or full")


def _thin_sequence(name: str, module: nn.Sequential, z: Tensor, share: float) -> nn.Sequential:
    if (first := _first_block(module)) is not None:
        thin = stage(type(first), output_width(z), _narrow(first.conv1.out_channels, share), 1, first.stride)
        initialise(thin)
        return thin
    layers: list[tuple[str, nn.Module]] = []
    for inner, child in module.named_children():
        layers.append((inner, _thin(f"{name}.{inner}", child, z, share)))
        z = trace(layers[-1][1], z)
    return nn.Sequential(OrderedDict(layers))


def _first_block(stage: nn.Sequential) -> Block | None:
    first = next(stage.children(), None)
    return first if isinstance(first, BasicBlock | Bottleneck) else None


def _narrow(width: int, share: float) -> int:
    """`share` of `width` as a multiple of 8, at least 8 and at most `width`: odd widths are slow and gain nothing."""
    return min(width, max(8, round(width * share / 8) * 8))
