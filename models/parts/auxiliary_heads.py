"""Auxiliary heads: small classifiers on what is inside a model, attached to any of its blocks by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cutlayer.models.config import ModelConfig
from cutlayer.models.cutting import is_ghost
from cutlayer.models.layers import FeatureMean
from cutlayer.models.part_registry import Making, PartConfig, part
from cutlayer.models.registry import entry
from cutlayer.models.shapes import output_width, sample, trace
from cutlayer.models.splitting import body_and_head, children_of
from cutlayer.runtime.ground.config import ConfigError

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo

_KEY = "model.auxiliary_heads.blocks"
_MOST = 3  # heads that the general rule attaches


@dataclass(frozen=True)
class AuxiliaryHeadsConfig(PartConfig):
    """Auxiliary heads: `blocks` are the modules after which one is attached; None means the model's own."""

    blocks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None and not self.blocks:
            raise ConfigError("blocks", self.blocks, "null or a list of one or more modules of the model")

    @property
    def names_modules(self) -> bool:
        return self.blocks is not None

    def try_on(self, model: nn.Module, config: ModelConfig, info: DatasetInfo, parts: Collection[str]) -> None:
        if self.names_modules and isinstance(model, nn.Sequential):
            with torch.device("meta"):
                build_auxiliary_heads(config, info, body_and_head(model)[0])


