"""What is tested at a round's end: the global model or each client's own, on all test data or on a client's share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from itertools import chain

from torch import Tensor, nn

from cutlayer.datasets import Partition, Source, apply_partition, own_partition, partition_by_group
from cutlayer.evaluations import Score, measure
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import Payload, unflatten
from cutlayer.runtime.parties.blueprint import Blueprint, Parts
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.records.history import ClientRow
from cutlayer.runtime.rounds.learnt import Learnt
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.scoring.features import KnnMonitor
from cutlayer.runtime.scoring.scores import (
    ClientScores,
    Evaluation,
    Measured,
    evaluate,
    mean,
    mean_values,
    spread_over_clients,
)

Path = tuple[str, ...]
"""Parts of a model, in the order in which data goes through them."""
VALIDATION = "validation"


class Evaluator:
    """Tests a federation, or at a client's machine what one client has.

    Attributes:
        learnt: the models that are tested.
        local_test: each client's share of the test set; None unless ``dataset.local_test`` asks for it.
        batch_statistics: per part of the model, whether normalisation uses the test batch's own statistics.
    """

    def __init__(self, setup: Setup, learnt: Learnt) -> None:
        self._setup, self.learnt = setup, learnt
        self._dataset, config = setup.dataset, setup.config
        self._own_only = config.dataset.local_test == "only"
        self.local_test = self.shares(self._dataset.test) if config.dataset.local_test else None
        validation = self._dataset.validation if self._own_only else None
        asked = "dataset.validation with dataset.local_test=only"
        self._local_validation = None if validation is None else self.shares(validation, asked)
        self.batch_statistics = self._batch_statistics(setup.algorithm.layout.whole)
        self._whole = self._tested()
        self._test = self._monitor().score if setup.algorithm.evaluates_features else evaluate
        self._parts: dict[tuple[Path, Blueprint], list[nn.Module]] = {}
        self._seen: dict[Hashable, Score] = {}  # of this round's test

    def _tested(self) -> Path:
        """The parts whose output is tested: those of the model, and the projector where its output is asked for."""
        setup = self._setup
        whole, features = setup.algorithm.layout.whole, setup.config.monitor.features
        if not setup.algorithm.evaluates_features or features == "backbone":
            return whole
        if features not in setup.algorithm.layout.server:
            raise ConfigError("monitor.features", features, "backbone, as the server of this method has no projector")
        return (*whole, features)

    def _monitor(self) -> KnnMonitor:
        config = self._setup.config
        return KnnMonitor(config.monitor, self._dataset.train, classes=self._dataset.info.classes, seed=config.seed)

    def _batch_statistics(self, path: Path) -> list[bool]:
        travelling = self._setup.config.aggregate.buffers != "average"
        return [travelling and name in self._setup.algorithm.shared for name in path]

    def shares(self, source: Source, asked: str = "tests of clients") -> Partition:
        """The samples of a source that each client is tested on.

        Where clients are groups of the data, those of its own groups; else as many of each class as is proportional to
        what the client has in training.

        Args:
            asked: what they are for, for the message.

        Raises:
            ConfigError: clients are groups, and the source has samples of none of theirs.
        """
        setup, config, train = self._setup, self._setup.config, self._dataset.train
        if not config.dataset.divided:
            return own_partition(len(source), setup.population, config.client_id)
        if not config.dataset.by_group or setup.algorithm.pooled or train.groups is None or source.groups is None:
            return apply_partition(setup.partition, train.labels, source.labels, seed=config.seed)
        shares = partition_by_group(setup.partition, train.groups, source.groups)
        if not len(shares.order):
            reason = f"another for {asked}, as whole groups are held out of training and no client has any of them"
            reason += " (test_by in docs/datasets.md)"
            raise ConfigError("dataset.distribution", config.dataset.distribution, reason)
        return shares

    def own_tests(self) -> Partition:
        """The test samples of each client.

        Raises:
            ConfigError: no client has any.
        """
        return self.local_test or self.shares(self._dataset.test)

    def evaluate(self, scores: Callable[[], dict[int, ClientScores]]) -> Evaluation:
        """The test of a round.

        Args:
            scores: gives what ``of_client`` finds, of every client.
        """
        self.forget()
        setup, rows, metrics = self._setup, list[ClientRow](), dict[str, float]()
        values = dict[str, float]()
        clients: dict[int, ClientScores] = {}
        if self._own_only or self.local_test is not None or setup.personal or setup.algorithm.paths:
            clients = scores()
        own = "local_acc" if self._own_only else "client_acc" if setup.personal else None
        for metric in dict.fromkeys(chain.from_iterable(clients.values())):
            found = {client: scores[metric] for client, scores in clients.items() if metric in scores}
            if metric not in (VALIDATION, own) or (metric == own and (self._own_only or len(found) > 1)):
                rows += [(metric, client, each.samples, each.accuracy) for client, each in found.items()]
            # Of each client's own model they are the run's; the others have the name of what they are of before theirs.
            prefix = "" if metric == own else f"{metric}/"
            values |= {prefix + name: value for name, value in mean_values(list(found.values())).items()}
        if own is not None:
            accuracy, loss = _mean(clients, own)
        else:
            tested = self._measured(self._of_all(self._dataset.test))
            accuracy, loss, values = tested.accuracy, tested.loss, values | tested.values
        if self._dataset.validation is not None:
            validated = self._of_all(self._dataset.validation).both if own is None else _mean(clients, VALIDATION)
            metrics = dict(zip(("val_acc", "val_loss"), validated, strict=True))
        return Evaluation(accuracy, loss, metrics | values | spread_over_clients(rows), rows)

    def forget(self) -> None:
        """Forget what was found of models that have changed since."""
        self._seen.clear()

    def of_client(self, client: int) -> ClientScores:
        """What a round's test asks of one client, by metric; on its share of the data only if it has one."""
        setup, test, found = self._setup, self._dataset.test, ClientScores()
        share = None if self.local_test is None else self.local_test.indices(client)
        share = share if share is not None and len(share) else None
        paths = {f"{name}_": path for name, path in setup.algorithm.paths.items()}
        if setup.personal or self.local_test is not None:
            paths = {"": self._whole} | paths
        for name, path in paths.items():
            if not self._own_only:
                score = self._of_client(client, test, path)
                if name or setup.personal:
                    found[f"{name}acc" if name else "client_acc"] = self._measured(score)
                if share is not None:
                    found[f"{name}local_acc"] = self._measured(score.of(share))
            elif share is not None:
                found[f"{name}local_acc"] = self._measured(self._of_client(client, test, path, share))
        validation = self._dataset.validation
        if validation is not None and self._local_validation is not None:
            share = self._local_validation.indices(client)
            if len(share):
                found[VALIDATION] = _plainly(self._of_client(client, validation, self._whole, share))
        elif validation is not None and setup.personal:
            found[VALIDATION] = _plainly(self._of_client(client, validation, self._whole))
        return found

    def _measured(self, score: Score) -> Measured:
        """What is reported of a score, with what the evaluations that are asked for find of it."""
        values = measure(self._setup.config.evaluations, score, self._dataset.info)
        return Measured(len(score.labels), *score.both, values)

    def score_client(
        self, client: int, source: Source, samples: Tensor | None = None, path: Path | None = None
    ) -> Score:
        """Test the model that a client uses, or another path, see ``Learnt.client_states``.

        Args:
            samples: int64 [k], those of the source that are tested; None for all.
        """
        path, blueprint = path or self._whole, self._setup.blueprint
        if any(self.learnt.is_own(name) for name in blueprint.varied.intersection(path)):
            blueprint = blueprint.for_client(client)
        if (path, blueprint) not in self._parts:
            self._parts[path, blueprint] = list(blueprint.parts(path).values())
        modules = self._parts[path, blueprint]
        for part, state in zip(modules, self.learnt.client_states(client, path).values(), strict=True):
            part.load_state_dict(state)
        return self.score(modules, source, samples, path)

    def score(
        self,
        modules: Sequence[nn.Module],
        source: Source,
        samples: Tensor | None = None,
        path: Path | None = None,
    ) -> Score:
        """Test the parts of a model, in order: those of the path, by default the whole one; features by their kNN."""
        setup = self._setup
        return self._test(
            modules,
            source,
            setup.blueprint,
            batch_size=setup.config.eval_batch_size,
            batch_statistics=self._batch_statistics(path or self._whole),
            samples=samples,
        )

    def _of_all(self, source: Source) -> Score:
        return self._once(("all", id(source)), lambda: self.score([self.learnt.held[n] for n in self._whole], source))

    def _of_client(self, client: int, source: Source, path: Path, samples: Tensor | None = None) -> Score:
        """A client's own model on a source; models that are alike, untrained or without own parts, are tested once."""
        setup = self._setup
        own = [name for name in path if self.learnt.is_own(name)]
        alone = samples is not None and any(self._batch_statistics(path))  # a share has statistics of its own
        if alone or any(self.learnt.own(client, name) is not None for name in own):
            return self.score_client(client, source, samples, path)
        if path == self._whole and not own:
            score = self._of_all(source)
        else:
            key = (path, setup.blueprint.for_client(client), id(source))
            score = self._once(key, lambda: self.score_client(client, source, path=path))
        return score if samples is None else score.of(samples)

    def _once(self, key: Hashable, test: Callable[[], Score]) -> Score:
        if key not in self._seen:
            self._seen[key] = test()
        return self._seen[key]


