"""Adapters that are folded into the weights below them, which change by that: of a model's copies each has its own."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cutlayer.models.building import build_model
from cutlayer.models.frozen import unshare
from cutlayer.models.lora import ADAPTER, add_lora, is_adapter, is_below

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo
    from cutlayer.models.config import ModelConfig


def folding_models(
    config: ModelConfig, info: DatasetInfo, ranks: Sequence[int], alphas: Sequence[float]
) -> list[nn.Module]:
    """One model for each rank, or one as configured; they begin with the same weights, and share what never changes.

    Adapters that `config.init` has are folded in.

    Args:
        alphas: as many as ranks, or none: the configured one for all.
    """
    lora = config.lora
    ranks, alphas = ranks or [lora.r], alphas or [lora.alpha] * max(1, len(ranks))
    chosen = [replace(lora, r=r, alpha=alpha) for r, alpha in zip(ranks, alphas, strict=True)]
    first = build_model(replace(config, lora=chosen[0]), info)
    for layer in adapted(first).values():
        _own_weight(layer.get_base_layer())
    if config.init is not None:
        fold(first, scaled_adapters(first))
        for layer in adapted(first).values():
            nn.init.zeros_(layer.lora_B[ADAPTER].weight)
    made = [first]
    for each in chosen[1:]:
        made.append(without_adapters(copy.deepcopy(first)))
        add_lora(made[-1], each)
    return made


def _own_weight(layer: nn.Module) -> None:
    """Put the weight of a layer into the model's state, in memory of its own; nothing trains it."""
    frozen = layer._buffers.pop("weight")
    assert frozen is not None
    layer._non_persistent_buffers_set.discard("weight")
    layer.register_buffer("weight", frozen.as_subclass(Tensor).clone())


def adapted(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers around those that have adapters, by name."""
    kind = importlib.import_module("peft.tuners.lora").LoraLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def without_adapters(model: nn.Module) -> nn.Module:
    """The model with the layers themselves again in the place of those around them; changed in place."""
    for name, layer in adapted(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    vars(model).pop("peft_config", None)  # by which PEFT would take it for a model that has some already
    return model


def weights_below(model: nn.Module) -> dict[str, Tensor]:
    """The weights that adapters are folded into, by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_below(name)}


def scaled_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Its adapters by name, A [r, in] times the scale alpha / r and B [out, r]: their product is all that they add."""
    scales = {f"{name}.lora_A.{ADAPTER}.weight": layer.scaling[ADAPTER] for name, layer in adapted(model).items()}
    found = {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}
    return {name: tensor * scales.get(name, 1.0) for name, tensor in found.items()}


def stacked_adapters(adapters: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Scaled adapters of several as one, whose product is the sum of the weights times each one's product.

    The weights go into the matrices A alone: in both they would count twice.
    """
    found: dict[str, Tensor] = {}
    for name in adapters[0] if adapters else ():
        own = [each[name] for each in adapters]
        if ".lora_A." in name:
            found[name] = torch.cat([weight * a for weight, a in zip(weights, own, strict=True)])
        else:
            found[name] = torch.cat(own, dim=1)
    return found


@torch.no_grad()
def fold(model: nn.Module, adapters: Mapping[str, Tensor]) -> None:
    """Add the products of scaled adapters, of any rank, to the weights below them, whatever the precision of passes."""
    for name, layer in adapted(model).items() if adapters else ():
        a, b = (adapters[f"{name}.lora_{matrix}.{ADAPTER}.weight"].flatten(1) for matrix in "AB")
        weight = layer.get_base_layer().weight
        with torch.autocast(weight.device.type, enabled=False):
            product = b @ a
        weight += (product.T if getattr(layer, "fan_in_fan_out", False) else product).view(weight.shape)


def renew(model: nn.Module) -> None:
    """Begin with new adapters in place of the old: A at random, from torch's global generator, and B at zero."""
    for layer in adapted(model).values():
        layer.reset_lora_parameters(ADAPTER, True)


def save_folded(folder: Path, model: nn.Module) -> None:
    """Write a model of transformers, with what was folded into it and without adapters, as `save_pretrained` does."""
    plain: Any = without_adapters(copy.deepcopy(model))
    unshare(plain)
    for module in plain.modules():
        if "weight" in module._buffers:
            module.weight = nn.Parameter(module._buffers.pop("weight"), requires_grad=False)
    head = plain.get_output_embeddings()
    if head is not None and head.weight is not plain.get_input_embeddings().weight:
        plain.config.tie_word_embeddings = False  # else what was folded into the head alone would be lost
    plain.save_pretrained(folder)
