"""The registry of tasks: what a dataset asks of a model, how that is trained and how it is tested.

A task is one class, registered by name; data say which one they are of (`RawDataset.task`). Every module of this
package is imported, so that a new file registers itself.
"""

from __future__ import annotations

if __name__ != "cutlayer.tasks":
    from cutlayer.names import refuse

    refuse(__name__)

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cutlayer.datasets import DatasetInfo
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.registry import Registry, import_modules

IGNORED = -100
"""The target where nothing is predicted: losses and scores leave it out, as torch's ``cross_entropy`` does."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""The mean loss, a scalar, of a model's output for a batch and the targets."""


@dataclass(frozen=True)
class Score:
    """Samples that were tested, on the CPU.

    Attributes:
        losses: float64 [n], each sample's, summed over what was predicted of it.
        right, asked: int64 [n], how many predictions were right, and of how many.
        labels: int64 [n], by which samples are divided among clients.
        found: int64 [n], each sample's predicted class, where a task has one.
    """

    losses: Tensor
    right: Tensor
    asked: Tensor
    labels: Tensor
    found: Tensor | None = None

    @property
    def predicted(self) -> Tensor:
        """The class that was predicted of each sample: int64 [n].

        Raises:
            ConfigError: the task has no such class.
        """
        if self.found is None:
            raise ConfigError("evaluations", NO_VALUE, "what needs no predicted class, as these samples have none")
        return self.found

    @property
    def accuracy(self) -> float:
        """Share of the predictions that were right, in [0, 1]."""
        return float(self.right.sum().double() / self.asked.sum())

    @property
    def loss(self) -> float:
        """Mean loss of a prediction."""
        return float(self.losses.sum() / self.asked.sum())

    @property
    def both(self) -> tuple[float, float]:
        """Accuracy and loss."""
        return self.accuracy, self.loss

    def of(self, samples: Tensor) -> Score:
        """The score on some of the samples: int64 [k], positions among those that were tested."""
        each = (self.losses, self.right, self.asked, self.labels, self.found)
        return Score(*(None if values is None else values[samples] for values in each))  # pyright: ignore


class Task:
    """What a dataset asks of a model.

    ``b`` samples give an output and have targets, both [b, ...]; a target may be ``IGNORED``.
    """

    name: ClassVar[str] = ""
    """What the registry calls it."""

    sequential: ClassVar[bool] = False
    """There is an output at each place of a sequence."""

    def loss(self, smoothing: float) -> Loss:
        """The loss that is trained.

        Args:
            smoothing: share of each target, 0 to 1, that is spread evenly over all outputs.
        """
        raise NotImplementedError

    def each(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What a test takes of a batch.

        Returns:
            The loss of each sample without smoothing, summed over what is predicted: [b]; of how many predictions how
            many were right: int64 [b, 2], (right, asked); or [b, 3], the predicted class last, where there is one.
        """
        raise NotImplementedError

    def output_shape(self, info: DatasetInfo, samples: int) -> tuple[int, ...]:
        """The shape of a model's output for so many samples of the largest size."""
        return samples, info.outputs

    def targets(self, info: DatasetInfo, samples: int) -> Tensor:
        """Targets of so many samples of the largest size, of the right type and within bounds."""
        return torch.zeros(samples, dtype=torch.int64)

    def wrong(self, y: Tensor, info: DatasetInfo) -> str | None:
        """What is wrong with targets that came from elsewhere: their type or their values; None where nothing is."""
        if y.dtype != torch.int64:
            return f"{str(y.dtype).removeprefix('torch.')} and not int64"
        outside = (y < 0) | (y >= info.outputs)
        if not outside.any():
            return None
        return f"values from {int(y.min())} to {int(y.max())}; classes are 0 to {info.outputs - 1}"

    def figures(self, score: Score) -> Mapping[str, float]:
        """Metrics of a test beside accuracy and loss, by name."""
        return {}


TASKS: Registry[Task] = Registry("task")


def register(name: str) -> Callable[[type[Task]], type[Task]]:
    """Register the decorated class as task `name`."""

    def add(task: type[Task]) -> type[Task]:
        task.name = name
        TASKS.add(name, task())
        return task

    return add


def task_of(info: DatasetInfo) -> Task:
    """The task of a dataset."""
    return TASKS[info.task]


import_modules(__name__, __path__)
