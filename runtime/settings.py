"""The whole configuration of a run, typed and checked: what `hydra_config/` composes to."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch

import cutlayer.algorithms as algorithms
from cutlayer.algorithms import algorithm_config
from cutlayer.algorithms.mixins import ConfiguresParts
from cutlayer.datasets import DatasetConfig
from cutlayer.evaluations import EVALUATIONS
from cutlayer.models import ModelConfig, refinable
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError, build, plain, scoped
from cutlayer.runtime.ground.process import Arithmetic
from cutlayer.runtime.ground.reading import read_yaml
from cutlayer.runtime.keys import ScopedKey, identity_of, keys_of, scope_of, setting_of
from cutlayer.runtime.parties.aggregate import AggregateConfig
from cutlayer.runtime.parties.cohort import CohortConfig
from cutlayer.runtime.parties.optim import OptimizerConfig, optimizer_config, optimizer_options
from cutlayer.runtime.parties.schedules import SchedulerConfig, check_schedule, scheduler_config
from cutlayer.runtime.records.data_record import Changed
from cutlayer.runtime.records.loggers import LoggerConfig, logger_config
from cutlayer.runtime.scoring.classifiers import MonitorConfig, ProbeConfig
from cutlayer.runtime.scoring.completing import GenerateConfig
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from cutlayer.runtime.transport import GrpcTransport, TransportConfig, transport_config


@dataclass(frozen=True)
class RunConfig:
    """One run's configuration. `from_mapping` makes it; values live in `hydra_config/`, so little here has a default.

    Attributes:
        algorithm_name: registered name of the algorithm (`algorithm.name` in the mapping).
        algorithm: the instance of that algorithm's own `Config`.
        model, dataset, aggregate, cohort, personalize, monitor, probe, generate: see their classes.
        optimizer, scheduler: what every part of the model inherits; `optimizer_for` and `scheduler_for` give a part's.
        transport: how messages travel; see its classes.
        evaluations: what the rounds' tests measure beside accuracy and loss: names of `cutlayer.evaluations`.
        logger: trackers in addition to the run's own files.
        num_clients: clients in the population. frac: share of them in each round's cohort, 0 < frac <= 1.
        cohort_interval: rounds from one drawing of the cohort to the next.
        cohort_order: in which a round serves its clients: as drawn for this round, or by their numbers.
        rounds, local_epochs, batch_size: as in the papers. lr: learning rate, the default of the optimizer's.
        seed: the source of all randomness.
        device: auto, cpu, cuda or cuda:k. precision: of the arithmetic; parameters are kept in float32 under bf16 and
            tf32.
        deterministic: a GPU's kernels give the same bits each time; else each layer takes the fastest.
        memory_format: order of the values of images, feature maps and convolutions' weights in memory.
        compile: record the passes of a GPU's parts, and optimizers' steps, as graphs and replay them.
        jobs_per_gpu: jobs of sweeps that share a GPU.
        threads: of one run on the processor; auto is one for a small model, else what torch takes. Each of several
            workers computes with so many; auto divides among them what there is.
        workers: that a round's clients are divided among; auto is one for each core, or for each GPU.
        engine: what workers are: processes of this machine, or actors of a Ray cluster.
        label_smoothing: share of each target that is spread evenly over all outputs, in training.
        eval_interval: rounds from one evaluation to the next. eval_batch_size: samples per evaluation batch.
        comm_threshold_mb: stop after the round in which the payload of training passes this many MB (10^6 bytes).
        checkpoint_interval: rounds from one checkpoint to the next.
        communication_by: whose bytes are a line of communication.csv, each client's or the whole round's.
        state_memory_mb: MB of per-client state held in memory, at each of the two parties; the rest is on disk.
        save_dir: folder above all runs. resume: auto, never, or the folder of an unfinished run.
        data_changed: whether to resume a run whose data have changed since it started.
        progress: how progress is shown.
        role: which party of a run over the network this process is; None where all are in it.
        server: a client's: the server's HOST:PORT. client_id: its number.
    """

    algorithm_name: str
    algorithm: Any
    model: ModelConfig
    dataset: DatasetConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig | None
    aggregate: AggregateConfig
    personalize: PersonalizeConfig = field(metadata=scoped("after"))
    monitor: MonitorConfig = field(metadata=scoped(read_if=lambda _, method: method.evaluates_features))
    probe: ProbeConfig = field(metadata=scoped("after"))
    transport: TransportConfig = field(metadata=scoped("machine"))
    logger: tuple[LoggerConfig, ...] = field(metadata=scoped("record"))
    num_clients: int = field(metadata=scoped(read_if=lambda _, method: not method.pooled))
    frac: float = field(metadata=scoped(read_if=lambda _, method: not method.pooled))
    rounds: int
    local_epochs: int
    batch_size: int
    lr: float = field(metadata=scoped(read_if=lambda own, _: own.optimizer.get("lr") is None))
    seed: int
    device: str = field(metadata=scoped("machine", identifies=True, later=True))
    threads: int | Literal["auto"] = field(metadata=scoped("machine", later=True))
    precision: Literal["fp32", "tf32", "bf16", "fp64"]
    jobs_per_gpu: int = field(metadata=scoped("machine"))
    eval_interval: int
    eval_batch_size: int = field(metadata=scoped(later=True))
    comm_threshold_mb: float | None
    checkpoint_interval: int = field(metadata=scoped("record"))
    communication_by: Literal["client", "round"] = field(metadata=scoped("record"))
    state_memory_mb: float = field(metadata=scoped("machine", later=True))
    save_dir: Path = field(metadata=scoped("record"))
    resume: str = field(metadata=scoped("record"))
    progress: Literal["auto", "bar", "lines", "none"] = field(metadata=scoped("record", later=True))
    role: Literal["server", "client"] | None = field(default=None, metadata=scoped("machine"))
    server: str | None = field(default=None, metadata=scoped("machine"))
    client_id: int | None = field(default=None, metadata=scoped("machine"))
    workers: int | Literal["auto"] = field(default=1, metadata=scoped("machine", later=True))
    engine: Literal["processes", "ray"] = field(default="processes", metadata=scoped("machine", later=True))
    deterministic: bool = field(default=True, metadata=scoped("machine", identifies=True, later=True))
    memory_format: Literal["contiguous", "channels_last"] = field(
        default="contiguous", metadata=scoped("machine", identifies=True, later=True)
    )
    compile: bool = field(default=False, metadata=scoped("machine", identifies=True, later=True))
    data_changed: Changed = field(default="refuse", metadata=scoped("record", later=True))
    evaluations: tuple[str, ...] = ()
    cohort_interval: int = field(default=1, metadata=scoped(read_if=lambda _, method: not method.pooled))
    cohort_order: Literal["drawn", "fixed"] = field(
        default="drawn", metadata=scoped(read_if=lambda _, method: not method.pooled)
    )

    generate: GenerateConfig = field(default_factory=GenerateConfig, metadata=scoped("after"))
    label_smoothing: float = field(
        default=0.0, metadata=scoped(read_if=lambda _, method: not method.evaluates_features)
    )
    cohort: CohortConfig = field(
        default_factory=CohortConfig,
        metadata=scoped(read_if=lambda _, method: not method.pooled and not method.in_turn),
    )

    def __post_init__(self) -> None:
        counts = "num_clients rounds local_epochs batch_size eval_interval eval_batch_size checkpoint_interval"
        for key in (*counts.split(), "cohort_interval", "jobs_per_gpu"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "an integer >= 1")
        if not 0 < self.frac <= 1:
            raise ConfigError("frac", self.frac, "a number > 0 and <= 1")
        _check_lr(self.lr)
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("label_smoothing", self.label_smoothing, "a number >= 0 and < 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "an integer >= 0 and < 2^63")
        if self.comm_threshold_mb is not None and self.comm_threshold_mb <= 0:
            raise ConfigError("comm_threshold_mb", self.comm_threshold_mb, "a number > 0, or null for no threshold")
        if not self.resume.strip():
            raise ConfigError("resume", self.resume, "auto, never or the folder of an unfinished run")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError("device", self.device, "auto, cpu, cuda or cuda:<index>")
        if not self.state_memory_mb > 0:
            raise ConfigError("state_memory_mb", self.state_memory_mb, "a number > 0")
        if self.threads != "auto" and self.threads < 1:
            raise ConfigError("threads", self.threads, "auto, or an integer >= 1")
        if self.workers != "auto" and self.workers < 1:
            raise ConfigError("workers", self.workers, "auto, or an integer >= 1")
        for name in self.evaluations:
            EVALUATIONS.find(name, "evaluations")
        self.aggregate.check(self.num_clients)
        self._check_network()
        for part in ("model", *refinable()):
            where = self.scheduler_key(part)
            optimizer, scheduler = self.optimizer_for(part), self.scheduler_for(part)
            if scheduler is not None and scheduler.per == "round":
                check_schedule(optimizer, scheduler, self.rounds, where)

    def _check_network(self) -> None:
        over_network = isinstance(self.transport, GrpcTransport)
        if over_network and self.role is None:
            raise ConfigError("role", None, "server or client with transport=grpc", ("server", "client"))
        if over_network and self.workers != 1:
            raise ConfigError("workers", self.workers, "1 with transport=grpc, whose clients compute elsewhere")
        if over_network and self.engine != "processes":
            raise ConfigError("engine", self.engine, "processes with transport=grpc, whose clients compute elsewhere")
        if (over_network or self.workers != 1) and self.cohort.together != "never":
            expected = "never with transport=grpc, or with several workers, where clients compute one by one"
            raise ConfigError("cohort.together", self.cohort.together, expected)
        if not over_network and self.role is not None:
            raise ConfigError("role", self.role, "null, or transport=grpc to go with it")
        if self.role != "client":
            for key in ("server", "client_id"):
                if getattr(self, key) is not None:
                    raise ConfigError(key, getattr(self, key), "null, or role=client to go with it")
            if not self.dataset.divided and not over_network:
                expected = "one that divides one data set, or transport=grpc and clients with data of their own"
                raise ConfigError("dataset.distribution", self.dataset.distribution, expected)
            return
        if self.server is None:
            raise ConfigError("server", None, "HOST:PORT of the server")
        if not re.fullmatch(r"(\[[^\]\s]+\]|[^:\s]+):\d{1,5}", self.server):
            raise ConfigError("server", self.server, "HOST:PORT")
        if self.client_id is None or self.client_id < 0:
            raise ConfigError("client_id", self.client_id, "the client's number, an integer >= 0")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "RunConfig":
        """Build from plain containers, as composed by Hydra or given by `to_mapping`.

        Raises:
            ConfigError: unknown or missing key, wrong type, or a value that does not fit.
        """
        keys = [field.name for field in fields(cls) if field.name != "algorithm_name"]
        for key in mapping:
            if key not in keys:
                raise ConfigError.unknown_key(str(key), keys)
        values = dict(mapping)
        for key in ("algorithm", "optimizer", "logger"):
            values[key] = _mapping(mapping, key)
        _check_lr(mapping.get("lr", 1.0))  # before the optimizer, which has it too
        values["algorithm_name"] = name = values["algorithm"].pop("name", None)
        if not isinstance(name, str):
            raise ConfigError("algorithm.name", name, "the name of an algorithm")
        values["algorithm"] = algorithm_config(name, values["algorithm"])
        if "model" in mapping:
            values["model"] = ModelConfig.from_mapping(mapping["model"])
        values["optimizer"] = optimizer_config(values["optimizer"], "optimizer")
        values["scheduler"] = _scheduler(mapping.get("scheduler"), "scheduler")
        if "transport" in mapping:
            values["transport"] = transport_config(mapping["transport"], "transport")
        values["logger"] = tuple(
            logger_config({"name": name, **_mapping(values["logger"], name, "logger.")}, f"logger.{name}")
            for name in values["logger"]
        )
        return build(cls, values)

    def to_mapping(self) -> dict[str, Any]:
        """The configuration as JSON-able containers, from which `from_mapping` makes an equal one."""
        mapping = cast(dict[str, Any], plain(self))
        mapping["model"] = self.model.to_mapping()
        mapping["algorithm"] = {"name": mapping.pop("algorithm_name"), **mapping["algorithm"]}
        mapping["optimizer"] = plain(self.optimizer.to_mapping())
        mapping["scheduler"] = None if self.scheduler is None else plain(self.scheduler.to_mapping())
        mapping["logger"] = {logger.pop("name"): logger for logger in mapping["logger"]}
        return mapping

    def identity(self) -> str:
        """What distinguishes this run from others, see `keys.identity_of`; equal in every process."""
        return self._identity

    def setting(self) -> dict[str, Any]:
        """The keys that this run reads and that decide its result, dotted, with their values."""
        return setting_of(RunConfig, self.to_mapping())

    def decides(self, key: str) -> bool:
        """Whether a key or section, as named on the command line, says something of this run's result."""
        if scope_of(RunConfig, key) != "result":
            return False
        below = [each.read for name, each in self._keys.items() if f"{name}.".startswith(f"{key}.")]
        return not below or any(below)

    @cached_property
    def _identity(self) -> str:
        return identity_of(RunConfig, self.to_mapping())

    @cached_property
    def _keys(self) -> Mapping[str, ScopedKey]:
        return keys_of(RunConfig, self.to_mapping())

    @property
    def title(self) -> str:
        """What runs, short, e.g. "fsl_sage cnn2 digits-iid"."""
        return f"{self.algorithm_name} {self.model.name} {self.dataset.name}-{self.dataset.distribution}"

    @property
    def arithmetic(self) -> Arithmetic:
        """What the run's GPU kernels may do."""
        return Arithmetic(self.deterministic, self.precision == "tf32")

    def torch_device(self) -> torch.device:
        """See `resolve_device`."""
        return resolve_device(self.device)

    def optimizer_for(self, part: str) -> OptimizerConfig:
        """A part's optimizer: its refinement over the top-level one, or over one that the method gives the part.

        From one of another kind only lr and keep are inherited; see `PartConfig.not_inherited` too.
        """
        own, refinement = self._own_optimizer(part), self._refinement(part, "optimizer")
        base = own or self.optimizer
        inherited = {"name": base.name, **base.options}
        name = str(refinement.get("name", base.name)).lower()
        if name != base.name:
            inherited = {"lr": base.options.get("lr", self.lr)}
        inherited["keep"] = base.keep or self.optimizer.keep
        if own is None and part in refinable():
            instead = self.model.part(part).not_inherited
            inherited |= {key: value for key, value in instead.items() if key in optimizer_options(name)}
        return optimizer_config({**inherited, **refinement}, f"model.{part}.optimizer" if refinement else "optimizer")

    def keeps_optimizer(self, part: str) -> bool | None:
        """Whether the state of a part's optimizer outlives the round; None: neither configured nor the method's wish.

        Where it is None, it does at a server that trains the part for all clients, and nowhere else.
        """
        keep = self.optimizer_for(part).keep
        if keep is None:
            return True if part in algorithms.get(self.algorithm_name).keeps_optimizer else None
        return keep == "run"

    def scheduler_for(self, part: str) -> SchedulerConfig | None:
        """A part's learning-rate schedule, None for a constant rate; one of another kind or unit inherits nothing."""
        base = None if self._own_optimizer(part) else self.scheduler
        refinement = self._refinement(part, "scheduler")
        inherited: dict[str, Any] = {}
        if base is not None and (str(refinement.get("name", base.name)).lower(), refinement.get("per", base.per)) == (
            base.name,
            base.per,
        ):
            inherited = base.to_mapping()
        return _scheduler({**inherited, **refinement}, self.scheduler_key(part))

    def scheduler_key(self, part: str) -> str:
        """The key that says a part's schedule."""
        return f"model.{part}.scheduler" if self._refinement(part, "scheduler") else "scheduler"

    def options_for(self, part: str) -> Mapping[str, Any]:
        """What the method's own configuration says of how a part is built."""
        method = algorithms.get(self.algorithm_name)
        return method.part_options(self.algorithm).get(part, {}) if issubclass(method, ConfiguresParts) else {}

    def _own_optimizer(self, part: str) -> OptimizerConfig | None:
        method = algorithms.get(self.algorithm_name)
        return method.part_optimizers(self.algorithm).get(part) if issubclass(method, ConfiguresParts) else None

    def _refinement(self, part: str, kind: Literal["optimizer", "scheduler"]) -> dict[str, Any]:
        return getattr(self.model.part(part), kind) if part in refinable() else {}


