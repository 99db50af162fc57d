"""Trackers that follow a run beside its own files: TensorBoard, MLflow and Weights & Biases.

Chosen by `logger=`; each one's configuration is the frozen dataclass `Config` inside its class. Their packages are
imported only when one is used. As configured by default nothing contacts a network: every tracker writes below the
run's folder, and usage reports of the packages themselves are switched off.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError, build, join

if TYPE_CHECKING:
    from cutlayer.runtime.records.history import RoundRecord


@dataclass(frozen=True)
class LoggerConfig:
    """What every logger's configuration has: the name under which it is registered."""

    name: str


class Logger:
    """Base and contract of a logger. It sees every round, and must not change what the run computes.

    Args:
        config: the logger's own configuration.
        folder: the run's folder; the logger writes below it.
        resumed: whether the run continues an earlier one in this folder, whose records must be continued too.
    """

    Config: ClassVar[type[LoggerConfig]] = LoggerConfig
    packages: ClassVar[tuple[str, ...]] = ()
    """Top-level modules that must be importable."""

    def __init__(self, config: Any, folder: Path, resumed: bool) -> None:
        self.config = config
        self.folder = folder
        self.resumed = resumed

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin with the run's resolved configuration (plain containers)."""

    def log(self, record: RoundRecord) -> None:
        """Take one completed round. After a resume, rounds that were seen before may come again."""

    def finish(self) -> None:
        """The run is over or interrupted: write what is pending."""


LOGGERS: dict[str, type[Logger]] = {}
L = TypeVar("L", bound=type[Logger])


def register(name: str) -> Callable[[L], L]:
    """Make a logger available as `logger=<name>`."""

    def decorate(cls: L) -> L:
        if name in LOGGERS:
            raise ValueError(f"logger {name!r} is registered twice")
        LOGGERS[name] = cls
        return cls

    return decorate


def logger_config(values: Mapping[str, Any], where: str = "logger") -> LoggerConfig:
    """The typed configuration of one logger from a mapping that holds `name` and the logger's own keys.

    Raises:
        ConfigError: unknown name, unknown key or wrong value.
    """
    name = values.get("name", NO_VALUE)
    if not isinstance(name, str) or name not in LOGGERS:
        raise ConfigError(join(where, "name"), name, "a logger", LOGGERS)
    return build(LOGGERS[name].Config, values, where)


def check_loggers(configs: Iterable[LoggerConfig]) -> None:
    """Raise ConfigError, naming the command that helps, when a chosen logger's package is not installed.

    Imports nothing and writes nothing, so that it can run before a run's folder is made.
    """
    for config in configs:
        for package in LOGGERS[config.name].packages:
            if importlib.util.find_spec(package) is None:
                advice = f'an installed tracker; {package} is missing: pip install -e ".[{config.name}]"'
                raise ConfigError("logger", config.name, advice)


def build_loggers(configs: Sequence[LoggerConfig], folder: Path, resumed: bool = False) -> list[Logger]:
    """The loggers for `configs`, in order; see `check_loggers` for the error."""
    check_loggers(configs)
    return [LOGGERS[config.name](config, folder, resumed) for config in configs]


@register("csv")
class CsvLogger(Logger):
    """The run's own files (`metrics.csv`, `results.json`, ...). `Results` always writes them; this adds nothing."""

    @dataclass(frozen=True)
    class Config(LoggerConfig):
        name: str = "csv"