class AuxiliaryHeads(nn.ModuleList):
    """Auxiliary heads, in the order of the `blocks` of a body that they are attached to."""

    def __init__(self, heads: Sequence[nn.Module], blocks: tuple[str, ...]) -> None:
        super().__init__(heads)
        self.blocks = blocks

    def attached(self, body: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One forward pass of `body`: its output, and each head's outputs [b, classes + 1]."""
        z, inner = forward_with_blocks(body, self.blocks, x)
        return z, [head(output) for head, output in zip(self, inner, strict=True)]


def head_blocks(config: ModelConfig, body: nn.Module) -> tuple[str, ...]:
    """Names of the blocks of a `body` that have an auxiliary head, in the order in which the forward pass ends them.

    They are those of `model.auxiliary_heads.blocks`, or those that the model is registered with, or by a general rule
    the last three groups of layers but the one that the classifier itself sees. A name is a child of the model or,
    dotted, a module inside of one (`layer2.0`). One that is neither, the classifier's, one before which nothing can
    learn and a repeated one are a `ConfigError`, as is a model in which the rule finds no block.
    """
    blocks = config.part("auxiliary_heads", AuxiliaryHeadsConfig).blocks
    if blocks is None:
        blocks = entry(config.name).blocks_for(config.typed_options()) or _by_rule(body)
        if not blocks:
            raise ConfigError(
                _KEY, None, "names of modules, as the model has too few layers to choose from", children_of(body)
            )
    valid = list(_ended(body))
    for i, name in enumerate(blocks):
        if name not in valid:
            # Outermost first: a long list is shown cut short.
            choices = sorted(valid, key=lambda other: other.count("."))
            raise ConfigError(
                _KEY, name, "a module of the model before its classifier, with something to learn", choices
            )
        if name in blocks[:i]:
            raise ConfigError(_KEY, name, "each block once")
    return tuple(sorted(blocks, key=valid.index))


@part("auxiliary_heads", needs=("body",), config=AuxiliaryHeadsConfig)
def _auxiliary_heads(making: Making) -> nn.Module:
    return build_auxiliary_heads(making.config, making.info, making.parts["body"])


def build_auxiliary_heads(config: ModelConfig, info: DatasetInfo, body: nn.Module) -> AuxiliaryHeads:
    """Fresh auxiliary heads for a `body`, one for each of `head_blocks(config, body)`: output -> [b, classes + 1].

    A head is the mean over pixels or tokens and one linear layer without bias, whose last output is a temperature for
    each sample (Multi-Head Mutual Distillation). Weights come from torch's global generator; `body` is neither changed
    nor kept. A block whose output is not a tensor [b, c, h, w], [b, tokens, d] or [b, d], or that does not run exactly
    once, is a `ConfigError`.
    """
    blocks = head_blocks(config, body)
    parameter = next(body.parameters())
    with _recorded(body, blocks) as outputs:
        # Two images: BatchNorm in training mode refuses one value a channel.
        trace(body, sample(info.shape, 2, dtype=parameter.dtype, device="meta"))
    heads = [
        nn.Sequential(
            OrderedDict(pool=FeatureMean(), fc=nn.Linear(_features(name, outputs[name]), info.outputs + 1, bias=False))
        )
        for name in blocks
    ]
    return AuxiliaryHeads(heads, blocks)


def forward_with_blocks(body: nn.Module, blocks: Sequence[str], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One forward pass of `body`: its output, and the outputs of the modules `blocks` in the order of the names.

    `body` is a model without its classifier (`body_and_head`). All outputs are part of the pass's graph, so that a loss
    of any of them reaches what is before it. A module that is not there, does not run, runs more than once, or whose
    output is overwritten in place by a later one is a `ConfigError`.
    """
    with _recorded(body, blocks) as outputs:
        output = body(x)
    return output, [outputs[name] for name in blocks]


@contextmanager
def _recorded(body: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the modules `blocks` in the one forward pass that runs meanwhile, checked at its end."""
    outputs: dict[str, Tensor] = {}
    versions: dict[str, int] = {}
    modules = dict(body.named_modules(remove_duplicate=False))
    unknown = next((name for name in blocks if not name or name not in modules), None)
    if unknown is not None:
        raise ConfigError(_KEY, unknown, "a module of the model before its classifier", children_of(body))

    def keep(name: str, output: object) -> None:
        if name in outputs:
            raise ConfigError(_KEY, name, "a module that runs once, not twice, in a forward pass")
        if not isinstance(output, Tensor):
            raise ConfigError(_KEY, name, f"a module that gives one tensor, not {type(output).__name__}")
        outputs[name], versions[name] = output, _version(output)

    hooks = [
        modules[name].register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
        for name in dict.fromkeys(blocks)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
    for name in blocks:
        if name not in outputs:
            raise ConfigError(_KEY, name, "a module that runs in a forward pass; this one is not called by its parent")
        if versions[name] != _version(outputs[name]):
            raise ConfigError(_KEY, name, "a module whose output stays; a later layer writes into this one's")


def _version(tensor: Tensor) -> int:
    """How often `tensor` has been written to; tensors of inference mode do not count, and give 0."""
    return 0 if tensor.is_inference() else tensor._version


def _features(name: str, output: Tensor) -> int:
    if output.dim() not in (2, 3, 4):
        shape = list(output.shape)
        raise ConfigError(_KEY, name, f"a module that gives [b, c, h, w], [b, tokens, d] or [b, d], not {shape}")
    return output_width(output)


def _ended(module: nn.Module, prefix: str = "", learns: bool = False) -> Iterator[str]:
    """Names of the modules in `module` in the order in which their forward passes end, from the first weights on."""
    for name, child in children_of(module).items():
        if is_ghost(child):
            continue
        yield from _ended(child, f"{prefix}{name}.", learns)
        learns = learns or any(True for _ in child.parameters())
        if learns:
            yield prefix + name


def _by_rule(body: nn.Module) -> tuple[str, ...]:
    """Where the last layers end, a layer being a child with weights and what follows it, but for the very last one."""
    ends: list[str] = []
    for name, child in children_of(body).items():
        # A normalisation has vectors only and belongs to the layer that it follows.
        if any(p.dim() > 1 for p in child.parameters()):
            ends.append(name)
        elif ends and not isinstance(child, nn.Flatten):
            ends[-1] = name
    return tuple(ends[:-1][-_MOST:])