def identity_in(folder: Path) -> str | None:
    """The identity of the run whose `config.yaml` a folder holds; None where there is none that can be read."""
    try:
        return identity_of(RunConfig, read_yaml(folder, "config.yaml"))
    except (OSError, ValueError):
        return None


def setting_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `RunConfig.setting` gives, of a configuration of any version, which need not be one that can be built."""
    return setting_of(RunConfig, values)


def _check_lr(lr: object) -> None:
    if not isinstance(lr, int | float) or isinstance(lr, bool) or not 0 < lr < float("inf"):
        raise ConfigError("lr", lr, "a finite number > 0")


def _mapping(values: Mapping[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
    """A copy of the mapping under `key`; null is an empty one."""
    if key not in values:
        raise ConfigError(prefix + key, NO_VALUE, "missing; expected a mapping of keys to values")
    value = values[key]
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(prefix + key, value, "a mapping of keys to values")
    return dict(cast(Mapping[str, Any], value or {}))


def _scheduler(values: Any, where: str) -> SchedulerConfig | None:
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(where, values, "a mapping of keys to values")
    given = cast(Mapping[str, Any], values or {})
    stray = [key for key, value in given.items() if key != "name" and value is not None]
    if stray and given.get("name") is None:
        raise ConfigError(f"{where}.{stray[0]}", given[stray[0]], f"a scheduler to go with it: set {where}.name too")
    return scheduler_config(given, where)


def resolve_device(device: str) -> torch.device:
    """The device that a run uses: auto is the current CUDA device if there is one, else the processor.

    Raises:
        ConfigError: a CUDA device that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    choices = ("auto", "cpu", *(("cuda",) if count else ()), *(f"cuda:{index}" for index in range(count)))
    if device == "cpu" or (device == "auto" and not count):
        return torch.device("cpu")
    if device not in choices:
        raise ConfigError("device", device, "a device of this machine", choices)
    return torch.device("cuda", torch.cuda.current_device() if device in ("auto", "cuda") else int(device[5:]))
