"""The weights with the best accuracy in the rounds' tests so far, for what is measured once training is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.records.history import RoundRecord
from cutlayer.runtime.rounds.learnt import Learnt
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.settings import RunConfig

States = dict[str, dict[str, Tensor]]
"""The state of each part of a model, by name."""


class BestWeights:
    """A copy of one model, that of the round whose test was the best; of equal tests the first.

    A checkpoint holds it, so that a resumed run has the one that it would have had.

    Args:
        model: gives the parts of the model as they are now.

    Attributes:
        round: the number of rounds that were over when it was tested, 0 as long as there was no test.
        accuracy: of that test.
        states: the copy, on the CPU.
    """

    def __init__(self, model: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> None:
        self._model = model
        self.round = 0
        self.accuracy = float("-inf")
        self.states: States = {}

    def see(self, record: RoundRecord) -> None:
        """Take in a round: keep its weights if its test is better than any before."""
        if record.test_acc is not None and record.test_acc > self.accuracy:
            self.round, self.accuracy = record.round, record.test_acc
            self.states = {name: _copy(state) for name, state in self._model().items()}

    def whole(self) -> dict[str, Tensor]:
        """The state of the whole model under the model's own names."""
        return {name: tensor for state in self.states.values() for name, tensor in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"round": self.round, "accuracy": self.accuracy if self.round else None, "states": self.states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave.

        Raises:
            RuntimeError: it is not of such a model.
        """
        if not state["round"]:
            return
        states = {name: _copy(part) for name, part in state["states"].items()}
        if _shapes(states) != _shapes(self._model()):
            raise RuntimeError("its best weights are not those of this run's model")
        self.round, self.accuracy, self.states = int(state["round"]), float(state["accuracy"]), states


def best_weights(setup: Setup, learnt: Learnt) -> BestWeights | None:
    """What keeps a run's best weights; None where nothing asks for them.

    Raises:
        ConfigError: a method whose clients have parts of the model for themselves.
    """
    section = asking(setup.config)
    if section is None:
        return None
    whole = setup.algorithm.layout.whole
    own = [name for name in whole if learnt.is_own(name)]
    if own:
        expected = f"final, as clients of {setup.config.algorithm_name} have parts for themselves: {', '.join(own)}"
        raise ConfigError(f"{section}.start", "best", expected)
    return BestWeights(lambda: {name: learnt.held[name].state_dict() for name in whole})


def asking(config: RunConfig) -> str | None:
    """The section of a configuration that asks for the best weights."""
    return next((key for key in ("personalize", "generate") if getattr(config, key).start == "best"), None)


def lacking(section: str | None) -> ConfigError:
    """What is said where the best weights are asked for and were not kept from the first round on.

    Args:
        section: of the configuration that asks.
    """
    expected = "final, as this run was begun without keeping its best weights; resume=never begins a new one"
    return ConfigError(f"{section}.start", "best", expected)


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _shapes(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    return {name: {key: (t.shape, t.dtype) for key, t in state.items()} for name, state in states.items()}
