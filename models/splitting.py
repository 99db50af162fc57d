"""Where a model may be cut, and the parts that cuts give.

A sequence that is cut between two of its children needs no more than two sequences. Everything else, a cut inside of a
child or a model with a forward of its own, is for `cutlayer.models.cutting`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from inspect import signature
from itertools import chain

import torch
from torch import Tensor, nn

from cutlayer.models.cutting import CutError, Part, split_module
from cutlayer.models.cutting.recording import called_modules, contains_cut
from cutlayer.models.cutting.together import recorded_together
from cutlayer.models.shapes import sample
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError

# Tokens of the sequences that a model is recorded with: what its parts compute is linear in their number.
_TRIED = 16


def children_of(model: nn.Module) -> dict[str, nn.Module]:
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
    if shape is not None and not _is_between_children(model, cut):
        client, server = _split_anywhere(model, [cut], shape, compare)
        return client, server
    valid = cuts(model)
    if cut not in valid:
        raise ConfigError("model.cut", cut, "the child of the model that ends the client part", valid)
    client, server = _divide(model, 1 + list(children_of(model)).index(cut))
    if _shared(client, server):
        raise ConfigError("model.cut", cut, "a cut that does not divide weights shared by two children", valid)
    return client, server


def split_in_three(
    model: nn.Module, first: str, second: str, shape: Sequence[int] | None = None, *, compare: bool = True
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Client part, server part and tail of `model`, cut after its modules `first` and `second`.

    As with `split`, tail(server(client(x))) is model(x), bit for bit. Besides what that refuses, cuts out of order and
    a part without weights are a `ConfigError`.
    """
    if shape is not None and not _is_between_children(model, first, second):
        client, server, tail = _split_anywhere(model, [first, second], shape, compare)
        return client, server, tail
    valid = cuts(model)
    for cut in (first, second):
        if cut not in valid:
            raise ConfigError("model.cut", cut, "the children that end the client part and the server part", valid)
    order = list(children_of(model))
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


def check_cuts(model: nn.Module, *chosen: str) -> None:
    """Raise what `split` or `split_in_three` raises if the model has no such modules; it may be without memory."""
    if isinstance(model, nn.Sequential) and all(cut in children_of(model) or "." not in cut for cut in chosen):
        _ = split(model, chosen[0]) if len(chosen) == 1 else split_in_three(model, chosen[0], chosen[1])
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    for cut in chosen:
        if not cut or cut not in modules:
            children = [name for name, _ in model.named_modules() if name.count(".") < 2 and name]
            raise ConfigError("model.cut", cut, "a module of the model", children)


def _is_between_children(model: nn.Module, *chosen: str) -> bool:
    return isinstance(model, nn.Sequential) and children_of(model).keys() >= {*chosen}


def blocks_behind(model: nn.Module, cut: str, shape: Sequence[int]) -> list[str]:
    """The modules behind `cut` that are of its kind, in the order in which they run: the blocks of a transformer."""
    kind, order = type(model.get_submodule(cut)), candidates(model, shape)
    after = order[order.index(cut) + 1 :] if cut in order else []
    return [name for name in after if type(model.get_submodule(name)) is kind]


def without_blocks(model: nn.Module, cut: str, kept: Sequence[str], shape: Sequence[int]) -> nn.Module:
    """What is behind `cut` with only the first of the `blocks_behind` it, those that are `kept`: at least one.

    It is made of the model's own tensors. Where several values cross, a cut there is a `ConfigError`.
    """
    last = blocks_behind(model, cut, shape)[-1]
    if kept[-1] == last:
        return split(model, cut, shape, compare=False)[1]
    parts = _split_anywhere(model, [cut, kept[-1], last], shape, compare=False, bare=True)
    return nn.Sequential(OrderedDict(body=parts[1], tail=parts[3]))


def _split_anywhere(
    model: nn.Module, chosen: Sequence[str], shape: Sequence[int], compare: bool, *, bare: bool = False
) -> list[Part]:
    """The parts at the cuts; `bare` says that some may have no weights that learn."""
    try:
        parts = split_module(model, chosen, _samples(model, _examples(shape)), check=compare)
    except CutError as error:
        expected = f"a module that the model can be cut after; {error.why}"
        others = [name for name in _outermost(model, shape) if name != error.cut]
        raise ConfigError("model.cut", error.cut, expected, others) from error
    if not bare and not all(any(True for _ in part.parameters()) for part in parts):
        given = chosen[0] if len(chosen) == 1 else [*chosen]
        expected = "a cut that leaves weights to each part"
        raise ConfigError("model.cut", given, expected, _outermost(model, shape))
    return parts


