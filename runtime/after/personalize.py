"""Personalisation of a trained federation: every client fine-tunes the model on its own data and is tested on its own.

It is an evaluation: nothing that training depends on changes, nothing is sent. A client starts from the model that it
would use (the global one, with its own parts where the method has such), and one client at a time is in memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from torch import Tensor, nn

import cutlayer.algorithms as algorithms
from cutlayer.algorithms.mixins import OwnLoss
from cutlayer.datasets import Partition
from cutlayer.evaluations import Score
from cutlayer.models import body_and_head
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import (
    PERSONALIZED,
    SUMMARY,
    make_folder,
    named,
    replace_file,
    sync_file,
    temporary_name,
)
from cutlayer.runtime.ground.folders import nothing_left
from cutlayer.runtime.ground.reading import read_json
from cutlayer.runtime.ground.text import csv_text
from cutlayer.runtime.ground.units import format_percent
from cutlayer.runtime.parties.blueprint import Parts
from cutlayer.runtime.records.console import Section
from cutlayer.runtime.rounds.best import lacking
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.session import Workplace
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig, fine_tune
from cutlayer.runtime.scoring.scores import spread

log = logging.getLogger(__name__)

CLIENTS = "clients.csv"
_COLUMNS = ("client", "samples", "epochs", "accuracy", "loss")
_BINS = 20

ClientsDone = Callable[[int, int], None]
"""Gets the number of clients that are done, and of all."""


@dataclass(frozen=True)
class Personalized:
    """What personalisation found, over clients.

    Lists are parallel to ``epochs``. Accuracies are fractions; ``std`` is that over clients, ``worst_decile`` the mean
    of the lowest tenth. ``counts`` says how many clients lie in each of 20 equal bins of accuracy. ``skipped`` clients
    have no test data of their own. ``start`` and ``objective`` say of which round's weights fine-tuning began, and by
    which loss.
    """

    part: str
    lr: float
    epochs: list[int]
    round: int
    clients: int
    skipped: int
    mean: list[float]
    std: list[float]
    worst_decile: list[float]
    loss: list[float]
    counts: list[list[int]]
    start: str = "final"
    objective: str = "cross_entropy"

    def to_json(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        values = {name: value for name, value in vars(self).items() if name != "counts"}
        edges = [round(edge, 10) for edge in np.linspace(0, 1, _BINS + 1).tolist()]
        return {**values, "histogram": {"edges": edges, "counts": self.counts}, "finished": True}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Personalized:
        """What ``to_json`` gave."""
        late = {"start": "final", "objective": "cross_entropy"}  # earlier versions had no others
        content = late | content
        values = {name: content[name] for name in cls.__dataclass_fields__ if name != "counts"}
        return cls(**values, counts=content["histogram"]["counts"])

    def section(self) -> Section:
        """For each number of epochs of fine-tuning the mean accuracy over clients, and how it spreads."""
        rows = [
            (
                "  before fine-tuning" if not epochs else f"  after {epochs} epoch{'s' * (epochs > 1)} of {self.part}",
                format_percent(mean),
                f"± {std:.2%} over {self.clients} clients, worst decile {worst:.2%}",
            )
            for epochs, mean, std, worst in zip(self.epochs, self.mean, self.std, self.worst_decile, strict=True)
        ]
        return Section("personalised", "accuracy on the clients' own test data", rows)


def personalized_folder(run: Path, config: PersonalizeConfig) -> Path:
    """Where a setting's results lie in a run's folder."""
    return run / PERSONALIZED / config.setting


def earlier_personalization(run: Path, config: PersonalizeConfig) -> Personalized | None:
    """What an earlier personalisation of the run by this setting found; None where there was none that finished."""
    try:
        content = read_json(run, str(personalized_folder(run, config).relative_to(run) / SUMMARY))
        return Personalized.from_json(content) if content["finished"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def personalize(
    federation: Federation, config: PersonalizeConfig, run: Path, shown: ClientsDone = lambda _done, _all: None
) -> Personalized:
    """Fine-tune and test every client; writes ``summary.json`` and ``clients.csv`` below the run's folder.

    Both appear when all clients are done, the summary last; a failure leaves nothing. The same federation gives the
    same bits again.

    Raises:
        ConfigError: a client's loss is not finite.
    """
    assert config.part is not None
    best = federation.best
    if config.start == "best" and (best is None or not best.round):
        raise lacking()
    tuner, folder = _Tuner(federation, config), personalized_folder(run, config)
    path = temporary_name(folder / CLIENTS)
    over = _Over(config)
    clients = tuner.shares.sizes.nonzero()[0].tolist()
    with nothing_left(folder), named(path), _made_whole(run, path) as file:
        file.write(csv_text([_COLUMNS]))
        for done, client in enumerate(clients):
            shown(done, len(clients))
            for epoch, score in zip(config.tested_after, tuner.scores(client), strict=True):
                over.add(client, epoch, score)
                file.write(csv_text([(client, len(score.correct), epoch, score.accuracy, score.loss)]))
    found = over.found(federation.round if tuner.best is None else tuner.best.round, federation.setup.population)
    sync_file(path)
    path.replace(folder / CLIENTS)
    replace_file(folder / SUMMARY, json.dumps(found.to_json(), allow_nan=False) + "\n")
    return found


class _Over:
    """Scores over clients, by the number of epochs."""

    def __init__(self, config: PersonalizeConfig) -> None:
        self._config = config
        self._accuracies: dict[int, list[float]] = {epoch: [] for epoch in config.tested_after}
        self._losses: dict[int, list[float]] = {epoch: [] for epoch in config.tested_after}

    def add(self, client: int, epoch: int, score: Score) -> None:
        """Take in a client's score after so many epochs."""
        if not math.isfinite(score.loss):
            found = f"a rate that converges: client {client}'s loss is {score.loss} after {epoch} epochs"
            raise ConfigError("personalize.lr", self._config.lr, found)
        self._accuracies[epoch].append(score.accuracy)
        self._losses[epoch].append(score.loss)

    def found(self, round: int, population: int) -> Personalized:
        """What comes of them."""
        accuracies, losses = [*self._accuracies.values()], [*self._losses.values()]
        over = [spread(values) for values in accuracies]
        clients, config = len(accuracies[0]), self._config
        return Personalized(
            part=str(config.part),
            lr=config.lr,
            start=config.start,
            objective=config.loss,
            epochs=[*self._accuracies],
            round=round,
            clients=clients,
            skipped=population - clients,
            mean=[values["mean"] for values in over],
            std=[values["std"] for values in over],
            worst_decile=[values["worst_decile"] for values in over],
            loss=[sum(values) / len(values) for values in losses],
            counts=[np.histogram(values, bins=_BINS, range=(0.0, 1.0))[0].tolist() for values in accuracies],
        )


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


