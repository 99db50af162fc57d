"""What every party of a run can make for itself: the parts of the model, their initial state, their optimizers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from datasets import DatasetInfo
from models import (
    ModelConfig,
    body_and_head,
    build_auxiliary,
    build_auxiliary_heads,
    build_model,
    default_cut,
    split,
)
from runtime import rng
from runtime.aggregate import BufferPolicy
from runtime.optim import OptimizerConfig, PartOptimizer, SchedulerConfig, learning_options, make_optimizer

BATCH_NORM: Any = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]  the base of all of them
Parts = dict[str, nn.Module]
DIVISIONS = (("model",), ("client", "server"), ("body", "head"))
DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


class LearningConfig(Protocol):
    """What a blueprint reads of a run's configuration."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def seed(self) -> int: ...
    def optimizer_for(self, part: str) -> OptimizerConfig: ...
    def scheduler_for(self, part: str) -> SchedulerConfig | None: ...


@dataclass(frozen=True)
class Layout:
    """Which parts a method has, by party.

    ``model`` is the whole model; ``client`` and ``server`` are its halves at the cut layer; ``body`` is all of it but
    the classifier, which is the ``head``. Beside these stand ``auxiliary``, the client's stand-in for the server part,
    and ``auxiliary_heads``, further classifiers on inner blocks of the body.
    """

    client: tuple[str, ...]
    server: tuple[str, ...]

    @property
    def whole(self) -> tuple[str, ...]:
        """The parts that make up the model, in the order in which data goes through them."""
        return next(parts for parts in DIVISIONS if not {*self.client, *self.server}.isdisjoint(parts))

    @property
    def cut(self) -> bool:
        """Whether the model is cut between the parties."""
        return self.whole == ("client", "server")


class Blueprint:
    """Builds parts, the same ones at every party: initial weights come from the seed alone."""

    def __init__(
        self,
        config: LearningConfig,
        layout: Layout,
        info: DatasetInfo,
        *,
        device: torch.device,
        precision: str,
        buffers: BufferPolicy,
    ) -> None:
        self.device = device
        self.dtype = DTYPES[precision]
        self.buffers = buffers
        self._precision = precision
        self._parts = self._build(config, layout, info)
        self._general = config.optimizer_for("model")
        self._optimizers = {name: config.optimizer_for(name) for name in self._parts}
        self._schedulers = {name: config.scheduler_for(name) for name in self._parts}
        self.initial = {name: copied_state(part) for name, part in self._parts.items()}
        self.buffer_names = {
            name: frozenset(self.initial[name].keys() - dict(part.named_parameters(remove_duplicate=False)).keys())
            for name, part in self._parts.items()
        }

    def _build(self, learning: LearningConfig, layout: Layout, info: DatasetInfo) -> Parts:
        config, seed = learning.model, learning.seed
        cpu = torch.device("cpu")
        with rng.TorchStream(rng.derive(seed, stream="model"), cpu):
            whole = build_model(config, info)
        parts: Parts = {"model": whole}
        needed = {*layout.client, *layout.server}
        if "auxiliary" in needed:
            with rng.TorchStream(rng.derive(seed, stream="auxiliary"), cpu):
                parts["auxiliary"] = build_auxiliary(config, info, whole)
        if "auxiliary_heads" in needed:
            with rng.TorchStream(rng.derive(seed, stream="auxiliary heads"), cpu):
                parts["auxiliary_heads"] = build_auxiliary_heads(config, info, whole)
        if layout.cut:
            parts["client"], parts["server"] = split(whole, model_cut(config))
        elif layout.whole == ("body", "head"):
            parts["body"], parts["head"] = body_and_head(whole)
        return {name: parts[name].to(self.device, self.dtype).train() for name in parts if name in needed}

    def parts(self, names: Iterable[str]) -> Parts:
        """Fresh copies of the named parts, in their initial state, in training mode."""
        return {name: copy.deepcopy(self._parts[name]) for name in names}

    def replica(self, module: nn.Module) -> nn.Module:
        """A copy of a live part, without gradients."""
        twin = copy.deepcopy(module)
        twin.zero_grad(set_to_none=True)
        return twin

    def optimizer(self, modules: Sequence[tuple[str, nn.Module]], round: int) -> PartOptimizer:
        """A fresh optimizer over the given parts, as configured for each, at the round's learning rate."""
        optimizer = PartOptimizer(
            [make_optimizer(self._optimizers[name], module.parameters()) for name, module in modules]
        )
        self.schedule(optimizer, [name for name, _ in modules], round)
        return optimizer

    def fine_tuner(self, modules: Iterable[nn.Module], lr: float) -> PartOptimizer:
        """A fresh optimizer of the run's general kind over the modules together, at a constant learning rate."""
        config = replace(self._general, options={**self._general.options, "lr": lr})
        return PartOptimizer([make_optimizer(config, chain.from_iterable(module.parameters() for module in modules))])

    def schedule(self, optimizer: PartOptimizer, names: Iterable[str], round: int) -> None:
        """Set what the parts' schedules say for ``round`` (0-based)."""
        optimizer.set([self._learning_options(name, round) for name in names])

    def _learning_options(self, name: str, round: int) -> dict[str, Any]:
        return learning_options(self._optimizers[name], self._schedulers[name], round)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that forward passes run in."""
        if self._precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def travelling(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """The state of a part as it is sent: with its buffers or without, as ``aggregate.buffers`` says."""
        state = module.state_dict()
        if self.buffers == "average":
            return state
        return {key: tensor for key, tensor in state.items() if key not in self.buffer_names[name]}

    def parameters(self, name: str) -> int:
        """Number of parameters of a part."""
        return sum(parameter.numel() for parameter in self._parts[name].parameters())

    def training_bytes(self, names: Iterable[str]) -> int:
        """Memory of one live copy of the parts while they train: weights, gradients and two moments."""
        return 4 * sum(state_bytes(self.initial[name]) for name in names)


def model_cut(config: ModelConfig) -> str:
    """The configured cut, or the model's own."""
    return config.cut if config.cut is not None else default_cut(config.name)


def copied_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def state_bytes(state: dict[str, Tensor]) -> int:
    """Bytes of a state: element count times element size."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in state.values())
