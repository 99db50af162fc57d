"""Where a model may be cut, and the two parts that a cut gives."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from torch import Tensor, nn

from runtime.config import ConfigError


def cuts(model: nn.Module) -> tuple[str, ...]:
    """The children of `model` (an `nn.Sequential`) after which it may be cut, in order.

    All but the last, and but those that would leave the client part without a parameter and so with nothing to learn.
    """
    if not isinstance(model, nn.Sequential):
        raise ConfigError("model.name", type(model).__name__, "an nn.Sequential of named children")
    valid: list[str] = []
    trainable = False
    for name, child in list(model.named_children())[:-1]:
        trainable = trainable or any(True for _ in child.parameters())
        if trainable:
            valid.append(name)
    return tuple(valid)


def split(model: nn.Module, cut: str) -> tuple[nn.Module, nn.Module]:
    """The client and the server part of `model`, cut after its child `cut`: server(client(x)) is model(x), bit for bit.

    The parts are made of the model's own modules: nothing is copied, names in the state dicts stay the model's own,
    each tensor belongs to one part only, and training the parts trains the model. A cut that the model does not have,
    or that divides tied weights, is a `ConfigError`.
    """
    valid = cuts(model)
    if cut not in valid:
        raise ConfigError("model.cut", cut, "the child of the model that ends the client part", valid)
    children = list(model.named_children())
    end = [name for name, _ in children].index(cut) + 1
    client, server = (nn.Sequential(OrderedDict(part)) for part in (children[:end], children[end:]))
    if {id(tensor) for tensor in _tensors(client)} & {id(tensor) for tensor in _tensors(server)}:
        raise ConfigError("model.cut", cut, "a cut that does not divide weights shared by two children", valid)
    # A new container starts in training mode; the children, shared with the model, keep theirs.
    client.training = server.training = model.training
    return client, server


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
