"""What both parties make of a run's configuration: data, the clients' shares, and the parts of the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cutlayer.algorithms as algorithms
from cutlayer.algorithms.mixins import ChecksOptimizer, KeepsByConfig
from cutlayer.datasets import Dataset, Partition, batch_sizes, load, own_partition, partition
from cutlayer.models import check_model, input_channels
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.crossing import joined
from cutlayer.runtime.parties.blueprint import DTYPES, Blueprint, Parts
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.trust import Limit, check_size

log = logging.getLogger(__name__)


class Setup:
    """A configuration made real, as far as it is the same at every party.

    Args:
        config: the whole configuration.
        dataset: the configured one, where it is loaded already.
        limit: how large the model may be; None for any size.

    Raises:
        ConfigError: what cannot be built as configured.
    """

    stores: Mapping[str, Store]

    def __init__(self, config: RunConfig, dataset: Dataset | None = None, limit: Limit | None = None) -> None:
        from cutlayer.runtime.costs.cuts import within_budget  # it compares federations

        self.algorithm = algorithms.get(config.algorithm_name)
        if issubclass(self.algorithm, ChecksOptimizer):
            for part in self.algorithm.layout.client:
                self.algorithm.check_optimizer(config.optimizer_for(part))
        self.device = config.torch_device()
        if dataset is None:
            dataset = load(config.dataset, seed=config.seed, device=self.device, dtype=DTYPES[config.precision])
        if limit is not None:
            check_size(config.model, dataset.info, limit)
        self.config = config = within_budget(config, dataset)
        self.dataset: Dataset = dataset.repeated(input_channels(config.model, dataset.info))
        check_model(config.model, self.dataset.info, self.algorithm.layout.parts)
        self.personal = self.algorithm.personal
        if issubclass(self.algorithm, KeepsByConfig):
            self.personal = self.algorithm.kept(config.algorithm)
        self.population = 1 if self.algorithm.pooled else config.num_clients
        self.partition = self._partition()
        self.blueprint = self.make_blueprint(config)
        self.parameters = sum(self.blueprint.parameters(name) for name in self.algorithm.layout.whole)
        self._able = self._with_batches(2 if self._needs_two() else 1)
        self.round = 0
        self.seconds = {"wall": 0.0, "client": 0.0, "server": 0.0, "eval": 0.0}

    @property
    def held(self) -> Parts:
        """The parts that the server holds, as far as this party knows them."""
        raise NotImplementedError

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
            config = config.evenly()
        labels = self.dataset.train.labels.numpy()
        if not config.divided:
            return own_partition(len(labels), self.population, self.config.client_id)
        return partition(labels, self.population, config, seed=self.config.seed, groups=self.dataset.groups)

    def cohort(self, round: int) -> list[int]:
        """The clients of a round, in the order in which they are served, drawn among those that have a batch.

        A function of the configuration alone. Where each client has data of its own, all are drawn from, as who has no
        batch is known only once they are there; those are left out then.
        """
        able = np.arange(self.population) if self._apart else self._able.nonzero()[0]
        size = min(len(able), max(1, math.ceil(self.config.frac * self.population - 1e-9)))
        generator = rng.numpy_generator(self.config.seed, round=round, stream="cohort")
        chosen = able[generator.choice(len(able), size, replace=False)]
        return [int(client) for client in chosen if self.can_train(int(client))]

    def can_train(self, client: int) -> bool:
        """Whether the client takes part in rounds."""
        return self.has_batches(client)

    def has_batches(self, client: int) -> bool:
        """Whether a client has a batch that can be trained on."""
        return bool(self._able[client])

    def tell_idle(self) -> None:
        """Log how many clients have no batch to train on, if any."""
        idle = self.partition.sizes[~self._able]
        if len(idle) and not self._apart:
            counts = (len(idle), self.population, idle.min(), idle.max())
            log.warning(
                "%d of %d clients, of %d to %d samples, have no batch to train on and are in no cohort", *counts
            )

    @property
    def _apart(self) -> bool:
        """Whether each client has data of its own, of which the others, and the server, know nothing."""
        return not self.config.dataset.divided and not self.algorithm.pooled

    def _with_batches(self, least: int) -> np.ndarray:
        """Which clients have a batch of at least ``least`` samples: bool [clients].

        Raises:
            ConfigError: none has.
        """
        config, samples = self.config, self.partition.sizes
        different, which = np.unique(samples, return_inverse=True)
        sizes = [batch_sizes(int(n), config.batch_size, config.dataset.drop_last) for n in different]
        able = np.array([max(each, default=0) >= least for each in sizes])[which]
        if self._apart or able.all():
            return able
        most = int(samples.max())
        if not able.any() and config.dataset.drop_last == "always" and most < config.batch_size:
            reason = f"at most {most} with dataset.drop_last=always, the samples of the largest client"
            others = "dataset.drop_last=auto, or fewer of num_clients"
            raise ConfigError("batch_size", config.batch_size, f"{reason}; or {others}")
        if not able.any():
            reason = f"fewer: no client has the {least} samples that a batch of {config.model.name} has to have"
            raise ConfigError("num_clients", config.num_clients, reason)
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
        several = self.algorithm.Server.gathers and max(self.config.batch_size, self.config.frac * self.population) > 1
        for path in (layout.whole, *self.algorithm.paths.values()):
            x: Any = torch.zeros(1, *self.dataset.info.shape, dtype=blueprint.dtype, device=self.device)
            z = x
            for name in path:
                z = joined([x, x]) if several and name not in layout.client else x
                x = parts[name](z)
            if "auxiliary" in parts:
                parts["auxiliary"](z)

    def client_states(self, client: int, path: Sequence[str] | None = None) -> dict[str, Mapping[str, Tensor]]:
        """The parts of the model that a client uses, in order: its own ones, and for the others the server's.

        Args:
            path: names of the parts; None for those that make up the whole model.
        """
        states: dict[str, Mapping[str, Tensor]] = {}
        held, initial = self.held, self.blueprint.for_client(client).initial
        for name in path or self.algorithm.layout.whole:
            own = self.stores["clients"].get(client, name) if self.is_own(name) else None
            shared = held[name].state_dict() if name in held else initial[name]
            states[name] = shared if own is None else own
        return states

    def is_own(self, part: str) -> bool:
        """Whether a client may have a part for itself: by the method, or because the server has none."""
        return part in self.personal or part not in self.held
