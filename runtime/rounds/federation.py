"""A federation: data, parties and stores put together, one round at a time."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cutlayer.datasets import Dataset
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.files import DamagedError
from cutlayer.runtime.messages.ledger import Ledger, Traffic
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.records.data_record import check_data
from cutlayer.runtime.records.history import RoundRecord
from cutlayer.runtime.rounds.best import asking, best_weights, lacking
from cutlayer.runtime.rounds.checkpoint import ANEW, Checkpoint, FoundCheckpoint, Manifest
from cutlayer.runtime.rounds.clients import MakeClients
from cutlayer.runtime.rounds.evaluator import Evaluator
from cutlayer.runtime.rounds.learnt import Learnt
from cutlayer.runtime.rounds.local_clients import LocalClients
from cutlayer.runtime.rounds.schedule import RoundLostError, RoundReport
from cutlayer.runtime.rounds.servers import make_server
from cutlayer.runtime.rounds.session import ServerParty, Workplace
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.scoring.scores import Evaluation
from cutlayer.runtime.settings import RunConfig

log = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "checkpoint"
_BEST = "best weights"  # beside the server's own state in a checkpoint


class Federation:
    """A run that moves on by one round at a time.

    Args:
        config: the whole configuration.
        folder: where checkpoints and evicted client state go; None keeps everything in memory.
        dataset: the configured one, where it is loaded already.
        clients: makes its clients.

    Attributes:
        round: the number of rounds that are over.
        seconds: that were spent so far, in all and by party.
        best: the weights with the best test so far; None where nothing asks for them (``start``).

    Raises:
        ConfigError: what cannot be built as configured.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path | None = None,
        *,
        dataset: Dataset | None = None,
        clients: MakeClients = LocalClients,
    ) -> None:
        self.setup = setup = Setup(config, dataset)
        self.round = 0
        self.seconds = {"wall": 0.0, "client": 0.0, "server": 0.0, "eval": 0.0}
        self._folder = folder or Path()
        rows = None if folder is None else folder / CHECKPOINT_FOLDER
        self._checkpoint = None if rows is None else Checkpoint(rows)
        limit = config.state_memory_mb * 1e6
        self.stores = {
            name: Store(rows, name, device=setup.device, memory_limit=limit) for name in ("clients", "server")
        }
        self.ledger = Ledger()
        self.server = make_server(setup, self.stores["server"])
        self.clients = clients(setup, self.stores["clients"])
        self.learnt = Learnt(setup, lambda: self.server.ctx.parts, self.stores["clients"])
        self.evaluator = Evaluator(setup, self.learnt)
        self.best = best_weights(setup, self.learnt)

    # ------------------------------------------------------------------ rounds

    @property
    def done(self) -> bool:
        """Whether the last round is over, or the communication budget is spent."""
        limit = self.setup.config.comm_threshold_mb
        # Divided, as the number that was written is the nearest one to its quotient, but a product may be a byte off.
        spent = limit is not None and self.ledger.training().payload / 1e6 >= limit
        return self.round >= self.setup.config.rounds or spent

    def step(self) -> tuple[RoundRecord, list[Traffic]]:
        """Run one round: train, commit, evaluate if it is time to."""
        start, cohort, before = time.perf_counter(), self.cohort(self.round), self._to_repeat()
        while True:
            self.clients.gather(cohort, self.round)
            cohort = [client for client in cohort if self.clients.can_train(client)]
            server = self._server_party()
            try:
                server.open_round(self.round, cohort)
                report = self.clients.train(cohort, self.round, self._discard, server, self.ledger)
                server.close_round()
                break
            except RoundLostError as lost:
                assert before is not None
                log.warning("round %d is repeated from its start: %s", self.round + 1, lost)
                self._forget_round(before)
        self.seconds["server"] += server.seconds
        self.seconds["client"] += report.seconds
        self.round += 1
        for store in self.stores.values():
            store.commit()
        self.clients.on_counted(report)
        metrics = {**report.metrics, **self.server.ctx.means.read()}  # what a device still computes is waited for here
        found = self._test_if_due()
        self.seconds["wall"] += time.perf_counter() - start
        lines = self.ledger.close_round(self.round)
        record = self._recorded(report, metrics, found)
        if self.best is not None:
            self.best.see(record)
        self.clients.on_recorded(record)
        return record, lines

    def cohort(self, round: int) -> list[int]:
        """The clients of a round (from 0), in the order in which they are served; see ``Setup.cohort``."""
        return [client for client in self.setup.cohort(round) if self.clients.can_train(client)]

    def _server_party(self) -> ServerParty:
        seed = rng.derive(self.setup.config.seed, round=self.round, stream="server")
        return ServerParty(self.server, Workplace(self.setup.blueprint, seed))

    def _to_repeat(self) -> tuple[Any, Any] | None:
        """Copies of the server's state and the ledger's, where the round that comes may have to be repeated."""
        state = (self.server.state_dict(), self.ledger.state_dict()) if self.clients.may_repeat else None
        return copy.deepcopy(state)

    def _forget_round(self, before: tuple[Any, Any]) -> None:
        """Be as before the round that was lost."""
        for store in self.stores.values():
            store.discard_all()
        self.server = make_server(self.setup, self.stores["server"])
        # A copy: an optimizer keeps the very tensors that it is given, and the round may be lost again.
        self._restore_server(*copy.deepcopy(before))

    def _test_if_due(self) -> Evaluation | None:
        if not self.done and self.round % self.setup.config.eval_interval:
            return None
        begin = time.perf_counter()
        found = self.evaluate()
        self.seconds["eval"] += time.perf_counter() - begin
        return found

    def _recorded(self, report: RoundReport, metrics: dict[str, float], found: Evaluation | None) -> RoundRecord:
        loss = metrics.pop("loss", None)
        if report.dropped:
            metrics["dropped"] = float(len(report.dropped))
        return RoundRecord(
            round=self.round,
            test_acc=None if found is None else found.accuracy,
            test_loss=None if found is None else found.loss,
            train_loss=loss,
            comm_load=self.ledger.training().payload,
            comm_up=self.ledger.training("up").payload,
            comm_down=self.ledger.training("down").payload,
            comm_framed=self.ledger.training().framed,
            time_wall=self.seconds["wall"],
            time_client=self.seconds["client"],
            time_server=self.seconds["server"],
            time_eval=self.seconds["eval"],
            clients=len(report.survivors),
            round_trips=self.ledger.round_trips,
            in_turn=self.setup.algorithm.in_turn,
            metrics=metrics if found is None else metrics | found.metrics,
            client_rows=[] if found is None else found.clients,
        )

    def _discard(self, client: int) -> None:
        for store in self.stores.values():
            store.discard(client)

    # ------------------------------------------------------------------ what was learnt

    def evaluate(self) -> Evaluation:
        """Test what the algorithm says is to be tested."""
        return self.evaluator.evaluate(lambda: self.clients.scores(self.evaluator))

    @property
    def one_model(self) -> bool:
        """Whether there is one whole model, and not one for each client."""
        setup = self.setup
        elsewhere = not self.clients.here and any(self.learnt.is_own(name) for name in setup.algorithm.layout.whole)
        return not elsewhere and not (setup.personal and setup.population > 1)

    def full_model(self) -> dict[str, Tensor] | None:
        """The state of one whole model under the model's own names; None where each client has its own."""
        if not self.one_model:
            return None
        states = self.learnt.client_states(0).values()
        return {name: tensor.detach().cpu().contiguous().clone() for state in states for name, tensor in state.items()}

    # ------------------------------------------------------------------ checkpoints

    def checkpoint(self, results: dict[str, Any]) -> None:
        """Write a checkpoint that holds ``results`` too; the one before it stays, in case that this one is damaged."""
        assert self._checkpoint is not None, "a federation without a folder has no checkpoints"
        generation = self.stores["clients"].version
        manifest = Manifest(
            identity=self.setup.config.identity(),
            round=self.round,
            generation=generation,
            rows={name: tuple(store.checkpoint()) for name, store in self.stores.items()},
            ledger=self.ledger.state_dict(),
            results=results,
            seconds=self.seconds,
            clients=self.clients.state_dict(),
            revision=self.setup.revision,
        )
        best = {} if self.best is None else {_BEST: self.best.state_dict()}
        self._checkpoint.write(manifest, self.server.state_dict() | best)
        self.clients.on_checkpoint()

    def resume(
        self, restore: Callable[[Mapping[str, Any]], None] | None = None, *, recorded: Collection[str] = ()
    ) -> dict[str, Any] | None:
        """Restore the folder's checkpoint; returns its results, or None where there is no checkpoint.

        Args:
            restore: restores the results; raises DamagedError where the run's files are not as they were then. Given by
                a run that is resumed: where its last checkpoint is damaged, it resumes from the one before.
            recorded: identities that the run was recorded with, beside that of this federation's configuration.

        Raises:
            ConfigError: the checkpoint belongs to another configuration, to other data or to an earlier way of
                computing, or is damaged.
        """
        results: dict[str, Any] | None = None
        found = self._checkpoint is not None and self._checkpoint.exists()
        if self._checkpoint is not None and (
            found or restore is None
        ):  # else the run begins, with the data that there are
            check_data(self._folder, lambda: self.setup.dataset.facts, self.setup.config.data_changed)
        if self._checkpoint is None or not found:
            for store in self.stores.values():
                store.clear()
            return None

        def restore_found(found: FoundCheckpoint, server_state: Any) -> None:
            nonlocal results
            if restore is not None and found.manifest.revision != self.setup.revision:
                reason = f"{self._folder} was begun when {self.setup.algorithm.name} was computed in another way"
                raise ConfigError("resume", NO_VALUE, f"{reason}; continue with that version, or {ANEW}")
            try:
                self._restore(found, server_state)
                if restore is not None:
                    restore(found.manifest.results)
            except (LookupError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
                raise DamagedError.unreadable(self._folder / CHECKPOINT_FOLDER, error) from error
            results = found.manifest.results

        self._checkpoint.read({self.setup.config.identity(), *recorded}, restore_found, fall_back=restore is not None)
        return results

    def _restore(self, found: FoundCheckpoint, server_state: Any) -> None:
        manifest = found.manifest
        for name, store in self.stores.items():
            if found.first is None:
                store.restore(manifest.rows[name], manifest.generation + 1)
            else:
                store.load_places(found.first[name], manifest.generation + 1)
        # As new: a damaged checkpoint may have been restored in part.
        self.server = make_server(self.setup, self.stores["server"])
        self.round = manifest.round
        best = server_state.pop(_BEST, None)
        self._restore_server(server_state, manifest.ledger)
        if self.best is not None:
            if best is None:
                raise lacking(asking(self.setup.config))
            self.best.load_state_dict(best)
        self.clients.load_state_dict(manifest.clients)
        self.seconds = dict(manifest.seconds)

    def _restore_server(self, server: Any, ledger: Mapping[str, Any]) -> None:
        """The server and the ledger as they were before the round that comes."""
        self.server.ctx.open_round(max(0, self.round - 1))
        self.server.load_state_dict(server)
        self.ledger.load_state_dict(ledger)
