"""Where a model may be cut, and the parts that cuts give.

A sequence that is cut between two of its children needs no more than two sequences. Everything else, a cut inside of a
child or a model with a forward of its own, is for `models.cutting`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from inspect import signature
from itertools import chain

import torch
from torch import Tensor, nn

from models.cutting import CutError, split_module
from models.cutting.recording import called_modules
from runtime.config import NO_VALUE, ConfigError


def named(model: nn.Module) -> dict[str, nn.Module]:
    """The children of `model` by name; unlike `named_children`, with a module that occurs twice under both names."""
    return {name: child for name, child in model._modules.items() if child is not None}


def cuts(model: nn.Module) -> tuple[str, ...]:
    """The children of `model` (an `nn.Sequential`) after which it may be cut, in order.

    All but the last, and but those that would leave the client part without a parameter and so with nothing to learn.
    """
    valid: list[str] = []
    trainable = False
    for name, child in _children(model)[:-1]:
        trainable = trainable or any(True for _ in child.parameters())
        if trainable:
            valid.append(name)
    return tuple(valid)


def split(
    model: nn.Module, cut: str, shape: Sequence[int] | None = None, *, compare: bool = True
) -> tuple[nn.Module, nn.Module]:
    """The client and the server part of `model`, cut after its module `cut`: server(client(x)) is model(x) to the bit.

    The parts are made of the model's own tensors: nothing is copied, names in the state dicts stay the model's own,
    each tensor belongs to one part only, and training the parts trains the model. `shape` is that of an image (c, h,
    w); without it the cut is after a child of an `nn.Sequential`. Where several values cross, the client part gives a
    tuple. A cut that the model does not have, or that divides tied weights, is a `ConfigError`. `compare` False leaves
    out the comparison of such parts with the model.
    """
    if shape is not None and not (isinstance(model, nn.Sequential) and cut in named(model)):
        return _split_anywhere(model, cut, shape, compare)
    valid = cuts(model)
    if cut not in valid:
        raise ConfigError("model.cut", cut, "the child of the model that ends the client part", valid)
    client, server = _divide(model, 1 + list(named(model)).index(cut))
    if _shared(client, server):
        raise ConfigError("model.cut", cut, "a cut that does not divide weights shared by two children", valid)
    return client, server


def check_cut(model: nn.Module, cut: str) -> None:
    """Raise what `split` raises if the model, which may be without memory for its weights, has no module `cut`."""
    if isinstance(model, nn.Sequential) and (cut in named(model) or "." not in cut):
        split(model, cut)
    elif not cut or cut not in dict(model.named_modules(remove_duplicate=False)):
        children = [name for name, _ in model.named_modules() if name.count(".") < 2 and name]
        raise ConfigError("model.cut", cut, "a module of the model", children)


def _split_anywhere(model: nn.Module, cut: str, shape: Sequence[int], compare: bool) -> tuple[nn.Module, nn.Module]:
    try:
        client, server = split_module(model, [cut], _images(model, torch.zeros(2, *shape)), check=compare)
    except CutError as error:
        expected = f"a module that the model can be cut after; {error.why}"
        raise ConfigError("model.cut", cut, expected, _outermost(model, shape)) from error
    if not all(any(True for _ in part.parameters()) for part in (client, server)):
        expected = "a cut that leaves weights to the client and to the server"
        raise ConfigError("model.cut", cut, expected, _outermost(model, shape))
    return client, server


def _images(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Images by the name of the model's first input."""
    return {next(iter(signature(model.forward).parameters)): x}


def candidates(model: nn.Module, shape: Sequence[int]) -> list[str]:
    """Modules that end once in a forward pass, in this order: where a cut may be. `shape` is that of an image."""
    mode = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            ended = called_modules(model.eval(), _images(model, torch.zeros(1, *shape)))
    finally:
        model.train(mode)
    times = Counter(ended)
    return [name for name in ended[:-1] if times[name] == 1]


def _outermost(model: nn.Module, shape: Sequence[int]) -> list[str]:
    return sorted(candidates(model, shape), key=lambda name: name.count("."))


def split_in_three(model: nn.Module, first: str, second: str) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
    """Client part, server part and tail of `model`, cut after its children `first` and `second`.

    As with `split`, tail(server(client(x))) is model(x), bit for bit. Besides what that refuses, cuts out of order and
    a part without weights are a `ConfigError`.
    """
    valid = cuts(model)
    for cut in (first, second):
        if cut not in valid:
            raise ConfigError("model.cut", cut, "the children that end the client part and the server part", valid)
    order = list(named(model))
    if order.index(first) >= order.index(second):
        raise ConfigError("model.cut", [first, second], "two children of the model, in its order", valid)
    client, rest = _divide(model, 1 + order.index(first))
    server, tail = _divide(rest, order.index(second) - order.index(first))
    if not all(any(True for _ in part.parameters()) for part in (server, tail)):
        raise ConfigError("model.cut", [first, second], "cuts that leave weights to each of the three parts", valid)
    if _shared(client, rest) or _shared(server, tail):
        expected = "cuts that do not divide weights shared by two children"
        raise ConfigError("model.cut", [first, second], expected, valid)
    return client, server, tail


def body_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """All children of `model` but the last, and the last, its classifier: head(body(x)) is model(x), bit for bit.

    As with `split` both are sequences of the model's own modules under their own names (`fc.weight`). A model that is
    not an `nn.Sequential`, whose body or classifier has no weights, or in which they share some is a `ConfigError`.
    """
    children = _children(model)
    body, head = _divide(model, len(children) - 1)
    if not all(any(True for _ in part.parameters()) for part in (body, head)):
        raise ConfigError(
            "model.name", NO_VALUE, "the model needs weights in its last child, the classifier, and before it"
        )
    if _shared(body, head):
        name = children[-1][0]
        raise ConfigError("model.name", NO_VALUE, f"the classifier {name} shares weights with other layers")
    return body, head


def _children(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Sequential):
        raise ConfigError("model.name", type(model).__name__, "an nn.Sequential of named children")
    return list(named(model).items())


def _divide(model: nn.Module, end: int) -> tuple[nn.Sequential, nn.Sequential]:
    """The first `end` children and the others, each as a sequence in the model's mode."""
    children = _children(model)
    first, second = (nn.Sequential(OrderedDict(part)) for part in (children[:end], children[end:]))
    # A new container starts in training mode; the children, shared with the model, keep theirs.
    first.training = second.training = model.training
    return first, second


def _shared(first: nn.Module, second: nn.Module) -> bool:
    """Whether any tensor belongs to both."""
    return bool({id(tensor) for tensor in _tensors(first)} & {id(tensor) for tensor in _tensors(second)})


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
