"""Clients that make the trained model their own, one after another in one set of parts, and are tested on their own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

from torch import Tensor, nn

import cutlayer.algorithms as algorithms
from cutlayer.algorithms.mixins import OwnLoss
from cutlayer.models import body_and_head
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.parties.blueprint import Parts
from cutlayer.runtime.rounds.evaluator import Evaluator
from cutlayer.runtime.rounds.learnt import Learnt
from cutlayer.runtime.rounds.session import Workplace
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig, fine_tune
from cutlayer.runtime.scoring.scores import Measured


class Tuner:
    """Fine-tunes clients and tests them.

    Args:
        evaluator: tests; its ``learnt`` are the models that clients begin with.
        best: the states of the parts that all clients begin with instead.

    Attributes:
        config: how. tests: the test samples of each client.

    Raises:
        ConfigError: no client has test samples, or as ``tunable``.
    """

    def __init__(
        self,
        setup: Setup,
        evaluator: Evaluator,
        config: PersonalizeConfig,
        best: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._setup, self._evaluator, self.config, self._best = setup, evaluator, config, best
        self.tests = evaluator.own_tests()
        self._parts, self._body, self._head = tunable(setup, config)
        method = setup.algorithm
        beside = method.beside if config.loss == "method" and issubclass(method, OwnLoss) else ()
        self._beside = setup.blueprint.parts(beside)

    @property
    def learnt(self) -> Learnt:
        """The models that clients begin with, but for the parts that are held otherwise."""
        return self._evaluator.learnt

    @property
    def held(self) -> dict[str, Mapping[str, Tensor]]:
        """The states of the server's parts that clients begin with."""
        return {name: part.state_dict() for name, part in self.learnt.held.items()} | dict(self._best or {})

    def scores(self, client: int) -> list[Measured]:
        """The client's scores on its own test data after each number of epochs in the list."""
        setup, wanted = self._setup, self.config.tested_after
        start = self.learnt.client_states(client) if self._best is None else self._best
        for name, state in start.items():
            self._parts[name].load_state_dict(state)
        for name, part in self._beside.items():
            part.load_state_dict(setup.blueprint.initial[name])
        own = self.tests.indices(client)
        seed = rng.derive(setup.config.seed, client=client, stream="personalize")
        work = Workplace(setup.blueprint, seed, lambda: setup.memory(f"the fine-tuning of client {client}"))
        tuning, found = self._tuning(client), list[Measured]()
        for epochs in range(wanted[-1] + 1):
            with work.working():
                next(tuning)
            if epochs in wanted:
                score = self._evaluator.score(list(self._parts.values()), setup.dataset.test, own)
                found.append(Measured(len(score.labels), *score.both))
        return found

    def _tuning(self, client: int) -> Iterator[int]:
        setup, config = self._setup, self.config
        part = config.part
        assert part is not None
        heads = [self._head, *self._beside.values()]
        trained = {"body": [self._body], "head": heads, "full": [self._body, *heads]}[part]
        for module in (self._body, *heads):
            module.requires_grad_(module in trained)
        generator = rng.torch_generator(setup.config.seed, client=client, stream="personalize batches")
        return fine_tune(
            self._body,
            self._head,
            part,
            setup.blueprint.fine_tuner(trained, config.lr),
            lambda: setup.epoch(client, generator),
            keep_statistics=not any(self._evaluator.batch_statistics),
            criterion=setup.blueprint.loss,
            loss=self._loss() if config.loss == "method" else None,
        )

    def _loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The method's own loss of a batch."""
        method, beside, options = self._setup.algorithm, list(self._beside.values()), self._setup.config.algorithm
        assert issubclass(method, OwnLoss), "checked by `tunable`"
        loss = self._setup.blueprint.loss
        return lambda x, y: method.loss_of(self._body, self._head, beside, x, y, options, loss)


def tunable(setup: Setup, config: PersonalizeConfig) -> tuple[Parts, nn.Module, nn.Module]:
    """Fresh parts of a run's model, and its body and head made of them, see ``_halves``.

    Raises:
        ConfigError: there is no classifier, or it is not known which the head is and ``part`` needs it; or the method
            has no loss of its own, which is asked for.
    """
    part = config.part
    if config.loss == "method" and not issubclass(setup.algorithm, OwnLoss):
        with_one = [name for name in algorithms.names() if issubclass(algorithms.get(name), OwnLoss)]
        raise ConfigError("personalize.loss", "method", f"cross_entropy, or algorithm={'|'.join(with_one)}")
    if setup.algorithm.evaluates_features:
        expected = "null after a method that learns features and no classifier; probe.after=true measures these"
        raise ConfigError("personalize.part", part, expected)
    parts = setup.blueprint.parts(setup.algorithm.layout.whole)
    return parts, *_halves(parts, part, setup.dataset.info.shape)


def _halves(parts: Parts, part: str | None, shape: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    """The body and the head of the model that the parts make up; of parts that are no sequences all is body.

    Args:
        parts: by name, in the order in which data goes through them.
        shape: of an image, [C, H, W].

    Raises:
        ConfigError: it is not known which the head is, and ``part`` needs it.
    """
    if parts.keys() == {"body", "head"}:
        return parts["body"], parts["head"]
    modules = list(parts.values())
    if all(isinstance(module, nn.Sequential) for module in modules):
        children = chain.from_iterable(module.named_children() for module in modules)
        return body_and_head(nn.Sequential(OrderedDict(children)))
    if part != "full" and len(modules) == 1:
        return body_and_head(modules[0], shape)
    if part != "full":
        raise ConfigError("personalize.part", part, "full, as it is not known where this model's classifier begins")
    return nn.Sequential(*modules), nn.Identity()
