"""A federation: data, parties and stores put together, one round at a time."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutlayer.datasets import Dataset
from cutlayer.runtime.evaluation.evaluator import Evaluator
from cutlayer.runtime.evaluation.scores import Evaluation
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import DamagedError
from cutlayer.runtime.messages.ledger import Ledger, Traffic
from cutlayer.runtime.parties.blueprint import Parts
from cutlayer.runtime.parties.contexts import ServerContext
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.records.data_record import check_data
from cutlayer.runtime.records.history import RoundRecord
from cutlayer.runtime.rounds.checkpoint import Checkpoint, Found, Manifest
from cutlayer.runtime.rounds.local_clients import Clients
from cutlayer.runtime.rounds.schedule import RoundLostError, RoundReport
from cutlayer.runtime.rounds.session import ServerParty, Workplace
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.trust import Limit

log = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "checkpoint"


class Federation(Setup):
    """A run that moves on by one round at a time.

    Args:
        config: the whole configuration.
        folder: where checkpoints and evicted client state go; None keeps everything in memory.
        dataset: the configured one, where it is loaded already.
        limit: how large the model may be; None for any size.

    Raises:
        ConfigError: what cannot be built as configured.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path | None = None,
        dataset: Dataset | None = None,
        limit: Limit | None = None,
    ) -> None:
        super().__init__(config, dataset, limit)
        self._folder = folder or Path()
        self._checkpoint = None if folder is None else Checkpoint(folder / CHECKPOINT_FOLDER)
        self.stores = {
            name: Store(
                None if folder is None else folder / CHECKPOINT_FOLDER,
                name,
                device=self.device,
                memory_limit=self.config.state_memory_mb * 1e6,
            )
            for name in ("clients", "server")
        }
        self.ledger = Ledger()
        self.server = self._build_server()
        self.clients = Clients(self)
        self.evaluator = Evaluator(self, lambda: self.clients.scores())

    def can_train(self, client: int) -> bool:
        return self.clients.can_train(client)

    @property
    def held(self) -> Parts:
        return self.server.ctx.parts

    def _build_server(self) -> Any:
        layout = self.algorithm.layout
        context = ServerContext(
            blueprint=self.blueprint,
            parts=self.blueprint.parts(layout.server),
            config=self.config.algorithm,
            shared=self.algorithm.shared,
            num_clients=self.population,
            aggregate=self.config.aggregate,
            seed=self.config.seed,
            store=self.stores["server"],
        )
        return self.algorithm.Server(context)

    # ------------------------------------------------------------------ rounds

    @property
    def done(self) -> bool:
        """Whether the last round is over, or the communication budget is spent."""
        limit = self.config.comm_threshold_mb
        # Divided, as the number that was written is the nearest one to its quotient, but a product may be a byte off.
        spent = limit is not None and self.ledger.training().payload / 1e6 >= limit
        return self.round >= self.config.rounds or spent

    def step(self) -> tuple[RoundRecord, list[Traffic]]:
        """Run one round: train, commit, evaluate if it is time to."""
        start = time.perf_counter()
        report = self._train()
        self.round += 1
        for store in self.stores.values():
            store.commit()
        self.clients.counted(report)
        metrics = {**report.metrics, **self.server.ctx.means.read()}
        loss = metrics.pop("loss", None)
        if report.dropped:
            metrics["dropped"] = float(len(report.dropped))
        found: Evaluation | None = None
        if self.done or self.round % self.config.eval_interval == 0:
            begin = time.perf_counter()
            found = self.evaluate()
            metrics |= found.metrics
            self.seconds["eval"] += time.perf_counter() - begin
        self.seconds["wall"] += time.perf_counter() - start
        lines = self.ledger.close_round(self.round)
        record = RoundRecord(
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
            in_turn=self.algorithm.in_turn,
            metrics=metrics,
            client_rows=[] if found is None else found.clients,
        )
        self.clients.recorded(record)
        return record, lines

    def _train(self) -> RoundReport:
        cohort = self.cohort(self.round)
        if self.algorithm.schedule == "lockstep" and self.clients.here and not self.clients.compute_together:
            self._check_memory(len(cohort))
        before = (
            copy.deepcopy((self.server.state_dict(), self.ledger.state_dict())) if self.clients.may_repeat else None
        )
        while True:
            self.clients.gather(cohort)
            cohort = [client for client in cohort if self.can_train(client)]
            try:
                return self._attempt(cohort)
            except RoundLostError as lost:
                assert before is not None
                log.warning("round %d is repeated from its start: %s", self.round + 1, lost)
                for store in self.stores.values():
                    store.discard_all()
                self.server = self._build_server()
                # A copy: an optimizer goes on with the very tensors that it is given, and the round may be lost again.
                self._take_up(*copy.deepcopy(before))

    def _attempt(self, cohort: list[int]) -> RoundReport:
        seed = rng.derive(self.config.seed, round=self.round, stream="server")
        server = ServerParty(self.server, Workplace(self.blueprint, seed))
        self.server.ctx.open_round(self.round)
        server.open_round(cohort)
        report = self.clients.train(cohort, self._discard, server, self.ledger)
        server.close_round()
        self.seconds["server"] += server.seconds
        return report

    def _discard(self, client: int) -> None:
        for store in self.stores.values():
            store.discard(client)

    def _check_memory(self, clients: int) -> None:
        needed = clients * self.blueprint.training_bytes(self.algorithm.layout.client)
        available = _available_memory(self.device)
        if needed > available:
            raise ConfigError(
                "frac",
                self.config.frac,
                f"a cohort that fits in memory: {clients} clients in lockstep need about {needed / 1e9:.1f} GB, "
                f"{available / 1e9:.1f} GB are free",
            )

    # ------------------------------------------------------------------ what was learnt

    def evaluate(self) -> Evaluation:
        """Test what the algorithm says is to be tested."""
        return self.evaluator.evaluate()

    def full_model(self) -> dict[str, Tensor] | None:
        """The state of one whole model under the model's own names; None where each client has its own."""
        elsewhere = not self.clients.here and any(self.is_own(name) for name in self.algorithm.layout.whole)
        if elsewhere or (self.personal and self.population > 1):
            return None
        states = self.client_states(0).values()
        return {name: tensor.detach().cpu().contiguous().clone() for state in states for name, tensor in state.items()}

    # ------------------------------------------------------------------ checkpoints

    def checkpoint(self, results: dict[str, Any]) -> None:
        """Write a checkpoint that holds ``results`` too; the one before it stays, in case that this one is damaged."""
        assert self._checkpoint is not None, "a federation without a folder has no checkpoints"
        generation = self.stores["clients"].version
        manifest = Manifest(
            identity=self.config.identity(),
            round=self.round,
            generation=generation,
            rows={name: tuple(store.checkpoint()) for name, store in self.stores.items()},
            ledger=self.ledger.state_dict(),
            results=results,
            seconds=self.seconds,
            clients=self.clients.state_dict(),
        )
        self._checkpoint.write(manifest, self.server.state_dict())
        self.clients.checkpointed()

    def resume(
        self, restore: Callable[[Mapping[str, Any]], None] | None = None, *, recorded: str | None = None
    ) -> dict[str, Any] | None:
        """Take up the folder's checkpoint; returns its results, or None where there is no checkpoint.

        Args:
            restore: takes up the results; raises DamagedError where the run's files are not as they were then. Given by
                a run that goes on: where its last checkpoint is damaged, it goes on from the one before.
            recorded: the identity that the run was recorded with, if it is not that of this federation's configuration.

        Raises:
            ConfigError: the checkpoint belongs to another configuration or other data, or is damaged.
        """
        results: dict[str, Any] | None = None
        found = self._checkpoint is not None and self._checkpoint.exists()
        if self._checkpoint is not None and (
            found or restore is None
        ):  # else the run begins, with the data that there are
            check_data(self._folder, lambda: self.dataset.facts, self.config.data_changed)
        if self._checkpoint is None or not found:
            for store in self.stores.values():
                store.clear()
            return None

        def take_up(found: Found, server_state: Any) -> None:
            nonlocal results
            try:
                self._restore(found, server_state)
                if restore is not None:
                    restore(found.manifest.results)
            except (LookupError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
                raise DamagedError.unreadable(self._folder / CHECKPOINT_FOLDER, error) from error
            results = found.manifest.results

        self._checkpoint.read(recorded or self.config.identity(), take_up, fall_back=restore is not None)
        return results

    def _restore(self, found: Found, server_state: Any) -> None:
        manifest = found.manifest
        for name, store in self.stores.items():
            if found.first is None:
                store.restore(manifest.rows[name], manifest.generation + 1)
            else:
                store.take_up(found.first[name], manifest.generation + 1)
        self.server = self._build_server()  # as new: a damaged checkpoint may have been taken up in part
        self.round = manifest.round
        self._take_up(server_state, manifest.ledger)
        self.clients.load_state_dict(manifest.clients)
        self.seconds = dict(manifest.seconds)

    def _take_up(self, server: Any, ledger: Mapping[str, Any]) -> None:
        """The server and the ledger as they were before the round that comes."""
        self.server.ctx.open_round(max(0, self.round - 1))
        self.server.load_state_dict(server)
        self.ledger.load_state_dict(ledger)


def _available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
