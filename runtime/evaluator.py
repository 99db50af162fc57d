"""What is tested at a round's end: the global model or each client's own, on all test data or on a client's share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from datasets import Partition, Source, apply_partition
from runtime.blueprint import Blueprint
from runtime.evaluation import Evaluation, Score, evaluate, mean, spread_over_clients
from runtime.features import KnnMonitor
from runtime.results import ClientRow

if TYPE_CHECKING:
    from runtime.federation import Federation

Path = tuple[str, ...]
"""Parts of a model, in the order in which data goes through them."""
Scores = Iterator[tuple[int, Score]]
"""Clients and their scores, one at a time: a score lists every sample."""


class Evaluator:
    """Tests a federation.

    Attributes:
        local_test: each client's share of the test set; None unless ``dataset.local_test`` asks for it.
        batch_statistics: per part of the model, whether normalisation uses the test batch's own statistics.
    """

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._dataset, config = federation.dataset, federation.config
        self._own_only = config.dataset.local_test == "only"
        self.local_test = self.shares(self._dataset.test.labels) if config.dataset.local_test else None
        self._whole = federation.algorithm.layout.whole
        self.batch_statistics = self._batch_statistics(self._whole)
        self._test = self._monitor().score if federation.algorithm.evaluates_features else evaluate
        self._parts: dict[tuple[Path, Blueprint], list[nn.Module]] = {}

    def _monitor(self) -> KnnMonitor:
        config = self._federation.config
        return KnnMonitor(config.monitor, self._dataset.train, classes=self._dataset.info.classes, seed=config.seed)

    def _batch_statistics(self, path: Path) -> list[bool]:
        travelling = self._federation.config.aggregate.buffers != "average"
        return [travelling and name in self._federation.algorithm.shared for name in path]

    def shares(self, labels: Tensor) -> Partition:
        """Test samples (their labels: int64 [m]) divided among the clients in the proportions of their own classes."""
        federation = self._federation
        trained = self._dataset.train.labels.numpy()
        return apply_partition(federation.partition, trained, labels.numpy(), seed=federation.config.seed)

    def evaluate(self) -> Evaluation:
        """The test of a round."""
        if self._own_only:
            assert self.local_test is not None
            rows: list[ClientRow] = []
            found = _mean(self._on_shares(self._dataset.test, self.local_test), rows, "local_acc")
        elif self._federation.personal:
            each: list[ClientRow] = []
            own: list[ClientRow] = []
            found = _mean(self._with_shares(self._of_clients(self._dataset.test, self._whole), own), each, "client_acc")
            rows = (each if len(each) > 1 else []) + own
        else:
            rows = []
            score = self._of_all(self._dataset.test)
            everyone = ((client, score) for client in range(self._federation.population if self.local_test else 0))
            for _ in self._with_shares(everyone, rows):
                pass
            found = score.accuracy, score.loss
        rows += self._of_paths()
        return Evaluation(*found, self._validated() | spread_over_clients(rows), rows)

    def score_client(
        self, client: int, source: Source, samples: Tensor | None = None, path: Path | None = None
    ) -> Score:
        """Test the model that a client uses, or another path, see ``Federation.client_states``.

        Args:
            samples: int64 [k], those of the source that are tested; None for all.
        """
        path, federation = path or self._whole, self._federation
        blueprint = federation.blueprint.for_client(client) if "personal" in path else federation.blueprint
        if (path, blueprint) not in self._parts:
            self._parts[path, blueprint] = list(blueprint.parts(path).values())
        modules = self._parts[path, blueprint]
        for part, state in zip(modules, federation.client_states(client, path).values(), strict=True):
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
        federation = self._federation
        return self._test(
            modules,
            source,
            federation.blueprint,
            batch_size=federation.config.eval_batch_size,
            batch_statistics=self._batch_statistics(path or self._whole),
            samples=samples,
        )

    def _of_all(self, source: Source) -> Score:
        return self.score([self._federation.server.ctx.part(name) for name in self._whole], source)

    def _of_clients(self, source: Source, path: Path) -> Scores:
        """Each client's own model on all samples; those that no training has changed are alike and tested once."""
        federation = self._federation
        own = [name for name in path if federation.is_own(name)]
        untrained: dict[Blueprint, Score] = {}
        for client in range(federation.population):
            if any(federation.stores["clients"].get(client, name) is not None for name in own):
                yield client, self.score_client(client, source, path=path)
                continue
            variant = federation.blueprint.for_client(client)
            if variant not in untrained:
                untrained[variant] = self.score_client(client, source, path=path)
            yield client, untrained[variant]

    def _on_shares(self, source: Source, shares: Partition, path: Path | None = None) -> Scores:
        """Each client that has a share on its share."""
        whole = None
        if path is None and not self._federation.personal and not any(self.batch_statistics):
            whole = self._of_all(source)
        for client in shares.sizes.nonzero()[0].tolist():
            samples = shares.indices(client)
            yield client, self.score_client(client, source, samples, path) if whole is None else whole.of(samples)

    def _of_paths(self) -> list[ClientRow]:
        """Each client's accuracy on the further paths of the method, as ``Algorithm.paths`` names them."""
        source, rows = self._dataset.test, list[ClientRow]()
        for name, path in self._federation.algorithm.paths.items():
            own: list[ClientRow] = []
            if self._own_only:
                assert self.local_test is not None
                _mean(self._on_shares(source, self.local_test, path), own, f"{name}_local_acc")
            else:
                each = self._with_shares(self._of_clients(source, path), own, f"{name}_local_acc")
                _mean(each, rows, f"{name}_acc")
            rows += own
        return rows

    def _with_shares(self, scores: Scores, rows: list[ClientRow], metric: str = "local_acc") -> Scores:
        """The same scores of the whole test set; into ``rows`` go those on the clients' shares, if they have any."""
        for client, score in scores:
            if self.local_test is not None and self.local_test.sizes[client]:
                own = score.of(self.local_test.indices(client))
                rows.append((metric, client, len(own.correct), own.accuracy))
            yield client, score

    def _validated(self) -> dict[str, float]:
        """The same as the test, on the validation set if there is one."""
        source = self._dataset.validation
        if source is None:
            return {}
        if self._own_only:
            accuracy, loss = _mean(self._on_shares(source, self.shares(source.labels)))
        elif self._federation.personal:
            accuracy, loss = _mean(self._of_clients(source, self._whole))
        else:
            score = self._of_all(source)
            accuracy, loss = score.accuracy, score.loss
        return {"val_acc": accuracy, "val_loss": loss}


def _mean(scores: Scores, rows: list[ClientRow] | None = None, metric: str = "") -> tuple[float, float]:
    """Mean accuracy and loss over clients; into ``rows`` goes each client's accuracy under ``metric``."""
    accuracies: list[float] = []
    losses: list[float] = []
    for client, score in scores:
        accuracies.append(score.accuracy)
        losses.append(score.loss)
        if rows is not None:
            rows.append((metric, client, len(score.correct), accuracies[-1]))
    return mean(accuracies), mean(losses)
