"""Models of text as transformers' own, for what it does with them: generate text, with a cache of what came before."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cutlayer.models.config import ModelConfig
from cutlayer.models.frozen import thaw
from cutlayer.models.pretrained import as_transformers
from cutlayer.models.registry import entry, names
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.extras import install

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

_SOURCE = "huggingface"


def check_generative(name: str) -> Any:
    """The package transformers, if it can generate text with a model of this name.

    Raises:
        ConfigError: it cannot, or is not installed.
    """
    if entry(name).twin is None and not name.startswith(f"{_SOURCE}/"):
        twins = ", ".join(each for each in names() if entry(each).twin is not None)
        raise ConfigError("model.name", name, f"{twins} or {_SOURCE}/<type>, with which transformers generates text")
    try:
        return importlib.import_module("transformers")
    except ImportError:
        expected = f"a model that transformers can generate text with, which is missing: {install(_SOURCE)}"
        raise ConfigError("model.name", name, expected) from None


def generative(model: nn.Module, config: ModelConfig, info: DatasetInfo) -> Any:
    """A model of text as transformers' `PreTrainedModel`, on the CPU, with nothing of its own about how to generate.

    A model of this project becomes its twin of transformers, with copies of its weights, adapters added to them; one of
    transformers is itself changed.

    Raises:
        ConfigError: as `check_generative`.
    """
    transformers = check_generative(config.name)
    twin = entry(config.name).twin
    made = as_transformers(model) if twin is None else twin(_merged(model), config.typed_options(), info)
    made.generation_config = transformers.GenerationConfig()
    return made.eval()


def _merged(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model, to which its adapters are added where it has such."""
    thaw(model)  # else the weights are also those of other copies
    for module in model.modules():
        merge: Any = getattr(module, "merge", None)
        if merge is not None and hasattr(module, "base_layer"):
            merge()
    state = model.state_dict().items()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state if ".lora_" not in name}
