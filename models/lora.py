"""Low-rank adapters on a frozen model (Hu et al. 2022), by PEFT: they alone are trained, sent, kept and saved."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from cutlayer.models.frozen import FrozenTensor, share_frozen, unshare
from cutlayer.runtime.ground.config import ConfigError, scoped
from cutlayer.runtime.ground.extras import install

ADAPTER = "default"
"""PEFT's name of the one adapter that a model has."""
_WITH_ADAPTERS = scoped(read_if=lambda own, _: own.r > 0)


@dataclass(frozen=True)
class LoraConfig:
    """Adapters on linear layers: W x + alpha / r B A x, of which W is frozen.

    Attributes:
        r: rank; 0 means none, and every weight of the model is trained.
        alpha: scale. dropout: probability that an input of A is left out, in training.
        targets: names of the layers, as they end; none takes those that PEFT has for the model, else all linear ones.
        train: which of the two matrices learn. With ``B`` alone (FFA-LoRA, Sun et al. 2024) A stays as it is drawn.
    """

    r: int = 0
    alpha: float = field(default=16.0, metadata=_WITH_ADAPTERS)
    dropout: float = field(default=0.0, metadata=_WITH_ADAPTERS)
    targets: tuple[str, ...] = field(default=(), metadata=_WITH_ADAPTERS)
    train: Literal["both", "A", "B"] = field(default="both", metadata=_WITH_ADAPTERS)

    def __post_init__(self) -> None:
        if self.r < 0:
            raise ConfigError("r", self.r, "an integer >= 0")
        if not 0 < self.alpha < float("inf"):
            raise ConfigError("alpha", self.alpha, "a finite number > 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout", self.dropout, "a number >= 0 and < 1")


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Put adapters into a model, in place; all other weights are shared by its copies from then on.

    A starts at random, B at zero, so that the model begins as what it was.

    Raises:
        ConfigError: PEFT is missing, or the model has no such layers.
    """
    peft = _peft()
    unshare(model)
    model.requires_grad_(False)
    settings: dict[str, Any] = {"r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    settings["target_modules"] = [*config.targets] or _usual_targets(model)
    try:
        with warnings.catch_warnings():
            # Of the transposed layers of GPT-2, which PEFT knows.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            peft.inject_adapter_in_model(peft.LoraConfig(**settings), model, adapter_name=ADAPTER)
    except ValueError as error:
        layers = sorted({_last(name) for name, module in model.named_modules() if _is_layer(module)})
        expected = f"names of layers of the model ({str(error).splitlines()[0][:120]})"
        raise ConfigError("model.lora.targets", list(config.targets), expected, layers) from error
    for name, parameter in model.named_parameters():
        matrix = "B" if is_second(name) else "A"
        parameter.requires_grad_(is_adapter(name) and config.train in ("both", matrix))
    share_frozen(model)


def save_adapters(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig, base: Path | None) -> None:
    """Write adapters as PEFT does: `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel`.

    Args:
        tensors: of a model with adapters, by its names; what is no adapter is left out.
        base: the folder that they were trained on.
    """
    adapters = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
    layers = sorted({_last(name.partition(".lora_")[0]) for name in adapters})
    settings = {"r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "target_modules": layers}
    settings |= {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": base and str(base)}
    _peft().LoraConfig(**settings).save_pretrained(str(folder))
    named = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": each for name, each in adapters.items()}
    save_file({name: each.contiguous() for name, each in named.items()}, folder / "adapter_model.safetensors")


def frozen_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Those of a model's adapters that nothing trains, by name; no state has them."""
    return {name: buffer.as_subclass(Tensor) for name, buffer in model.named_buffers() if ".lora_" in name}


def is_adapter(name: str) -> bool:
    """Whether a tensor of a model is a matrix of an adapter."""
    return ".lora_A." in name or is_second(name)


def is_second(name: str) -> bool:
    """Whether it is the second one, B."""
    return ".lora_B." in name


def is_below(name: str) -> bool:
    """Whether it is the weight below an adapter."""
    return name.endswith(".base_layer.weight")


def replace_below(model: nn.Module, name: str, weight: Tensor) -> None:
    """Give the weight below an adapter another value, which this model and its copies share."""
    module, _, last = name.rpartition(".")
    model.get_submodule(module)._buffers[last] = weight.as_subclass(FrozenTensor)


def _usual_targets(model: nn.Module) -> list[str] | None:
    """The names of all linear layers; None where PEFT has others for the model."""
    known = importlib.import_module("peft.utils").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if getattr(getattr(model, "config", None), "model_type", None) in known:
        return None
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_layer(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and getattr(getattr(module, "weight", None), "dim", int)() == 2


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError("model.lora.r", 1, f"0, as peft is missing: {install('huggingface')}") from error
