"""Personalisation of a trained federation: every client fine-tunes the model on its own data and is tested on its own.

It is an evaluation: nothing that training depends on changes, nothing is sent. A client starts from the model that it
would use (the global one, with its own parts where the method has such), and one client at a time is in memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

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
from cutlayer.runtime.records.console import Section
from cutlayer.runtime.rounds.best import lacking
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.tuner import Tuner
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from cutlayer.runtime.scoring.scores import Measured, spread

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
    if config.start == "best" and (federation.best is None or not federation.best.round):
        raise lacking("personalize")
    best = federation.best if config.start == "best" else None
    tuner = Tuner(federation.setup, federation.evaluator, config, None if best is None else best.states)
    folder, over = personalized_folder(run, config), _Over(config)
    path = temporary_name(folder / CLIENTS)
    clients = tuner.tests.sizes.nonzero()[0].tolist()
    with nothing_left(folder), named(path), _made_whole(run, path) as file:
        file.write(csv_text([_COLUMNS]))
        shown(0, len(clients))
        for done, (client, scores) in enumerate(zip(clients, federation.clients.tuned(tuner, clients), strict=True), 1):
            for epoch, score in zip(config.tested_after, scores, strict=True):
                over.add(client, epoch, score)
                file.write(csv_text([(client, score.samples, epoch, score.accuracy, score.loss)]))
            shown(done, len(clients))
    found = over.found(federation.round if best is None else best.round, federation.setup.population)
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

    def add(self, client: int, epoch: int, score: Measured) -> None:
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
