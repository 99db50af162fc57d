"""Whether a model of another library takes a dataset's images and gives a classifier's logits, without computing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cutlayer.models.adapting import fresh, unadapted
from cutlayer.models.config import ModelConfig
from cutlayer.models.registry import find
from cutlayer.models.shapes import KnownIntegers, QuickShapes, sample
from cutlayer.models.sources import error_line
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.tasks import task_of

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

_COLOURS = 3
_SIDES = (32, 64, 96, 128, 224, 256, 299, 384, 512)  # that models are made for, or that many halvings leave whole


def input_channels(config: ModelConfig, info: DatasetInfo) -> int:
    """Channels of the images that the model is to be given: the dataset's, or 3 where grey ones are to be repeated.

    A registered model follows the dataset. One of another library is built without memory for its weights, its first
    convolution looked at, and given images in training and in evaluation: `ConfigError` if it does not take them, with
    a size that it would take if there is one, or if it gives something else than logits [b, classes].
    """
    if find(config.name, config.options) is None:
        return info.channels
    if info.length:
        _check_text(config, info)
        return info.channels
    try:
        return _fitted(config, info, anywhere=True)
    except ConfigError as error:
        side = next(
            (side for side in _other_sides(info) if _fits(config, replace(info, height=side, width=side))), None
        )
        if side is None:
            raise
        cause = f" ({error_line(error.__cause__)})" if error.__cause__ else ""
        sizes = f"images of {side}x{side} and not of {info.height}x{info.width}"
        text = f"{config.name} takes {sizes}: dataset.resize={side} scales them{cause}"
        raise ConfigError("dataset.resize", NO_VALUE, text) from error


def _check_text(config: ModelConfig, info: DatasetInfo) -> None:
    """`_check_logits` of a model of text, without memory for its weights where it branches on none of them."""
    try:
        if config.base is None:  # else they are in memory anyway
            with torch.random.fork_rng(devices=[]), KnownIntegers():
                _check_logits(config, _drawn(lambda: unadapted(config, info), anywhere=False), info)
            return
    except ConfigError as error:
        if not _is_of_meta(error):
            raise
    with torch.random.fork_rng(devices=[]):
        _check_logits(config, unadapted(config, info), info)


def sketch(config: ModelConfig, info: DatasetInfo) -> nn.Module:
    """The model on the meta device, or on the CPU where it cannot be built there.

    Torch's generator is left as it was.
    """
    if config.base is not None:  # whose weights are in memory for good once they are read
        with torch.random.fork_rng(devices=[]):
            return fresh(config, info)
    return _drawn(lambda: fresh(config, info), anywhere=True)


def _drawn(make: Callable[[], nn.Module], *, anywhere: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return make()
        except ConfigError as error:
            if not (anywhere and _is_of_meta(error)):
                raise
        return make()


def _fitted(config: ModelConfig, info: DatasetInfo, *, anywhere: bool) -> int:
    model = _drawn(lambda: unadapted(config, info), anywhere=anywhere)
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = _COLOURS if info.channels == 1 and first == _COLOURS else info.channels
    seen = replace(info, channels=channels)
    with torch.random.fork_rng(devices=[]):
        try:
            _check_logits(config, model, seen)
        except ConfigError as error:
            if first is not None and first != channels and error.__cause__:
                found = f"a model for images of {channels} channels; its first convolution takes {first}"
                raise ConfigError("model.name", config.name, found) from error
            if not (anywhere and _is_of_meta(error)):
                raise
            _check_logits(config, unadapted(config, seen), seen)
    return channels


def _is_of_meta(error: ConfigError) -> bool:
    """Whether an error comes from the meta device, whose tensors have no values, and not from the model."""
    return "meta" in str(error.__cause__).lower()


def _check_logits(config: ModelConfig, model: nn.Module, info: DatasetInfo) -> None:
    """Give the model two images in training, as BatchNorm may ask for, and one in evaluation."""
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    for count, mode in ((2, "training"), (1, "evaluation")):
        x = sample(info.shape, count, dtype=parameter.dtype, device=parameter.device)
        try:
            with torch.no_grad(), QuickShapes():
                output: object = model.train(mode == "training")(x)
        except Exception as error:
            shape = "x".join(map(str, info.shape))
            expected = f"a model that takes images of {shape}; in {mode} it fails ({error_line(error)})"
            raise ConfigError("model.name", config.name, expected) from error
        if not isinstance(output, Tensor):
            expected = f"a model that gives one tensor of logits, not {type(output).__name__} as in {mode}"
            raise ConfigError("model.name", config.name, expected)
        wanted = task_of(info).output_shape(info, count)
        if output.shape != wanted:
            kind = "texts" if info.length else "images"
            expected = f"a model that gives logits {list(wanted)} for {count} {kind}, not {list(output.shape)}"
            raise ConfigError("model.name", config.name, expected)


def _other_sides(info: DatasetInfo) -> list[int]:
    """Sizes to suggest: larger ones first, from the nearest on, then smaller ones."""
    smaller = [side for side in _SIDES if side < min(info.height, info.width)]
    return [side for side in _SIDES if side > min(info.height, info.width)] + smaller[::-1]


def _fits(config: ModelConfig, info: DatasetInfo) -> bool:
    try:
        _fitted(config, info, anywhere=False)
    except ConfigError:
        return False
    return True
