"""What every party of a run can make for itself: the parts of the model, their initial state, their optimizers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cutlayer.datasets import DatasetInfo
from cutlayer.models import ModelConfig, division_of, make_parts, refinable
from cutlayer.models.frozen import FrozenTensor, frozen_in, share_again
from cutlayer.runtime.ground.config import ConfigError, join
from cutlayer.runtime.parties.aggregate import BufferPolicy
from cutlayer.runtime.parties.graphs import PassRecorder
from cutlayer.runtime.parties.optim import OptimizerConfig, PartOptimizer, make_optimizer
from cutlayer.runtime.parties.schedules import SchedulePoint, SchedulerConfig, learning_options
from cutlayer.tasks import Task, task_of

BATCH_NORM: Any = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]  the base of all of them
DROPOUT = nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage]  the base of all of them
Parts = dict[str, nn.Module]
WEIGHT_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
MEMORY_FORMATS = {"contiguous": torch.preserve_format, "channels_last": torch.channels_last}
"""By name how values lie in memory; models and images are made contiguous."""


class LearningConfig(Protocol):
    """What a blueprint reads of a run's configuration."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def seed(self) -> int: ...
    @property
    def label_smoothing(self) -> float: ...
    def optimizer_for(self, part: str) -> OptimizerConfig: ...
    def keeps_optimizer(self, part: str) -> bool | None: ...
    def scheduler_for(self, part: str) -> SchedulerConfig | None: ...
    def options_for(self, part: str) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Layout:
    """Which parts a method has, by party.

    Parts are registered, in `models/parts/`. ``model`` is the whole model; ``client`` and ``server`` are its halves at
    the cut layer, or with ``tail`` its thirds at two cuts, the tail being at the client again; ``body`` is all of it
    but the classifier, which is the ``head``. Other parts stand beside these. A part ``<name>_momentum`` is a copy that
    learns nothing by itself, such as a moving average of the part ``<name>``.
    """

    client: tuple[str, ...]
    server: tuple[str, ...]

    @property
    def whole(self) -> tuple[str, ...]:
        """The parts that make up the model, in the order in which data goes through them."""
        return division_of(self.parts)

    @property
    def cut(self) -> bool:
        """Whether the model is cut between the parties."""
        return "server" in self.whole

    @property
    def parts(self) -> frozenset[str]:
        """All parts of both parties."""
        return frozenset((*self.client, *self.server))


