"""A federation: data, parties and stores put together, one round at a time."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import algorithms
from datasets import Dataset, Partition, apply_partition, batch_sizes, load, partition
from models import check_model
from runtime import rng
from runtime.blueprint import DTYPES, Blueprint
from runtime.checkpoint import Checkpoint, Manifest
from runtime.config import ConfigError
from runtime.contexts import ClientContext, ClientState, Seat, ServerContext
from runtime.evaluation import Evaluation, Score, evaluate, mean, rows_of_clients, spread_over_clients
from runtime.ledger import Ledger, Traffic
from runtime.results import ClientRow, RoundRecord
from runtime.schedule import SCHEDULES, RoundReport
from runtime.session import Channel, LocalSession, ServerParty, Workplace
from runtime.settings import RunConfig
from runtime.store import Store

log = logging.getLogger(__name__)

CHECKPOINT_FOLDER = "checkpoint"


class Federation:
    """A run that moves on by one round at a time.

    Args:
        config: the whole configuration.
        folder: where checkpoints and evicted client state go; None keeps everything in memory.

    Raises:
        ConfigError: what cannot be built as configured.
    """

    def __init__(self, config: RunConfig, folder: Path | None = None) -> None:
        self.config = config
        self.algorithm = algorithms.get(config.algorithm_name)
        self.device = config.torch_device()
        for part in self.algorithm.layout.client:
            self.algorithm.check_optimizer(config.optimizer_for(part))
        self.dataset: Dataset = load(
            config.dataset, seed=config.seed, device=self.device, dtype=DTYPES[config.precision]
        )
        check_model(config.model, self.dataset.info)
        self.population = 1 if self.algorithm.pooled else config.num_clients
        self.partition = self._partition()
        self.local_test = self._local_test() if config.dataset.local_test else None
        self.blueprint = Blueprint(
            config,
            self.algorithm.layout,
            self.dataset.info,
            device=self.device,
            precision=config.precision,
            buffers=config.aggregate.buffers,
        )
        self.parameters = sum(self.blueprint.parameters(name) for name in self._global_names())
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
        self._seats: list[Seat] = []
        self._skipped: set[int] = set()

    # ------------------------------------------------------------------ putting together

    def _partition(self) -> Partition:
        config = self.config.dataset
        if self.algorithm.pooled:
            config = replace(config, distribution="iid", min_samples=0)
        labels = self.dataset.train.labels.numpy()
        return partition(labels, self.population, config, seed=self.config.seed, groups=self.dataset.groups)

    def _local_test(self) -> Partition:
        labels, test = self.dataset.train.labels.numpy(), self.dataset.test.labels.numpy()
        return apply_partition(self.partition, labels, test, seed=self.config.seed)

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
        return [int(client) for client in chosen if self._can_train(int(client))]

    def _can_train(self, client: int) -> bool:
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
        layout, config = self.algorithm.layout, self.config
        parts = self.blueprint.parts({*layout.client, *layout.server})
        x = torch.zeros(1, *self.dataset.info.shape, dtype=self.blueprint.dtype, device=self.device)
        try:
            with torch.no_grad(), rng.TorchStream(0, self.device):
                z = parts["client" if layout.cut else "model"](x)
                for name in parts.keys() & {"server", "auxiliary"}:
                    parts[name](z)
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
        if self.algorithm.schedule == "lockstep":
            self._check_memory(len(cohort))
        seed = rng.derive(self.config.seed, round=self.round, stream="server")
        server = ServerParty(self.server, Workplace(self.blueprint, seed))
        self.server.ctx.open_round(self.round)
        server.open_round(cohort)
        run = SCHEDULES[self.algorithm.schedule]
        report = run(cohort, self._open, self._discard, server, Channel(self.ledger))
        server.close_round()
        self.seconds["server"] += server.seconds
        return report

    def _discard(self, client: int) -> None:
        for store in self.stores.values():
            store.discard(client)

    def _open(self, client: int) -> LocalSession:
        seat = next((seat for seat in self._seats if not seat.taken), None)
        if seat is None:
            seat = Seat(self.blueprint.parts(self.algorithm.layout.client))
            self._seats.append(seat)
        seat.taken = True
        for part in seat.parts.values():
            part.zero_grad(set_to_none=True)
        context = ClientContext(
            self.blueprint,
            seat,
            id=client,
            round=self.round,
            seed=self.config.seed,
            config=self.config.algorithm,
            samples=len(self.partition.indices(client)),
            state=ClientState(self.stores["clients"], client),
            batches=lambda generator: self._batches(client, generator),
        )
        seed = rng.derive(self.config.seed, round=self.round, client=client, stream="client")

        def leave(seconds: float) -> None:
            seat.taken = False
            self.seconds["client"] += seconds

        return LocalSession(self.algorithm, context, Workplace(self.blueprint, seed), leave)

    def _batches(self, client: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        config = self.config
        return self.dataset.train.batches(
            self.partition.indices(client),
            batch_size=config.batch_size,
            epochs=config.local_epochs,
            shuffle=config.dataset.shuffle,
            augment=True,
            drop_last=config.dataset.drop_last,
            generator=generator,
        )

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

    # ------------------------------------------------------------------ evaluation

    def evaluate(self) -> Evaluation:
        """Test what the algorithm says is to be tested."""
        if self.algorithm.evaluates == "clients":
            return self._evaluate_clients()
        modules = [self.server.ctx.part(name) for name in self._global_names()]
        score = self._score(modules)
        metrics: dict[str, float] = {}
        if self.dataset.validation is not None:
            validation = self._score(modules, validation=True)
            metrics |= {"val_acc": validation.accuracy, "val_loss": validation.loss}
        rows: list[ClientRow] = []
        if self.local_test is not None:
            rows = rows_of_clients("local_acc", [score] * self.population, self.local_test)
        return Evaluation(score.accuracy, score.loss, metrics | spread_over_clients(rows), rows)

    def _global_names(self) -> tuple[str, ...]:
        return ("client", "server") if self.algorithm.layout.cut else ("model",)

    def _score(self, modules: list[nn.Module], *, validation: bool = False) -> Score:
        source = self.dataset.validation if validation else self.dataset.test
        assert source is not None
        shared = self.config.aggregate.buffers == "average"
        names = self._global_names()
        return evaluate(
            modules,
            source,
            self.blueprint,
            batch_size=self.config.eval_batch_size,
            batch_statistics=[not shared and name in self.algorithm.shared for name in names],
        )

    def _evaluate_clients(self) -> Evaluation:
        seat = Seat(self.blueprint.parts(("model",)))
        scores: list[Score] = []
        validations: list[Score] = []
        untrained: int | None = None
        for client in range(self.population):
            row = self.stores["clients"].get(client, "model")
            if row is None and untrained is not None:
                scores.append(scores[untrained])
                validations += validations[untrained : untrained + 1]
                continue
            seat.parts["model"].load_state_dict(row or self.blueprint.initial["model"])
            scores.append(self._score([seat.parts["model"]]))
            if self.dataset.validation is not None:
                validations.append(self._score([seat.parts["model"]], validation=True))
            untrained = client if row is None else untrained
        loss = mean([score.loss for score in scores])
        rows = rows_of_clients("client_acc", scores) if len(scores) > 1 else []
        if self.local_test is not None:
            rows += rows_of_clients("local_acc", scores, self.local_test)
        metrics = spread_over_clients(rows)
        if validations:
            metrics["val_acc"] = mean([score.accuracy for score in validations])
            metrics["val_loss"] = mean([score.loss for score in validations])
        return Evaluation(mean([score.accuracy for score in scores]), loss, metrics, rows)

    def full_model(self) -> dict[str, Tensor] | None:
        """The state of one whole model under the model's own names; None where each client has its own."""
        if self.algorithm.evaluates == "clients":
            return self.stores["clients"].get(0, "model") if self.population == 1 else None
        state: OrderedDict[str, Tensor] = OrderedDict()
        for name in self._global_names():
            state.update(self.server.ctx.part(name).state_dict())
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}

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

    def resume(self) -> dict[str, Any] | None:
        """Take up the folder's checkpoint; returns its results, or None where there is no checkpoint.

        Raises:
            ConfigError: the checkpoint belongs to another configuration.
        """
        if self._checkpoint is None or not self._checkpoint.exists():
            for store in self.stores.values():
                store.restore([], 0)
            return None
        manifest, server_state = self._checkpoint.read()
        if manifest.identity != self.config.identity():
            raise ConfigError("resume", manifest.identity, "a checkpoint of the same configuration")
        self.round = manifest.round
        self.server.ctx.open_round(max(0, manifest.round - 1))
        self.server.load_state_dict(server_state)
        for name, store in self.stores.items():
            store.restore(manifest.rows[name], manifest.version + 1)
        self.ledger.load_state_dict(manifest.ledger)
        self.seconds = dict(manifest.seconds)
        return manifest.results


def _available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
