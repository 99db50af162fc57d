"""The work that each side does, and what it tells of it; it needs no more than torch and safetensors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

IMAGE = (3, 32, 32)
CLASSES = 10


@dataclass(frozen=True)
class Work:
    """FedAvg with one local epoch of plain SGD.

    Attributes:
        clients, images: clients, and training images of each. tests: test images.
        cohort, batch: clients in a round; images in a batch.
        rounds: that are timed; one more goes before them.
    """

    clients: int = 1000
    images: int = 50
    tests: int = 1000
    cohort: int = 50
    batch: int = 10
    rounds: int = 10
    lr: float = 0.05

    @property
    def steps(self) -> int:
        """Local steps of all rounds, the first one included."""
        return (self.rounds + 1) * self.cohort * -(-self.images // self.batch)

    @property
    def samples(self) -> int:
        """Training images in these steps."""
        return (self.rounds + 1) * self.cohort * self.images

    def describe(self) -> str:
        """One line."""
        return (
            f"FedAvg, {self.clients} clients of {self.images} images of {'x'.join(map(str, IMAGE))}, "
            f"{self.cohort} in a round, one epoch in batches of {self.batch}, SGD {self.lr:g}"
        )


class Network(nn.Sequential):
    """Cutlayer's `cnn2`, written out: its weights are loaded by name."""

    def __init__(self) -> None:
        super().__init__()
        children = {
            "conv1": nn.Conv2d(3, 32, 3, padding=1),
            "relu1": nn.ReLU(),
            "pool1": nn.MaxPool2d(2),
            "conv2": nn.Conv2d(32, 64, 3, padding=1),
            "relu2": nn.ReLU(),
            "pool2": nn.MaxPool2d(2),
            "flatten": nn.Flatten(),
            "fc1": nn.Linear(64 * 8 * 8, 128),
            "relu3": nn.ReLU(),
            "fc2": nn.Linear(128, CLASSES),
        }
        for name, child in children.items():
            self.add_module(name, child)


@dataclass
class Counted:
    """Passes in training through a module and the images in them, counted by the module itself."""

    steps: int = 0
    samples: int = 0

    def attach(self, module: nn.Module) -> RemovableHandle:
        """Count those of this module too, until it is removed."""
        return module.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            self.steps += 1
            self.samples += len(inputs[0])


@dataclass
class Clock:
    """When rounds ended, and the weights at the end of the first one, which is no part of the time."""

    ends: list[float] = field(default_factory=list[float])
    first: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def on_round(self, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """A round has ended, with these weights."""
        if not self.ends:
            self.first = {name: tensor.clone() for name, tensor in weights().items()}
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """From the end of the first round to that of the last."""
        return self.ends[-1] - self.ends[0]


@dataclass(frozen=True)
class Given:
    """What the sides are given, in a folder, and where they leave what they tell.

    Attributes:
        folder: of the files.
    """

    folder: Path

    @classmethod
    def write(cls, folder: Path, work: Work, tensors: Mapping[str, Tensor]) -> Given:
        """Write what the sides are given; see the properties for the tensors."""
        (folder / "work.json").write_text(json.dumps(asdict(work)))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "work.safetensors")
        return cls(folder)

    @cached_property
    def work(self) -> Work:
        """What is to be done."""
        return Work(**json.loads((self.folder / "work.json").read_text()))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """By name.

        `x` [clients, images, *IMAGE] and `y` [clients, images], training data in the order of their batches; `test_x`
        [tests, *IMAGE] and `test_y` [tests]; `cohorts` [1 + rounds, cohort], clients by round in their order;
        `model/<parameter>`, initial weights.
        """
        return load_file(self.folder / "work.safetensors")

    def model(self) -> Network:
        """A model with the initial weights.

        Raises:
            RuntimeError: it has not the parameters of Cutlayer's.
        """
        model = Network()
        model.load_state_dict(
            {key.removeprefix("model/"): t for key, t in self.tensors.items() if key.startswith("model/")}
        )
        return model

    def batches(self, client: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A client's batches, the same ones in each round."""
        x, y = self.tensors["x"][client], self.tensors["y"][client]
        return zip(x.split(self.work.batch), y.split(self.work.batch), strict=True)

    def tell(
        self, name: str, weights: Mapping[str, Tensor], counted: Counted, clock: Clock, versions: Mapping[str, str]
    ) -> None:
        """Leave what a side has done: its final weights, the counts, the time, the packages that it ran on."""
        before, model = self.model(), Network()
        model.load_state_dict(dict(weights))
        told = Told(
            seconds=clock.seconds,
            rounds=len(clock.ends),
            counted=asdict(counted),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            before=self._test(before),
            after=self._test(model),
            versions={"torch": torch.__version__, **versions},
            threads=torch.get_num_threads(),
        )
        both = {**_under("first", clock.first), **_under("last", weights)}
        save_file(both, self.folder / f"{name}.safetensors")
        (self.folder / f"{name}.json").write_text(json.dumps(asdict(told)))

    def told(self, name: str) -> Told:
        """What a side has told.

        Raises:
            FileNotFoundError: it did not come so far.
        """
        return Told(**json.loads((self.folder / f"{name}.json").read_text()))

    def apart(self, name: str, reference: str) -> tuple[float, float]:
        """How far the weights of two sides are from each other, over how far they have come: first round, last round.

        The norm of the difference of all weights over that of what training has changed at the reference.
        """
        ours, theirs = (load_file(self.folder / f"{side}.safetensors") for side in (reference, name))
        found: list[float] = []
        for round in ("first", "last"):
            difference = [ours[key] - theirs[key] for key in ours if key.startswith(round)]
            change = [ours[key] - self.tensors[key.replace(round, "model")] for key in ours if key.startswith(round)]
            found.append(float(_norm(difference) / _norm(change)))
        return found[0], found[1]

    def _test(self, model: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            logits = model.eval()(self.tensors["test_x"])
        y = self.tensors["test_y"]
        return float((logits.argmax(1) == y).float().mean()), float(F.cross_entropy(logits, y))


def _under(head: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{head}/{name}": tensor.contiguous() for name, tensor in weights.items()}


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm()


@dataclass(frozen=True)
class Told:
    """What a side tells: seconds of the timed rounds, rounds in all, test accuracy and loss before and after."""

    seconds: float
    rounds: int
    counted: dict[str, int]
    parameters: int
    before: tuple[float, float]
    after: tuple[float, float]
    versions: dict[str, Any]
    threads: int
