"""From a config to a whole model, with fresh or saved weights."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cutlayer.models.adapting import fresh
from cutlayer.models.config import ModelConfig
from cutlayer.models.fitting import sketch
from cutlayer.models.lora import is_below, replace_below
from cutlayer.models.part_registry import refinable
from cutlayer.models.registry import entry
from cutlayer.models.splitting import check_cuts
from cutlayer.models.three import two_cuts
from cutlayer.models.tied import further_names
from cutlayer.runtime.ground.config import ConfigError

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

_WEIGHTS = "model.safetensors"
_SKETCHED: ContextVar[bool] = ContextVar("models are built as sketches", default=False)


@contextmanager
def sketched_models() -> Generator[None]:
    """Inside, whole models are built as `sketch` builds them: for their sizes and shapes alone."""
    token = _SKETCHED.set(True)
    try:
        yield
    finally:
        _SKETCHED.reset(token)


def build_model(config: ModelConfig, info: DatasetInfo) -> nn.Module:
    """The whole model for images [b, channels, h, w] of `info`'s shape: logits [b, classes], float32, on the CPU.

    Fresh weights come from torch's global generator, which is left the same whether `config.init` is set or not. With
    `config.init` all tensors are then replaced by the file's, and weights below adapters by those that it may have; a
    file that does not fit is a `ConfigError`.
    """
    if _SKETCHED.get():
        return sketch(config, info)
    model = fresh(config, info)
    if config.init is not None:
        _load(model, config.init)
    return model


def check_model(config: ModelConfig, info: DatasetInfo, parts: Collection[str] = ()) -> None:
    """Raise the `ConfigError` that building and cutting this model, and making parts beside it, would raise.

    `parts` are those that a method has: with `tail` the model is cut in three, with `server` in two, with neither as
    `config` says. Allocates and reads no weights. `cutlayer.models.input_channels` says whether a model of another
    library takes the images.
    """
    foreign = entry(config.name).is_foreign
    if config.bottleneck is not None and "tail" in parts:
        raise ConfigError("model.bottleneck", config.bottleneck, "null, as the method cuts the model in three")
    sections = [config.part(name) for name in refinable()]
    named = config.is_adapted or any(section.names_modules for section in sections)
    nothing = config.cut is config.init is None and not named
    if foreign and "tail" not in parts and nothing:
        return
    model = sketch(config, info)
    if "tail" in parts or ("server" not in parts and isinstance(config.cut, tuple)):
        check_cuts(model, *two_cuts(config, model))
    elif config.cut is not None or ("server" in parts and not foreign):
        check_cuts(model, config.cut_after)
    for section in sections:
        section.try_on(model, config, info, parts)
    if config.init is not None:
        _compare(model, config.init)


def _load(model: nn.Module, path: Path) -> None:
    _compare(model, path)
    state = model.state_dict()
    with safe_open(_file(path), framework="pt") as saved, torch.no_grad():
        for name, first in further_names(model).items():
            if name in saved.keys() and not torch.equal(saved.get_tensor(name), saved.get_tensor(first)):  # noqa: SIM118
                expected = f"weights of a model in which {first} and {name} are one tensor"
                raise ConfigError("model.init", str(path), expected)
        for name, tensor in state.items():
            tensor.copy_(saved.get_tensor(name))
        for name in filter(is_below, saved.keys() - state.keys()):
            replace_below(model, name, saved.get_tensor(name))


def _file(path: Path) -> Path:
    return path / _WEIGHTS if path.is_dir() else path


def _compare(model: nn.Module, path: Path) -> None:
    """Check names and shapes in the file's header against the model's; a `ConfigError` names the first of each kind."""
    file = _file(path)
    if not file.is_file():
        expected = f"a folder with a {_WEIGHTS}" if path.is_dir() else "a safetensors file or the folder of a run"
        raise ConfigError("model.init", str(path), f"{expected}, found none")
    try:
        with safe_open(file, framework="pt") as saved:
            # Without .keys() the handle cannot be iterated.
            shapes = {name: list(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError("model.init", str(path), f"a readable safetensors file ({error})") from error
    buffers = dict(model.named_buffers(remove_duplicate=False))
    below = {name: tensor for name, tensor in buffers.items() if is_below(name) and name in shapes}
    wanted = {name: list(tensor.shape) for name, tensor in {**model.state_dict(), **below}.items()}
    twice = further_names(model)
    wrong = [f"{n} {shapes[n]} instead of {s}" for n, s in wanted.items() if n in shapes and shapes[n] != s]
    problems = [
        f"{kind} {_first(found)}"
        for kind, found in (
            ("missing", [n for n in wanted if n not in shapes]),
            ("unexpected", [n for n in shapes if n not in wanted and n not in twice]),
            ("wrong shape", wrong),
        )
        if found
    ]
    if problems:
        raise ConfigError("model.init", str(path), f"the tensors of this model; {'; '.join(problems)}")


def _first(found: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return ", ".join(found[:shown]) + more
