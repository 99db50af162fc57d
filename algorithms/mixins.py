"""What a few methods have beyond the contract: a class to inherit beside `Algorithm` for each.

The engine asks whether a method is a subclass of one of these, and goes its usual way where it is not.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import Fields, Payload, Reply
from cutlayer.runtime.parties.optim import OptimizerConfig
from cutlayer.tasks import Loss

if TYPE_CHECKING:
    from cutlayer.models import ModelConfig
    from cutlayer.runtime.parties.blueprint import Blueprint
    from cutlayer.runtime.parties.cohort import Asked, Cohort


class OwnSteps:
    """A method whose clients' batches are not those of ``local_epochs`` passes over their data."""

    @classmethod
    def steps(cls, config: Any, client: int, num_clients: int, sizes: Sequence[int]) -> list[int]:
        """The batches of a client's round, as numbers of samples.

        Args:
            sizes: those of its local epochs.
        """
        raise NotImplementedError


class CountsSteps:
    """A method that does not take one step of every part for each of a client's batches."""

    @staticmethod
    def part_steps(config: Any, part: str, steps: int, epochs: int) -> int | None:
        """Steps of a part's optimizer that a client's round takes, wherever it is trained; None: not known ahead.

        A schedule by step moves on by them. Where a round has several optimizers over a part, they are those of each.

        Args:
            steps: the client's batches in the round, of ``epochs`` local epochs.
        """
        raise NotImplementedError


class ComputesTogether:
    """A method whose clients hold equal weights as a round begins, so that a whole cohort can be computed as one.

    The messages, the bytes and, but for rounding, the results are those of the clients' own programs.
    """

    @classmethod
    def computes_together(cls, config: Any) -> bool:
        """Whether ``together`` may stand for the clients' programs: they hold the same weights and take one step."""
        raise NotImplementedError

    @staticmethod
    def together(cohort: Cohort, down: Payload) -> Generator[Asked, dict[int, Reply], Fields]:
        """The round of a whole cohort of equal weights: yields what each client asks, returns what each uploads."""
        raise NotImplementedError


class KeepsByConfig:
    """A method whose configuration says which parts of the model clients have for themselves."""

    @classmethod
    def kept(cls, config: Any) -> tuple[str, ...]:
        """These parts, in the place of ``Algorithm.personal``."""
        raise NotImplementedError


class ChecksOptimizer:
    """A method whose equations do not hold for every optimizer."""

    @classmethod
    def check_optimizer(cls, optimizer: OptimizerConfig) -> None:
        """Raises ConfigError if they do not hold for this one, of a client's part."""
        raise NotImplementedError


class TrainsAdapters:
    """A method that is defined for low-rank adapters (``model.lora``), of which both matrices learn."""

    name: ClassVar[str]

    @classmethod
    def check_adapters(cls, model: ModelConfig) -> None:
        """Raises ConfigError if the model has none, or only one of the two matrices learns."""
        if model.lora.r < 1:
            raise ConfigError("model.lora.r", model.lora.r, f"1 or more, as {cls.name} trains low-rank adapters")
        if model.lora.train != "both":
            raise ConfigError("model.lora.train", model.lora.train, f"both, as {cls.name} is defined for")


class ClientRound(NamedTuple):
    """A client's round among those of all.

    Attributes:
        cohorts: of all rounds so far, this one the last. before: the client's round before this one, if any.
    """

    client: int
    cohorts: Sequence[Sequence[int]]
    before: int | None


class OwnSizes:
    """A method with messages that are not whole parts."""

    @classmethod
    def field_bytes(cls, blueprint: Blueprint, turn: ClientRound) -> Mapping[str, int]:
        """Bytes of the fields of a client's round that are neither parts nor of a batch."""
        raise NotImplementedError


class OwnLoss:
    """A method by whose own loss clients may fine-tune the trained model as well (``personalize.loss=method``)."""

    beside: ClassVar[tuple[str, ...]] = ()
    """Parts that the loss needs beside the model's. They begin in their initial state, and learn with the head."""

    @staticmethod
    def loss_of(
        body: nn.Module, head: nn.Module, beside: Sequence[nn.Module], x: Tensor, y: Tensor, config: Any, loss: Loss
    ) -> Tensor:
        """The loss of a batch: x [b, C, H, W], y int64 [b].

        Args:
            beside: the parts that ``beside`` names, in its order.
            loss: of the dataset's task.
        """
        raise NotImplementedError


class ConfiguresParts:
    """A method whose own configuration says how some of its parts are built and learn."""

    @classmethod
    def part_options(cls, config: Any) -> Mapping[str, Mapping[str, Any]]:  # noqa: ARG003
        """What the method's own configuration says of its parts: by part what its builder finds in ``options``."""
        return {}

    @classmethod
    def part_optimizers(cls, config: Any) -> Mapping[str, OptimizerConfig]:  # noqa: ARG003
        """Optimizers, at a constant rate, that parts have in place of the top-level one and its schedule.

        ``model.<part>.optimizer`` and ``model.<part>.scheduler`` refine them as they would refine those.
        """
        return {}


class CopyPerClient:
    """A server whose answers to a client come of a copy of its own, which nothing but that client's messages touch.

    For a class to inherit beside ``Server``. The copy may then compute where the client does.
    """

    copied: ClassVar[tuple[str, ...]]
    """The parts that a client's copy begins the round with."""

    def give_back(self, client: int) -> dict[str, Mapping[str, Tensor]]:
        """What a client's copy has come to, by part; it is forgotten here."""
        raise NotImplementedError

    def take_back(self, client: int, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Have what a client's copy has come to elsewhere, as if it had been here."""
        raise NotImplementedError
