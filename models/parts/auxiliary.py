"""Auxiliary models: the client's small stand-ins for the server part, from one linear layer to a full copy.

All are made from the server part's architecture alone. None holds its weights or a reference to it, and all are twice
differentiable in their input and their weights, which gradient alignment needs.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cutlayer.models.adapting import fresh
from cutlayer.models.config import ModelConfig
from cutlayer.models.layers import FeatureMean
from cutlayer.models.part_registry import WHOLE, Making, PartConfig, part
from cutlayer.models.shapes import sample, trace
from cutlayer.models.splitting import (
    blocks_behind,
    candidates,
    children_of,
    classifier,
    split,
    split_in_three,
    without_blocks,
)
from cutlayer.models.vit import ClassToken
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.tasks import task_of

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

    Named = tuple[str, nn.Module]

log = logging.getLogger(__name__)

AUXILIARY_SIZES = ("linear", "half", "default", "full")
# Share of the server part's parameters before its classifier: what one block of ResNet-18's layer3, and both of them,
# are of what is behind layer2, where FSL-SAGE cuts.
_SHARES = {"half": 0.0876, "default": 0.2001}
_REDUCERS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Flatten, FeatureMean)
_KEY = "model.auxiliary.size"
_EXPECTED = "a size of auxiliary model, or the module of the server part that ends it"


@dataclass(frozen=True)
class AuxiliaryConfig(PartConfig):
    """The auxiliary model: its size, one of `AUXILIARY_SIZES` or the module of the server part that it goes up to."""

    not_inherited: ClassVar[Mapping[str, Any]] = MappingProxyType({"weight_decay": 0})

    size: str = "default"

    @property
    def names_modules(self) -> bool:
        return self.size not in AUXILIARY_SIZES

    def try_on(self, model: nn.Module, config: ModelConfig, info: DatasetInfo, parts: Collection[str]) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        if self.names_modules and (not self.size or self.size not in modules):
            raise ConfigError(_KEY, self.size, _EXPECTED, (*AUXILIARY_SIZES, *(name for name in modules if name)))


@part("auxiliary", config=AuxiliaryConfig)
def _auxiliary(making: Making) -> nn.Module:
    return build_auxiliary(making.config, making.info, making.parts[WHOLE])


def build_auxiliary(config: ModelConfig, info: DatasetInfo, model: nn.Module) -> nn.Module:
    """A fresh auxiliary model of the configured size for `model` cut as `config` says: z -> logits [b, classes].

    It is the server part made shorter: its first blocks at their full width, then what the server has of pools and
    flattening before its classifier, then one linear layer.

    - `linear`: no block.
    - `half`, `default`: as many blocks as come nearest to 8.76% and to 20.01% of the server part's parameters, its
      classifier left out. A block is a layer, or a residual block, and what follows it without weight matrices.
    - a module of the server part: all up to and with this one.
    - `full`: the server part's architecture, whole.

    Of a language model of another library it is the server part itself with fewer blocks, of its base's weights.

    For ResNet-18 cut after layer2 these are the four of FSL-SAGE (Nair et al. 2025): nothing, one block of layer3,
    layer3, everything. A model that is no `nn.Sequential` names no blocks: `half` and `default` are `linear` there, and
    the pool is the mean over pixels or tokens. Weights come from torch's global generator; `model` is neither changed
    nor kept.

    Raises:
        ConfigError: several values cross the cut or the end, or the server part has no such module.
    """
    size = config.part("auxiliary", AuxiliaryConfig).size
    if task_of(info).sequential and not isinstance(model, nn.Sequential):
        return _of_blocks(config, info, size)
    client, _ = split(model, config.cut_after, info.shape)
    parameter = next(client.parameters())
    # Two images: BatchNorm in training mode refuses one value a channel.
    z = trace(client, sample(info.shape, 2, dtype=parameter.dtype, device="meta"))
    if isinstance(z, tuple):
        expected = f"a cut that one value crosses, as {len(z)} do here: an auxiliary model takes one"
        raise ConfigError("model.cut", config.cut_after, expected)
    whole = fresh(config, info)
    if size == "full":
        return split(whole, config.cut_after, info.shape)[1]
    z = z.to(torch.get_default_dtype())  # what the new layers are made in
    end = _end(size, whole, config.cut_after, info)
    body = [] if end is None else _body(whole, config.cut_after, end, info)
    for _, module in body:
        z = trace(module, z)
    if isinstance(z, tuple):
        raise ConfigError(_KEY, size, f"a module after which one value crosses, as {len(z)} do here")
    head, z = _head(whole, end or config.cut_after, z, bare=end is None, places=task_of(info).sequential)
    last = list(children_of(whole))[-1] if isinstance(whole, nn.Sequential) else "classifier"
    return nn.Sequential(OrderedDict([*body, *head, (last, nn.Linear(z.shape[-1], info.outputs))]))


def _of_blocks(config: ModelConfig, info: DatasetInfo, size: str) -> nn.Module:
    """The server part of a language model with fewer blocks: those of the base, and its own head.

    As many blocks as come nearest to the size's share of them, or up to the one that it names, but at least one, as
    without adapters or other weights there would be nothing to align.
    """
    model, cut = fresh(config, info), config.cut_after
    behind = blocks_behind(model, cut, info.shape)
    if size == "full":
        return split(model, cut, info.shape)[1]
    if not behind:
        raise ConfigError(
            "model.cut", cut, "a block of the model with others behind it, for an auxiliary model of these"
        )
    if size not in (*_SHARES, *behind):
        raise ConfigError(
            _KEY, size, "a size of auxiliary model, or the block that ends it", (*_SHARES, "full", *behind)
        )
    count = behind.index(size) + 1 if size in behind else max(1, round(_SHARES[size] * len(behind)))
    return without_blocks(model, cut, behind[:count], info.shape)


def _end(size: str, model: nn.Module, cut: str, info: DatasetInfo) -> str | None:
    """The module of `model` that ends the blocks of an auxiliary model of this size; None where it has no block."""
    if size not in AUXILIARY_SIZES:
        order, last = candidates(model, info.shape), classifier(model, info.shape)
        order = order[: order.index(last)] if last in order else order
        valid = order[order.index(cut) + 1 :] if cut in order else order
        if size not in valid:
            outermost = sorted(valid, key=lambda name: name.count("."))
            raise ConfigError(_KEY, size, _EXPECTED, (*AUXILIARY_SIZES, *outermost))
        return size
    if size == "linear":
        return None
    if not isinstance(model, nn.Sequential):
        log.info("%s=%s is linear here, as no blocks are named: it may be the module to go up to", _KEY, size)
        return None
    ends: list[str | None] = [None]
    weights = [0]
    for name, module in _behind(model, cut)[:-1]:
        if _has_matrix(module):
            ends.append(name)
            weights.append(weights[-1])
        elif ends[-1] is not None:
            ends[-1] = name
        weights[-1] += sum(parameter.numel() for parameter in module.parameters())
    wanted = _SHARES[size] * weights[-1]
    return min(zip(ends, weights, strict=True), key=lambda each: abs(each[1] - wanted))[0]


def _body(model: nn.Module, cut: str, end: str, info: DatasetInfo) -> list[Named]:
    """What is in `model` behind the module `cut`, up to and with the module `end`, by names that are no paths."""
    server = split(model, cut, info.shape, compare=False)[1]
    if isinstance(server, nn.Sequential) and (plain := _up_to(server, end)) is not None:
        return list(plain.named_children())
    try:
        return [("body", split_in_three(model, cut, end, info.shape, compare=False)[1])]
    except ConfigError as error:
        raise ConfigError(_KEY, end, f"{_EXPECTED}; at this one: {error.expected}") from error


def _up_to(sequence: nn.Sequential, end: str) -> nn.Sequential | None:
    """A sequence up to and with the module `end` in it; None if this is in a child that is no plain sequence."""
    first, _, inner = end.partition(".")
    names = list(children_of(sequence))
    kept = OrderedDict((name, sequence._modules[name]) for name in names[: names.index(first) + 1])
    child = kept[first]
    if inner:
        if type(child) is not nn.Sequential or (part := _up_to(child, inner)) is None:
            return None
        kept[first] = part
    return nn.Sequential(kept)


def _head(model: nn.Module, end: str, z: Tensor, *, bare: bool, places: bool) -> tuple[list[Named], Tensor]:
    """What makes a vector of `z`, which the module `end` gives: what a sequence has for it, else a mean.

    `bare` says that no block is before it, `places` that there is a vector at each place of a sequence, which stays so.
    The vector comes with it, on the meta device.
    """
    layers: list[Named] = []
    rest = _behind(model, end)[:-1] if isinstance(model, nn.Sequential) else [("pool", FeatureMean())]
    if places:
        layers += [(name, copy.deepcopy(module)) for name, module in rest[-1:] if isinstance(module, nn.LayerNorm)]
        return layers, z
    skipped = max((i for i, (_, module) in enumerate(rest) if _has_matrix(module)), default=-1)
    for i, (name, module) in enumerate(rest):
        if isinstance(module, ClassToken) and bare:
            # The class token before its blocks knows nothing of the image; the mean does, and reaches every token.
            module = FeatureMean()
        norm = isinstance(module, nn.LayerNorm) and not bare and i > skipped  # blocks of a transformer end without one
        if z.dim() > 2 and (norm or isinstance(module, (*_REDUCERS, ClassToken))):
            layers.append((name.replace(".", "_"), copy.deepcopy(module)))
            z = trace(module, z)
    if z.dim() > 2:
        layers.append(("flatten", nn.Flatten()))
    return layers, z.flatten(1)


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _behind(model: nn.Sequential, end: str) -> list[Named]:
    """The modules of a sequence, and of the plain sequences in it, behind the module `end`, with their paths."""
    modules = list(_flat(model))
    inside = (i for i, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{end}."))
    around = (i for i, (name, _) in enumerate(modules) if f"{end}.".startswith(f"{name}."))
    return modules[max((*inside, *around)) + 1 :]


def _flat(sequence: nn.Sequential, prefix: str = "") -> Iterator[Named]:
    for name, child in children_of(sequence).items():
        if type(child) is nn.Sequential:
            yield from _flat(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child
