"""A federation: data, parties and stores put together, one round at a time."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import algorithms
from datasets import Dataset, Partition, batch_sizes, load, partition
from models import check_model, input_channels, through
from runtime import rng
from runtime.blueprint import DTYPES, Blueprint
from runtime.boundary import Crossing
from runtime.checkpoint import Checkpoint, Manifest
from runtime.clients import Clients
from runtime.config import ConfigError
from runtime.contexts import ServerContext
from runtime.evaluation import Evaluation
from runtime.evaluator import Evaluator
from runtime.ledger import Ledger, Traffic
from runtime.results import RoundRecord
from runtime.schedule import SCHEDULES, RoundReport
from runtime.session import Channel, ServerParty, Workplace
from runtime.settings import RunConfig
from runtime.store import Store

log = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "checkpoint"


class Federation:
    """A run that moves on by one round at a time.

    Args:
        config: the whole configuration.
        folder: where checkpoints and evicted client state go; None keeps everything in memory.
        dataset: the configured one, where it is loaded already.

    Raises:
        ConfigError: what cannot be built as configured.
    """

    def __init__(self, config: RunConfig, folder: Path | None = None, dataset: Dataset | None = None) -> None:
        from runtime.cuts import within_budget  # it compares federations

        self.algorithm = algorithms.get(config.algorithm_name)
        for part in self.algorithm.layout.client:
            self.algorithm.check_optimizer(config.optimizer_for(part))
        self.device = config.torch_device()
        if dataset is None:
            dataset = load(config.dataset, seed=config.seed, device=self.device, dtype=DTYPES[config.precision])
        self.config = config = within_budget(config, dataset)
        self.dataset: Dataset = dataset.repeated(input_channels(config.model, dataset.info))
        check_model(config.model, self.dataset.info, self.algorithm.layout.parts)
        self.personal = self.algorithm.kept(config.algorithm)
        self.population = 1 if self.algorithm.pooled else config.num_clients
        self.partition = self._partition()
        self.blueprint = self.make_blueprint(config)
        self.parameters = sum(self.blueprint.parameters(name) for name in self.algorithm.layout.whole)
        self._smallest = 2 if self._needs_two() else 1
        self._checkpoint = None if folder is None else Checkpoint(folder / CHECKPOINT_FOLDER)
        self.stores = {
            name: Store(
                None if folder is None else folder / CHECKPOINT_FOLDER / name,
                device=self.device,
                memory_limit=config.state_memory_mb * 1e6,
            )
            for name in ("clients", "server")
        }
        self.ledger = Ledger()
        self.round = 0
        self.seconds = {"wall": 0.0, "client": 0.0, "server": 0.0, "eval": 0.0}
        self.server = self._build_server()
        self.evaluator = Evaluator(self)
        self.clients = Clients(self)
        self._skipped: set[int] = set()

    # ------------------------------------------------------------------ putting together

    def make_blueprint(self, config: RunConfig, *, compare: bool = True) -> Blueprint:
        """The blueprint of a configuration of this method, on this data; ``compare`` as of ``models.split``."""
        return Blueprint(
            config,
            self.algorithm.layout,
            self.dataset.info,
            device=self.device,
            precision=config.precision,
            buffers=config.aggregate.buffers,
            compare=compare,
        )

    def _partition(self) -> Partition:
        config = self.config.dataset
        if self.algorithm.pooled:
            config = replace(config, distribution="iid", min_samples=0)
        labels = self.dataset.train.labels.numpy()
        return partition(labels, self.population, config, seed=self.config.seed, groups=self.dataset.groups)

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
        spent = limit is not None and self.ledger.training().payload >= limit * 1e6
        return self.round >= self.config.rounds or spent

    def cohort(self, round: int) -> list[int]:
        """The clients of a round, in the order in which they are served; a function of the seed alone."""
        size = max(1, math.ceil(self.config.frac * self.population - 1e-9))
        generator = rng.numpy_generator(self.config.seed, round=round, stream="cohort")
        chosen = generator.choice(self.population, size, replace=False)
        return [int(client) for client in chosen if self.can_train(int(client))]

    def can_train(self, client: int) -> bool:
        """A client without a batch that can be trained on is skipped and reported."""
        samples = len(self.partition.indices(client))
        sizes = batch_sizes(samples, self.config.batch_size, self.config.dataset.drop_last)
        able = bool(sizes) and max(sizes) >= self._smallest
        if not able and client not in self._skipped:
            self._skipped.add(client)
            log.warning("client %d is skipped: its %d training samples make no batch to train on", client, samples)
        return able

    def _needs_two(self) -> bool:
        """Whether a batch of one sample cannot be trained on: normalised over one value it has no variance.

        Raises:
            ConfigError: the setting makes such batches of clients that have more samples.
        """
        config = self.config
        try:
            with torch.no_grad(), rng.TorchStream(0, self.device):
                for blueprint in self.blueprint.variants:
                    self._pass_one(blueprint)
        except ValueError:
            if config.batch_size == 1:
                raise ConfigError(
                    "batch_size", 1, f"at least 2: {config.model.name} normalises over the batch"
                ) from None
            if config.dataset.drop_last == "never" and (self.partition.sizes % config.batch_size == 1).any():
                reason = "auto or always: a client's last batch has one sample, which cannot be normalised"
                raise ConfigError("dataset.drop_last", "never", reason) from None
            return True
        return False

    def _pass_one(self, blueprint: Blueprint) -> None:
        """A sample through every path of the model, and through the auxiliary model behind the last but one part."""
        layout = self.algorithm.layout
        parts = blueprint.parts(layout.parts)
        several = self.algorithm.gathers and max(self.config.batch_size, self.config.frac * self.population) > 1
        for path in (layout.whole, *self.algorithm.paths.values()):
            x: Any = torch.zeros(1, *self.dataset.info.shape, dtype=blueprint.dtype, device=self.device)
            z = x
            for name in path:
                z = _twice(x) if several and name not in layout.client else x
                x = through(parts[name], z)
            if "auxiliary" in parts:
                through(parts["auxiliary"], z)

    def step(self) -> tuple[RoundRecord, list[Traffic]]:
        """Run one round: train, commit, evaluate if it is time to."""
        start = time.perf_counter()
        report = self._train()
        self.round += 1
        for store in self.stores.values():
            store.commit()
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
        return record, lines

    def _train(self) -> RoundReport:
        cohort = self.cohort(self.round)
        if self.algorithm.schedule == "lockstep" and not self.clients.compute_together:
            self._check_memory(len(cohort))
        seed = rng.derive(self.config.seed, round=self.round, stream="server")
        server = ServerParty(self.server, Workplace(self.blueprint, seed))
        self.server.ctx.open_round(self.round)
        server.open_round(cohort)
        channel = Channel(self.ledger)
        if cohort and self.clients.compute_together:
            report = self.clients.train_together(cohort, server, channel)
        else:
            run = SCHEDULES[self.algorithm.schedule]
            report = run(cohort, self.clients.open, self._discard, server, channel)
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

    def client_states(self, client: int, path: Sequence[str] | None = None) -> dict[str, Mapping[str, Tensor]]:
        """The parts of the model that a client uses, in order: its own ones, and for the others the server's.

        Args:
            path: names of the parts; None for those that make up the whole model.
        """
        states: dict[str, Mapping[str, Tensor]] = {}
        held, initial = self.server.ctx.parts, self.blueprint.for_client(client).initial
        for name in path or self.algorithm.layout.whole:
            own = self.stores["clients"].get(client, name) if self.is_own(name) else None
            shared = held[name].state_dict() if name in held else initial[name]
            states[name] = shared if own is None else own
        return states

    def is_own(self, part: str) -> bool:
        """Whether a client may have a part for itself: by the method, or because the server has none."""
        return part in self.personal or part not in self.server.ctx.parts

    def full_model(self) -> dict[str, Tensor] | None:
        """The state of one whole model under the model's own names; None where each client has its own."""
        if self.personal and self.population > 1:
            return None
        states = self.client_states(0).values()
        return {name: tensor.detach().cpu().contiguous().clone() for state in states for name, tensor in state.items()}

    # ------------------------------------------------------------------ checkpoints

    def checkpoint(self, results: dict[str, Any]) -> None:
        """Write a checkpoint that holds ``results`` too, and drop what the previous one needed."""
        assert self._checkpoint is not None, "a federation without a folder has no checkpoints"
        version = self.stores["clients"].version
        manifest = Manifest(
            identity=self.config.identity(),
            round=self.round,
            server=self._checkpoint.server_file(self.round),
            rows={name: store.checkpoint() for name, store in self.stores.items()},
            version=version,
            ledger=self.ledger.state_dict(),
            results=results,
            seconds=self.seconds,
        )
        self._checkpoint.write(manifest, self.server.state_dict())
        for store in self.stores.values():
            store.clean()

    def resume(self, *, recorded: str | None = None) -> dict[str, Any] | None:
        """Take up the folder's checkpoint; returns its results, or None where there is no checkpoint.

        Args:
            recorded: the identity that the run was recorded with, if it is not that of this federation's configuration.

        Raises:
            ConfigError: the checkpoint belongs to another configuration.
        """
        if self._checkpoint is None or not self._checkpoint.exists():
            for store in self.stores.values():
                store.restore([], 0)
            return None
        manifest, server_state = self._checkpoint.read()
        if manifest.identity != (recorded or self.config.identity()):
            raise ConfigError("resume", manifest.identity, "a checkpoint of the same configuration")
        self.round = manifest.round
        self.server.ctx.open_round(max(0, manifest.round - 1))
        self.server.load_state_dict(server_state)
        for name, store in self.stores.items():
            store.restore(manifest.rows[name], manifest.version + 1)
        self.ledger.load_state_dict(manifest.ledger)
        self.seconds = dict(manifest.seconds)
        return manifest.results


def _twice(crossing: Crossing) -> Crossing:
    """What crosses for one sample, for two."""
    if isinstance(crossing, tuple):
        return tuple(torch.cat([each, each]) for each in crossing)
    return torch.cat([crossing, crossing])


def _available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
