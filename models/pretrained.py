"""Causal language models of transformers: from a configuration, or with trained weights of a folder or a GGUF file."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import io
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cutlayer.models.frozen import share_frozen
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.files import GGUF

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

_KEY = "model.base"
# What they are called in a configuration of transformers that has them under other names too.
_POSITIONS = ("n_positions", "max_position_embeddings", "max_seq_len")


def causal_names() -> list[str]:
    """The types of causal language models that transformers has."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    return [*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def causal_model(name: str, options: Mapping[str, Any], info: DatasetInfo, base: Path | None) -> nn.Module:
    """A model of this type: tokens, int64 [b, l] -> logits [b, l, tokens].

    Args:
        options: of its configuration. base: a folder with trained weights and their configuration, or None: fresh ones.

    Raises:
        ConfigError: the folder's weights are not those of the model, or it has too few tokens or positions.
    """
    transformers = importlib.import_module("transformers")
    settings = {"use_cache": False, **options}
    if base is None:
        size = {"vocab_size": info.outputs, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        config = transformers.AutoConfig.for_model(name, **{**size, **settings})
        _check_size(config, info, NO_VALUE)
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = copy.deepcopy(_loaded(name, base.expanduser().resolve(), json.dumps(settings, sort_keys=True)))
        _check_size(model.config, info, str(base))
    model.register_forward_hook(_FirstLogits(info.outputs))
    return model


def save_config(folder: Path, name: str, options: Mapping[str, Any], info: DatasetInfo, base: Path | None) -> None:
    """Write a model's configuration beside its weights, `model.safetensors`, so that the folder can be a base.

    Args: as of `causal_model`.
    """
    config = _fresh_config(name, options, info) if base is None else copy.deepcopy(_base(name, options, base).config)
    config.use_cache, config.dtype = True, "float32"
    config.save_pretrained(folder)


def _fresh_config(name: str, options: Mapping[str, Any], info: DatasetInfo) -> Any:
    """For as many tokens as the data have."""
    size = {"vocab_size": info.outputs, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = {**size, "use_cache": False, **options}
    return importlib.import_module("transformers").AutoConfig.for_model(name, **settings)


def _base(name: str, options: Mapping[str, Any], base: Path) -> Any:
    settings = {"use_cache": False, **options}
    return _loaded(name, base.expanduser().resolve(), json.dumps(settings, sort_keys=True))


class _FirstLogits:
    """A hook that makes of a model's output the logits of the tokens that the data have, of a larger vocabulary."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, _model: nn.Module, _args: object, output: Any) -> Any:
        return output.logits[..., : self.tokens]


class _OthersImpossible(_FirstLogits):
    """A hook that leaves the output as it is, but for the logits of tokens that the data do not have: -inf."""

    def __call__(self, _model: nn.Module, _args: object, output: Any) -> Any:
        output.logits[..., self.tokens :] = float("-inf")
        return output


def as_transformers(model: nn.Module) -> Any:
    """Make a model of `causal_model`, in place, what transformers' own functions take: its output is theirs again.

    Of a larger vocabulary the tokens that the data do not have stay without a probability.
    """
    for key, hook in [*model._forward_hooks.items()]:
        if isinstance(hook, _FirstLogits):
            del model._forward_hooks[key]
            model.register_forward_hook(_OthersImpossible(hook.tokens))
    return model


def positions_of(config: Any) -> int | None:
    """How many positions a model of this configuration of transformers has; None where there is no end to them."""
    return next((getattr(config, each) for each in _POSITIONS if getattr(config, each, None)), None)


def _check_size(config: Any, info: DatasetInfo, base: Any) -> None:
    key = "model.options.vocab_size" if base is NO_VALUE else _KEY
    tokens = config.get_text_config().vocab_size
    if tokens < info.outputs:
        expected = f"a model of at least the {info.outputs} tokens of the tokenizer; it has {tokens}"
        raise ConfigError(key, base, expected)
    positions = positions_of(config)
    if positions is not None and positions < info.length:
        raise ConfigError("dataset.options.length", info.length, f"at most {positions}, the positions of the model")


@lru_cache(maxsize=2)
def _loaded(name: str, base: Path, settings: str) -> nn.Module:
    """The model with the weights of a folder or file, which all copies share.

    Raises:
        ConfigError: there is no such model, or weights are missing, too many or of another shape.
    """
    transformers = importlib.import_module("transformers")
    single = base.suffix == GGUF
    if not (base if single else base / "config.json").is_file():
        expected = f"a folder with config.json and model.safetensors, as save_pretrained writes, or a file *{GGUF}"
        raise ConfigError(_KEY, str(base), expected)
    transformers.utils.logging.disable_progress_bar()
    kind = {"gguf_file": base.name} if single else {"use_safetensors": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of progress, for such files
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                base.parent if single else base,
                **{"local_files_only": True, "output_loading_info": True, **kind, **json.loads(settings)},
            )
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise ConfigError(_KEY, str(base), f"weights that transformers can read ({reason})") from error
    if model.config.model_type != name:
        raise ConfigError(_KEY, str(base), f"weights of a {name}; these are of a {model.config.model_type}")
    wrong = [
        f"{kind} {', '.join(sorted(map(_first, keys))[:3])}"
        for kind, keys in (
            ("missing", found.get("missing_keys", ())),
            ("unexpected", found.get("unexpected_keys", ())),
            ("of another shape", found.get("mismatched_keys", ())),
        )
        if keys
    ]
    if wrong:
        raise ConfigError(_KEY, str(base), f"the weights of this model; {'; '.join(wrong)}")
    if single:  # transformers takes it for a quantised one, though its weights are plain by now
        config, state = copy.deepcopy(model.config), model.state_dict()
        del config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.load_state_dict(state)
    model.float().requires_grad_(False)
    share_frozen(model)
    return model


def _first(key: Any) -> str:
    return key if isinstance(key, str) else str(key[0])


def base_identity(base: object) -> str | None:
    """What of `model.base` tells one run from another: its hash, wherever it lies; the path where there is no base."""
    if base is None:
        return None
    there = Path(str(base)).expanduser()
    is_base = there.is_file() if there.suffix == GGUF else (there / "config.json").is_file()
    return base_hash(there) if is_base else str(base)


@lru_cache(maxsize=8)
def base_hash(base: Path) -> str:
    """What tells a base's weights and configuration from others, wherever they lie: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    base = base.expanduser()
    for file in [base] if base.suffix == GGUF else [*sorted(base.glob("*.safetensors")), base / "config.json"]:
        digest.update((GGUF if file == base else file.name).encode())
        if file.is_file():
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