@contextlib.contextmanager
def _made_whole(run: Path, path: Path) -> Generator[TextIO]:
    """A file to write to, in a folder below the run's; it goes again if it is not completed."""
    make_folder(run, path.parent)
    path.unlink(missing_ok=True)
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def own_tests(federation: Federation) -> Partition:
    """The test samples of each client.

    Raises:
        ConfigError: no client has any.
    """
    evaluator = federation.evaluator
    return evaluator.local_test or evaluator.shares(federation.setup.dataset.test)


class _Tuner:
    """One client after another in one set of parts."""

    def __init__(self, federation: Federation, config: PersonalizeConfig) -> None:
        self._federation, self._config = federation, config
        self.shares = own_tests(federation)
        self._parts, self._body, self._head = tunable(federation.setup, config)
        self.best = federation.best if config.start == "best" else None
        method = federation.setup.algorithm
        beside = method.beside if config.loss == "method" and issubclass(method, OwnLoss) else ()
        self._beside = federation.setup.blueprint.parts(beside)

    def scores(self, client: int) -> Iterator[Score]:
        """The client's scores on its own test data after each number of epochs in the list."""
        federation, wanted = self._federation, self._config.tested_after
        learnt = federation.learnt.client_states(client) if self.best is None else self.best.states
        for name, state in learnt.items():
            self._parts[name].load_state_dict(state)
        for name, part in self._beside.items():
            part.load_state_dict(federation.setup.blueprint.initial[name])
        own = self.shares.indices(client)
        setup = federation.setup
        work = Workplace(setup.blueprint, rng.derive(setup.config.seed, client=client, stream="personalize"))
        tuning = self._tuning(client)
        for epochs in range(wanted[-1] + 1):
            with work.working():
                next(tuning)
            if epochs in wanted:
                yield federation.evaluator.score(list(self._parts.values()), setup.dataset.test, own)

    def _tuning(self, client: int) -> Iterator[int]:
        setup, config = self._federation.setup, self._config
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
            keep_statistics=not any(self._federation.evaluator.batch_statistics),
            loss=self._loss() if config.loss == "method" else None,
        )

    def _loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The method's own loss of a batch."""
        setup = self._federation.setup
        method, beside = setup.algorithm, list(self._beside.values())
        assert issubclass(method, OwnLoss), "checked by `tunable`"
        return lambda x, y: method.loss_of(self._body, self._head, beside, x, y, setup.config.algorithm)