class ApartTests:
    """Tests of clients' own models in a process that the server's parts have to be brought to.

    Args:
        rows: what clients keep.
    """

    def __init__(self, setup: Setup, rows: Store) -> None:
        self._setup, self._rows = setup, rows

    @cached_property
    def _held(self) -> Parts:
        """The server's parts, as they came last."""
        return self._setup.blueprint.parts(self._setup.algorithm.layout.server)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Tests the models that clients have with the parts that were brought."""
        return Evaluator(self._setup, Learnt(self._setup, lambda: self._held, self._rows))

    def hold(self, parts: Payload) -> None:
        """Take the server's parts, which come in their whole state."""
        for name, state in unflatten(parts).items():
            if name in self._held:
                self._held[name].load_state_dict(state)
        self.evaluator.forget()

    def of_client(self, client: int) -> ClientScores:
        """Test a client's own model, with the parts that were brought for the others."""
        return self.evaluator.of_client(client)


def _plainly(score: Score) -> Measured:
    """A score without evaluations."""
    return Measured(len(score.labels), *score.both)


def _mean(clients: Mapping[int, ClientScores], metric: str) -> tuple[float, float]:
    """Mean accuracy and loss over the clients that have the metric."""
    found = [scores[metric] for scores in clients.values() if metric in scores]
    return mean([each.accuracy for each in found]), mean([each.loss for each in found])