@register("tensorboard")
class TensorboardLogger(Logger):
    """Scalars by round, and the configuration as text, in `<run>/tensorboard`."""

    packages = ("tensorboard",)

    @dataclass(frozen=True)
    class Config(LoggerConfig):
        """`flush_seconds`: how often pending events reach the disk."""

        name: str = "tensorboard"
        flush_seconds: int = 30

        def __post_init__(self) -> None:
            if self.flush_seconds < 1:
                raise ConfigError("flush_seconds", self.flush_seconds, "an integer >= 1")

    _writer: Any = None
    _text: str = ""

    def start(self, config: Mapping[str, Any]) -> None:
        self._text = json.dumps(config, indent=2, default=str)

    def log(self, record: RoundRecord) -> None:
        writer = self._writer if self._writer is not None else self._open(record.round)
        for name, value in record.scalars().items():
            writer.add_scalar(name, value, global_step=record.round)

    def _open(self, first: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # Opened only now: `purge_step` makes TensorBoard drop what a killed run wrote past its last checkpoint.
        self._writer = SummaryWriter(
            str(self.folder / "tensorboard"),
            purge_step=first if self.resumed else None,
            flush_secs=self.config.flush_seconds,
        )
        if not self.resumed:
            indented = "\n".join("    " + line for line in self._text.splitlines())
            self._writer.add_text("config", indented, global_step=0)
        return self._writer

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@register("mlflow")
class MlflowLogger(Logger):
    """An MLflow run in an SQLite store, `<run>/mlflow/mlflow.db` unless `tracking_uri` names another.

    See it with `mlflow ui --backend-store-uri sqlite:///<run>/mlflow/mlflow.db`.
    """

    packages = ("mlflow", "sqlalchemy", "alembic")

    @dataclass(frozen=True)
    class Config(LoggerConfig):
        """`tracking_uri`: an MLflow store for many runs, e.g. sqlite:///mlflow.db or a server; null: the run's own."""

        name: str = "mlflow"
        experiment: str = "cutlayer"
        tracking_uri: str | None = None

    _client: Any = None
    _run_id: str = ""
    _last: int = 0

    def start(self, config: Mapping[str, Any]) -> None:
        # Read by mlflow when it is imported; it reports usage to its makers otherwise.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        tracking: Any = importlib.import_module("mlflow.tracking")
        home = (self.folder / "mlflow").resolve()
        home.mkdir(parents=True, exist_ok=True)
        self._client = tracking.MlflowClient(self.config.tracking_uri or f"sqlite:///{home / 'mlflow.db'}")
        note = home / "run_id"
        if self.resumed and note.exists():
            self._run_id = note.read_text().strip()
            self._last = self._last_round()
            return
        run: Any = self._client.create_run(self._experiment(home), run_name=self.folder.name)
        self._run_id = run.info.run_id
        note.write_text(self._run_id)
        for key, value in flatten(config).items():
            self._client.log_param(self._run_id, key, value)

    def _experiment(self, home: Path) -> str:
        found = self._client.get_experiment_by_name(self.config.experiment)
        if found is not None:
            return found.experiment_id
        local = None if self.config.tracking_uri else (home / "artifacts").as_uri()
        return self._client.create_experiment(self.config.experiment, artifact_location=local)

    def _last_round(self) -> int:
        # A resumed run repeats the rounds after its checkpoint exactly; MLflow would keep both copies.
        return max((point.step for point in self._client.get_metric_history(self._run_id, "comm_load")), default=0)

    def log(self, record: RoundRecord) -> None:
        if record.round <= self._last:
            return
        entities: Any = importlib.import_module("mlflow.entities")
        now = int(time.time() * 1000)
        points = [
            entities.Metric(mlflow_key(name), value, now, record.round) for name, value in record.scalars().items()
        ]
        self._client.log_batch(self._run_id, metrics=points)

    def finish(self) -> None:
        if self._client is not None:
            self._client.set_terminated(self._run_id)
            self._client = None


@register("wandb")
class WandbLogger(Logger):
    """A Weights & Biases run, offline by default: files in `<run>/wandb`, uploaded only by `wandb sync` by hand.

    A resumed offline run makes a second folder with the same run id; `wandb sync --append` joins them.
    """

    packages = ("wandb",)

    @dataclass(frozen=True)
    class Config(LoggerConfig):
        """`mode`: offline, or online (needs a login of yours); `group` and `tags` sort runs."""

        name: str = "wandb"
        project: str = "cutlayer"
        mode: Literal["offline", "online"] = "offline"
        group: str | None = None
        tags: tuple[str, ...] = ()

    _run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb: Any = importlib.import_module("wandb")
        note = self.folder / "wandb" / "run_id"
        note.parent.mkdir(parents=True, exist_ok=True)
        if not (self.resumed and note.exists()):
            note.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=self.config.project,
            mode=self.config.mode,
            group=self.config.group,
            tags=list(self.config.tags),
            name=self.folder.name,
            dir=str(self.folder),
            id=note.read_text().strip(),
            resume="allow" if self.config.mode == "online" else None,
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )

    def log(self, record: RoundRecord) -> None:
        self._run.log(record.scalars(), step=record.round)

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as dotted keys to text, lists written as JSON."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = join(prefix, str(key))
        if isinstance(value, Mapping) and value:
            flat.update(flatten(cast(Mapping[str, Any], value), name))
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def mlflow_key(name: str) -> str:
    """A metric's name with whatever MLflow does not allow in one replaced by an underscore."""
    return "".join(char if char.isalnum() or char in "_-./ " else "_" for char in name)