def _examples(shape: Sequence[int]) -> Tensor:
    """Images, or sequences that differ, as what a part of a model makes of all alike may seem a constant."""
    if len(shape) > 1:
        return sample(shape, 2)
    return torch.randint(2, (8, min(shape[0], _TRIED)), generator=torch.Generator().manual_seed(0))


def _samples(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Samples by the name of the model's first input."""
    return {next(iter(signature(model.forward).parameters)): x}


def candidates(model: nn.Module, shape: Sequence[int]) -> list[str]:
    """Modules that end once in a forward pass, in this order: where a cut may be. `shape` is that of an image."""
    return _once(ended(model, shape)[:-1])


def block_ends(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of a model's modules that are the blocks it consists of: in a list or sequence of several, in no other."""
    several = (nn.ModuleList, nn.Sequential)
    lists = [name for name, module in model.named_modules() if isinstance(module, several) and len(module) > 1]
    outermost = [name for name in lists if not any(contains_cut(other, [name]) for other in lists if other != name)]
    return [name for name in names if name.rpartition(".")[0] in outermost]


def cuts_recorded(model: nn.Module, names: Sequence[str], shape: Sequence[int]) -> AbstractContextManager[None]:
    """Inside, what happens around each of these cuts is known from passes of `model`, which are made now."""
    return recorded_together(model, names, _samples(model, _examples(shape)))


def ended(model: nn.Module, shape: Sequence[int]) -> list[str]:
    """Paths of the modules in the order in which their calls end, one for each call, for an image of `shape`."""
    mode = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            return called_modules(model.eval(), _samples(model, zeros(model, shape)))
    finally:
        model.train(mode)


def zeros(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """One sample of zeros, an image [1, c, h, w] or some tokens, where the model is and in its precision."""
    floating = (parameter for parameter in model.parameters() if parameter.is_floating_point())
    like = next(floating, torch.empty(0))
    shape = shape if len(shape) > 1 else (min(shape[0], _TRIED),)
    return sample(shape, 1, dtype=like.dtype, device=like.device)


def _once(calls: Sequence[str]) -> list[str]:
    times = Counter(calls)
    return [name for name in calls if times[name] == 1]


def classifier(model: nn.Module, shape: Sequence[int]) -> str:
    """The path of the classifier: the last child of an `nn.Sequential`, else the last module with weights of its own.

    `shape` is that of an image (c, h, w). A model that ends otherwise is a `ConfigError`.
    """
    if isinstance(model, nn.Sequential):
        calls, last = list(children_of(model))[-1:], 0
    else:
        calls = ended(model, shape)
        last = _last_with_weights(model, calls)
    if not calls or not any(True for _ in model.get_submodule(calls[last]).parameters()):
        raise ConfigError("model.name", NO_VALUE, "the model needs weights in its last module, the classifier")
    return calls[last]


def _last_with_weights(model: nn.Module, calls: Sequence[str]) -> int:
    """The number of the last call of a module that has weights of its own; 0 where none has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return max((i for i, name in enumerate(calls) if any(True for _ in modules[name].parameters(False))), default=0)


def _before_classifier(model: nn.Module, shape: Sequence[int]) -> str:
    """The module that ends last before the last one that has weights of its own begins."""
    calls = ended(model, shape)
    last = _last_with_weights(model, calls)
    before = [name for name in _once(calls) if name in calls[:last]]
    if not before:
        raise ConfigError("model.name", NO_VALUE, "the model needs a module before its classifier")
    return before[-1]


def _outermost(model: nn.Module, shape: Sequence[int]) -> list[str]:
    """`candidates`, a module before those in it."""
    return sorted(candidates(model, shape), key=lambda name: name.count("."))


def body_and_head(model: nn.Module, shape: Sequence[int] | None = None) -> tuple[nn.Module, nn.Module]:
    """All of `model` but its classifier, and the classifier: head(body(x)) is model(x), bit for bit.

    The classifier of an `nn.Sequential` is its last child. That of another model, for which the `shape` of an image (c,
    h, w) is needed, is the last module with weights of its own and what comes after it. As with `split` both
    are made of the model's own modules under their own names (`fc.weight`). A model in which no such cut is possible,
    or in which body and classifier share weights, is a `ConfigError`.
    """
    if shape is not None and not isinstance(model, nn.Sequential):
        body, head = _split_anywhere(model, [_before_classifier(model, shape)], shape, compare=True)
        return body, head
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
    return list(children_of(model).items())


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
