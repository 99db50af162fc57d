"""What both parties make of a run's configuration: data, the clients' shares, and the parts of the model."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cutlayer.algorithms as algorithms
from cutlayer.algorithms import Algorithm
from cutlayer.algorithms.mixins import ChecksOptimizer, CountsSteps, KeepsByConfig, OwnSteps, TrainsAdapters
from cutlayer.datasets import Dataset, Partition, batch_sizes, load, own_partition, partition
from cutlayer.models import check_model, input_channels
from cutlayer.models.shapes import sample
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.memory import memory_told
from cutlayer.runtime.messages.crossing import joined
from cutlayer.runtime.parties.blueprint import MEMORY_FORMATS, WEIGHT_DTYPES, Blueprint
from cutlayer.runtime.parties.client_data import ClientData
from cutlayer.runtime.parties.graphs import PassRecorder
from cutlayer.runtime.parties.schedules import Pace, check_schedule
from cutlayer.runtime.settings import RunConfig

log = logging.getLogger(__name__)


def load_data(config: RunConfig, *, download: bool = True) -> Dataset:
    """The data of a configuration; what is wrong with its method is found first.

    Args:
        download: whether published data that are not here may be downloaded.

    Raises:
        ConfigError: there are no such data, or the method does not go with an optimizer.
    """
    _method(config)
    device, dtype = config.torch_device(), WEIGHT_DTYPES[config.precision]
    return load(config.dataset, seed=config.seed, device=device, dtype=dtype, download=download)


def _method(config: RunConfig) -> type[Algorithm]:
    algorithm = algorithms.get(config.algorithm_name)
    if issubclass(algorithm, ChecksOptimizer):
        for part in algorithm.layout.client:
            algorithm.check_optimizer(config.optimizer_for(part))
    if issubclass(algorithm, CountsSteps):
        for part in sorted(algorithm.layout.parts):
            scheduler = config.scheduler_for(part)
            known = algorithm.part_steps(config.algorithm, part, 1, 1) is not None
            if scheduler is not None and scheduler.per == "step" and not known:
                expected = f"round, as {algorithm.name} does not know ahead how many steps of the {part} part it takes"
                raise ConfigError(f"{config.scheduler_key(part)}.per", "step", expected)
    if issubclass(algorithm, TrainsAdapters):
        algorithm.check_adapters(config.model)
    return algorithm


class Setup:
    """A configuration made real, as far as it is the same at every party; it does not change.

    Args:
        config: the whole configuration; a budget of its cut has led to one, see ``costs.cuts.prepared``.
        dataset: the configured one, where it is loaded already.
        sketched: the model's weights take no memory and its parts are not compared with it: nothing can be trained.
        divide: gives the clients' shares of the data, of a setup that has all but these and what follows from them.

    Raises:
        ConfigError: what cannot be built as configured.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset | None = None,
        divide: Callable[[Setup], Partition] | None = None,
        *,
        sketched: bool = False,
    ) -> None:
        if config.model.budget is not None:
            reason = "the name of a module; `costs.cuts.prepared` chooses one within a budget"
            raise ConfigError("model.cut", config.model.cut, reason)
        self.config = config
        self.algorithm = _method(config)
        self.device = torch.device("meta") if sketched else config.torch_device()
        dataset = load_data(config) if dataset is None else dataset
        repeated = dataset.repeated(input_channels(config.model, dataset.info))
        self.dataset: Dataset = repeated.in_format(MEMORY_FORMATS[config.memory_format])
        tasks, task = self.algorithm.tasks, self.dataset.info.task
        if tasks is not None and task not in tasks:
            expected = f"another for {config.dataset.name}, whose task is {task}; this one is for {' and '.join(tasks)}"
            raise ConfigError("algorithm", config.algorithm_name, expected)
        check_model(config.model, self.dataset.info, self.algorithm.layout.parts)
        self.personal = self.algorithm.personal
        if issubclass(self.algorithm, KeepsByConfig):
            self.personal = self.algorithm.kept(config.algorithm)
        self.population = 1 if self.algorithm.pooled else config.num_clients
        self.blueprint = self._blueprint(config, compare=not sketched)
        self.partition = (divide or configured_shares)(self)
        self.parameters = sum(self.blueprint.parameters(name) for name in self.algorithm.layout.whole)
        self._able = self._with_batches(2 if self._needs_two() else 1)
        self._check_steps()

    def _blueprint(self, config: RunConfig, *, compare: bool = True) -> Blueprint:
        return Blueprint(
            config,
            self.algorithm.layout,
            self.dataset.info,
            device=self.device,
            precision=config.precision,
            buffers=config.aggregate.buffers,
            memory_format=config.memory_format,
            recorder=PassRecorder.on(self.device) if config.compile else None,
            compare=compare,
        )

    def with_model(self, config: RunConfig) -> Setup:
        """The same with the model of another configuration, whose parts are not compared with the whole model.

        Raises:
            ConfigError: there is no such model.
        """
        twin = copy.copy(self)
        twin.config, twin.blueprint = config, self._blueprint(config, compare=False)
        return twin

    def with_shares(self, config: RunConfig, shares: Partition) -> Setup:
        """The same of another configuration, whose clients have other shares of the training data."""
        twin = copy.copy(self)
        twin.config, twin.partition = config, shares
        twin._able = shares.sizes > 0
        return twin

    @property
    def revision(self) -> int:
        """How often what this configuration means has changed, by its method and its model together."""
        return self.algorithm.revision + self.config.model.revision

    def cohort(self, round: int) -> list[int]:
        """The clients of a round, in the order in which they are served, drawn among those that have a batch.

        With ``cohort_order=fixed`` those that were drawn are served by their numbers.

        A function of the configuration alone. Where each client has data of its own, all are drawn from, as who has no
        batch is known only once they are there.
        """
        able = np.arange(self.population) if self._apart else self._able.nonzero()[0]
        size = min(len(able), max(1, math.ceil(self.config.frac * self.population - 1e-9)))
        begun = round - round % self.config.cohort_interval
        generator = rng.numpy_generator(self.config.seed, round=begun, stream="cohort")
        drawn = [int(client) for client in able[generator.choice(len(able), size, replace=False)]]
        return sorted(drawn) if self.config.cohort_order == "fixed" else drawn

    def has_batches(self, client: int) -> bool:
        """Whether a client has a batch that can be trained on."""
        return bool(self._able[client])

    def data(self, client: int) -> ClientData:
        """A client's training data."""
        config = self.config
        return ClientData(
            self.dataset.train,
            self.partition.indices(client),
            seed=config.seed,
            client=client,
            batch_size=config.batch_size,
            local_epochs=config.local_epochs,
            config=config.dataset,
        )

    def epoch(self, client: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over a client's training data; no batch where the client has none to train on."""
        return self.data(client).batches(generator, 1) if self.has_batches(client) else iter(())

    def memory(self, work: str) -> AbstractContextManager[None]:
        """What is said where memory runs out in a client's work, such as "the round of client 3"."""
        workers, size = self.config.workers, self.config.batch_size
        if workers == 1:
            return memory_told(f"memory ran out in {work}", "batch_size", size, "less")
        less = f"fewer, or a smaller batch_size than {size}"
        return memory_told(f"a worker's memory ran out in {work}", "workers", workers, less)

    def steps(self, client: int) -> list[int]:
        """Samples in each batch of a round of the client."""
        config, samples = self.config, int(self.partition.sizes[client])
        sizes = config.local_epochs * batch_sizes(samples, config.batch_size, config.dataset.drop_last)
        if issubclass(self.algorithm, OwnSteps):
            return self.algorithm.steps(config.algorithm, client, self.population, sizes)
        return [*sizes]

    def _check_steps(self) -> None:
        """Raises ConfigError where a schedule by step is none for so many steps as there are."""
        config, server = self.config, self.server_pace()
        longest = self.pace(int(self.partition.sizes.argmax()))
        for part in sorted(self.blueprint.by_step):
            length = (longest if part in self.algorithm.layout.client else server)(part, 0).of
            if length:  # else no data are here
                optimizer, scheduler = config.optimizer_for(part), config.scheduler_for(part)
                check_schedule(optimizer, scheduler, length, config.scheduler_key(part))

    def pace(self, client: int) -> Pace:
        """How a client's schedules move on."""
        steps = len(self.steps(client)) if self.blueprint.by_step else 0
        return Pace(self.config.rounds, {part: [self._part_steps(part, steps)] for part in self.blueprint.by_step})

    def server_pace(self) -> Pace:
        """How the server's schedules move on; by the steps of a part, those of all cohorts of the run."""
        layout, rounds, together = self.algorithm.layout, self.config.rounds, self.algorithm.Server.gathers
        parts = self.blueprint.by_step & (frozenset(layout.server) - frozenset(layout.client))
        if not parts:
            return Pace(rounds, {})
        if self._apart:
            expected = "round for what the server trains, as it does not know how many batches clients elsewhere have"
            raise ConfigError(f"{self.config.scheduler_key(min(parts))}.per", "step", expected)
        steps = [len(self.steps(client)) for client in range(self.population)]
        each = {part: [self._part_steps(part, own) for own in steps] for part in parts}
        begun = {part: [0] for part in parts}
        for cohort in map(self.cohort, range(rounds)):
            for part, before in begun.items():
                taken = [each[part][client] for client in cohort]
                before.append(before[-1] + (max(taken, default=0) if together else sum(taken)))
        return Pace(rounds, each, begun)

    def _part_steps(self, part: str, steps: int) -> int:
        """Steps of a part in a client's round of so many batches."""
        if not issubclass(self.algorithm, CountsSteps):
            return steps
        found = self.algorithm.part_steps(self.config.algorithm, part, steps, self.config.local_epochs)
        assert found is not None, "see _method"
        return found

    def places(self, client: int, round: int) -> list[int]:
        """Places in each batch of a round of the client: of images as many as samples, of texts tokens, padding too."""
        if not self.dataset.info.length:
            return self.steps(client)
        generator = rng.torch_generator(self.config.seed, round=round, client=client, stream="batches")
        return [self.dataset.train.places(step.samples) for step in self.data(client).steps(generator)]

    def report_idle(self) -> None:
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
            x: Any = sample(self.dataset.info.shape, 1, dtype=blueprint.dtype, device=self.device)
            z = x
            for name in path:
                z = joined([x, x]) if several and name not in layout.client else x
                x = parts[name](z)
            if "auxiliary" in parts:
                parts["auxiliary"](z)


def configured_shares(setup: Setup) -> Partition:
    """The clients' shares of the training data as configured."""
    config = setup.config.dataset
    if setup.algorithm.pooled:
        config = config.evenly()
    labels = setup.dataset.train.labels.numpy()
    if not config.divided:
        return own_partition(len(labels), setup.population, setup.config.client_id)
    return partition(labels, setup.population, config, seed=setup.config.seed, groups=setup.dataset.groups)
