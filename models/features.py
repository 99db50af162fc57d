"""Features instead of logits: what a model's classifier takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cutlayer.models.layers import FeatureMean
from cutlayer.models.sources import error_line
from cutlayer.models.splitting import classifier, zeros
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError


def give_features(model: nn.Module, shape: Sequence[int]) -> str:
    """Make `model` return features [b, d], what its classifier takes, in place; the classifier's name is returned.

    The classifier is the last child of an `nn.Sequential`, of another model the last module with weights of its own; of
    what it takes, a map [b, c, h, w] or tokens [b, tokens, d] are averaged. It stays where it is, with its weights and
    names, but they no longer decide anything and get no gradients. Copies of the model, and the last of the parts
    that it is then cut into, give features too. `shape` is that of an image (c, h, w).

    Raises:
        ConfigError: the model makes something else of the features once its classifier is left out.
    """
    name = classifier(model, shape)
    hook = leave_out(model.get_submodule(name))
    try:
        _check(model, name, shape)
    except ConfigError:
        hook.remove()
        raise
    return name


def leave_out(classifier: nn.Module) -> RemovableHandle:
    """Let a classifier give what it takes, a map or a row of tokens as its mean, until the handle is removed."""
    return classifier.register_forward_hook(_features)


def feature_width(model: nn.Module, shape: Sequence[int]) -> int:
    """The d of the features [b, d] of a model that gives them; its mode and torch's generator are left as they were."""
    return _pass(model, shape).shape[1]


def _features(_model: nn.Module, args: tuple[Any, ...], _output: object) -> Tensor:
    return FeatureMean()(args[0])


def _check(model: nn.Module, name: str, shape: Sequence[int]) -> None:
    """Whether what the classifier's hook gives is what the model gives."""
    taken: list[Any] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _module, _args, output: taken.append(output))
    expected = f"a model whose last layer is its classifier, which is {name} here; without it"
    try:
        given: object = _pass(model, shape)
    except Exception as error:
        raise ConfigError("model.name", NO_VALUE, f"{expected} it fails ({error_line(error)})") from error
    finally:
        handle.remove()
    # The deepest networks overflow in evaluation with the statistics that they start from: NaN is as good as a number.
    same = len(taken) == 1 and isinstance(given, Tensor) and torch.equal(given.nan_to_num(), taken[0].nan_to_num())
    if not same:
        raise ConfigError("model.name", NO_VALUE, f"{expected} it gives something else than one vector an image")


def _pass(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """What the model gives for two images in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=generator, device="cpu").to(zeros(model, shape))
    mode = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return model.eval()(x)
    finally:
        model.train(mode)