class Blueprint:
    """Builds parts, the same ones at every party: initial weights come from the seed alone.

    Clients' own parts may differ in architecture: this is the blueprint of the parties that have the first variant of
    each, ``for_client`` gives a client's.
    """

    def __init__(
        self,
        config: LearningConfig,
        layout: Layout,
        info: DatasetInfo,
        *,
        device: torch.device,
        precision: str,
        buffers: BufferPolicy,
        memory_format: str = "contiguous",
        recorder: PassRecorder | None = None,
        compare: bool = True,
    ) -> None:
        self.device = device
        self.dtype = WEIGHT_DTYPES[precision]
        self.buffers = buffers
        self._precision, self.recorder = precision, recorder
        self.task: Task = task_of(info)
        """What the data ask of a model."""
        self.loss = self.task.loss(config.label_smoothing)
        """The mean loss of a model's output for a batch and the targets."""
        made = make_parts(
            config.model, info, layout.parts, seed=config.seed, options=config.options_for, compare=compare
        )
        _place(chain.from_iterable(made.values()), self.device, self.dtype, MEMORY_FORMATS[memory_format])
        _make_ready(config.model, made)
        self._general = config.optimizer_for("model")
        self._optimizers = {name: config.optimizer_for(name) for name in made}
        self._schedulers = {name: config.scheduler_for(name) for name in made}
        self.keeps_optimizer = {name: config.keeps_optimizer(name) for name in made}
        """By part, whether its optimizer's state outlives the round; None where nothing says so."""
        self._parts: Parts = {name: modules[0] for name, modules in made.items()}
        self.initial = {name: copied_state(part) for name, part in self._parts.items()}
        self.buffer_names = {name: _buffer_names(part) for name, part in self._parts.items()}
        self.varied = frozenset(name for name, modules in made.items() if len(modules) > 1)
        """The parts of which clients have variants."""
        self.variants: tuple[Blueprint, ...] = (self, *self._others(made))
        """One blueprint for each combination of variants that clients have."""
        for blueprint in self.variants:
            blueprint.variants = self.variants

    @property
    def by_step(self) -> frozenset[str]:
        """The parts whose schedules go by their optimizers' steps."""
        return frozenset(name for name, each in self._schedulers.items() if each and each.per == "step")

    def _others(self, made: Mapping[str, Sequence[nn.Module]]) -> Iterator[Blueprint]:
        """The blueprints of all combinations of variants but the first."""
        several = math.lcm(*(len(modules) for modules in made.values()))
        for i in range(1, several):
            yield self._variant({name: made[name][i % len(made[name])] for name in self.varied})

    def _variant(self, parts: Parts) -> Blueprint:
        """This blueprint with other modules for some parts; everything else is shared."""
        twin = copy.copy(self)
        twin._parts = {**self._parts, **parts}
        twin.initial = {**self.initial, **{name: copied_state(part) for name, part in parts.items()}}
        twin.buffer_names = {**self.buffer_names, **{name: _buffer_names(part) for name, part in parts.items()}}
        return twin

    def for_client(self, client: int) -> Blueprint:
        """The blueprint with the client's own variant of each part; clients get them in rotation."""
        return self.variants[client % len(self.variants)]

    def parts(self, names: Iterable[str]) -> Parts:
        """Fresh copies of the named parts, in their initial state, in training mode."""
        made = {name: copy.deepcopy(self._parts[name]) for name in names}
        for part in made.values():
            self.let_replay(part)
        return made

    def let_replay(self, part: nn.Module) -> None:
        """Let a live part that many steps are computed with replay its passes, where ``compile`` asks for it."""
        if self.recorder is not None:
            self.recorder.attach(part)

    def replica(self, module: nn.Module) -> nn.Module:
        """A copy of a live part, without gradients."""
        twin = copy.deepcopy(module)
        twin.zero_grad(set_to_none=True)
        return twin

    def optimizer(
        self, modules: Sequence[tuple[str, nn.Module]], progress: Callable[[str], SchedulePoint]
    ) -> PartOptimizer:
        """A fresh optimizer over the given parts, as configured for each, at the learning rate of their progress."""
        optimizer = PartOptimizer(
            [make_optimizer(self._optimizers[name], module.parameters()) for name, module in modules], self.recorder
        )
        self.schedule(optimizer, [name for name, _ in modules], progress)
        return optimizer

    def fine_tuner(self, modules: Iterable[nn.Module], lr: float) -> PartOptimizer:
        """A fresh optimizer of the run's general kind over the modules together, at a constant learning rate."""
        config = replace(self._general, options={**self._general.options, "lr": lr})
        return PartOptimizer([make_optimizer(config, chain.from_iterable(module.parameters() for module in modules))])

    def schedule(
        self, optimizer: PartOptimizer, names: Sequence[str], progress: Callable[[str], SchedulePoint]
    ) -> None:
        """Set what the parts' schedules say where they are, and have those that go by steps go on from there."""
        places = {name: progress(name) for name in names}
        optimizer.set([self._learning_options(name, places[name], 0) for name in names])
        optimizer.go_by(
            [partial(self._learning_options, name, places[name]) if name in self.by_step else None for name in names]
        )

    def _learning_options(self, name: str, place: SchedulePoint, steps: int) -> dict[str, Any]:
        return learning_options(self._optimizers[name], self._schedulers[name], place.at + steps, place.of)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that forward passes run in.

        Weights are cast anew at each use. Autocast would keep its casts until the context ends, and a party's turn may
        hold many steps: all but the first would compute with weights that are no longer there.
        """
        if self._precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
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


def _make_ready(config: ModelConfig, made: Mapping[str, Sequence[nn.Module]]) -> None:
    """Do to the parts what their sections under ``model`` say; a section of a part that is not there may object."""
    for name in refinable():
        section = config.part(name)
        try:
            if name not in made:
                section.absent()
            for module in made.get(name, ()):
                section.ready(module)
        except ConfigError as error:
            raise error.within(join("model", name)) from None


def _place(
    modules: Iterable[Any], device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Put fresh modules on a device, in training mode; their weights of four dimensions lie there in this order.

    What they share stays shared.
    """
    ordered = {} if memory_format == torch.preserve_format else {"memory_format": memory_format}
    moved = dict[int, FrozenTensor]()
    for module in modules:
        shared = frozen_in(module)
        module.to(device, dtype, **ordered).train()
        for each in shared:
            share_again(each, moved)


def copied_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _buffer_names(module: nn.Module) -> frozenset[str]:
    """The keys of a module's state that are no parameters."""
    return frozenset(module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys())


def state_bytes(state: dict[str, Tensor]) -> int:
    """Bytes of a state: element count times element size."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in state.values())
