"""What is tested at a round's end: the global model or each client's own, on all test data or on a client's share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from datasets import Partition, Source, apply_partition
from runtime.evaluation import Evaluation, Score, evaluate, mean, spread_over_clients
from runtime.results import ClientRow

if TYPE_CHECKING:
    from runtime.federation import Federation

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
        algorithm = federation.algorithm
        travelling = config.aggregate.buffers != "average"
        self.batch_statistics = [travelling and name in algorithm.shared for name in algorithm.layout.whole]
        self._parts: list[nn.Module] = []

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
        elif self._federation.algorithm.evaluates == "clients":
            each: list[ClientRow] = []
            own: list[ClientRow] = []
            found = _mean(self._with_shares(self._of_clients(self._dataset.test), own), each, "client_acc")
            rows = (each if len(each) > 1 else []) + own
        else:
            rows = []
            score = self._of_all(self._dataset.test)
            everyone = ((client, score) for client in range(self._federation.population if self.local_test else 0))
            for _ in self._with_shares(everyone, rows):
                pass
            found = score.accuracy, score.loss
        return Evaluation(*found, self._validated() | spread_over_clients(rows), rows)

    def score_client(self, client: int, source: Source, samples: Tensor | None = None) -> Score:
        """Test the model that a client uses, see ``Federation.client_states``; of ``samples`` only (int64 [k])."""
        states = self._federation.client_states(client)
        self._parts = self._parts or list(self._federation.blueprint.parts(states).values())
        for part, state in zip(self._parts, states.values(), strict=True):
            part.load_state_dict(state)
        return self.score(self._parts, source, samples)

    def score(self, modules: Sequence[nn.Module], source: Source, samples: Tensor | None = None) -> Score:
        """Test the parts of a model, in order."""
        federation = self._federation
        return evaluate(
            modules,
            source,
            federation.blueprint,
            batch_size=federation.config.eval_batch_size,
            batch_statistics=self.batch_statistics,
            samples=samples,
        )

    def _of_all(self, source: Source) -> Score:
        names = self._federation.algorithm.layout.whole
        return self.score([self._federation.server.ctx.part(name) for name in names], source)

    def _of_clients(self, source: Source) -> Scores:
        """Each client's own model on all samples; those that no training has changed are alike and tested once."""
        store, personal = self._federation.stores["clients"], self._federation.algorithm.personal
        untrained: Score | None = None
        for client in range(self._federation.population):
            is_new = all(store.get(client, name) is None for name in personal)
            score = untrained if is_new and untrained is not None else self.score_client(client, source)
            untrained = score if is_new else untrained
            yield client, score

    def _on_shares(self, source: Source, shares: Partition) -> Scores:
        """Each client that has a share on its share."""
        whole = None
        if self._federation.algorithm.evaluates == "global" and not any(self.batch_statistics):
            whole = self._of_all(source)
        for client in shares.sizes.nonzero()[0].tolist():
            samples = shares.indices(client)
            yield client, self.score_client(client, source, samples) if whole is None else whole.of(samples)

    def _with_shares(self, scores: Scores, rows: list[ClientRow]) -> Scores:
        """The same scores of the whole test set; into ``rows`` go those on the clients' shares, if they have any."""
        for client, score in scores:
            if self.local_test is not None and self.local_test.sizes[client]:
                own = score.of(self.local_test.indices(client))
                rows.append(("local_acc", client, len(own.correct), own.accuracy))
            yield client, score

    def _validated(self) -> dict[str, float]:
        """The same as the test, on the validation set if there is one."""
        source = self._dataset.validation
        if source is None:
            return {}
        if self._own_only:
            accuracy, loss = _mean(self._on_shares(source, self.shares(source.labels)))
        elif self._federation.algorithm.evaluates == "clients":
            accuracy, loss = _mean(self._of_clients(source))
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
