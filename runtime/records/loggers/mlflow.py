"""MLflow."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cutlayer.runtime.ground.config import join
from cutlayer.runtime.records.loggers import Logger, LoggerConfig, register

if TYPE_CHECKING:
    from cutlayer.runtime.records.history import RoundRecord


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
        for key, value in flat_config(config).items():
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


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as dotted keys to text, lists written as JSON."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = join(prefix, str(key))
        if isinstance(value, Mapping) and value:
            flat.update(flat_config(cast(Mapping[str, Any], value), name))
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def mlflow_key(name: str) -> str:
    """A metric's name with whatever MLflow does not allow in one replaced by an underscore."""
    return "".join(char if char.isalnum() or char in "_-./ " else "_" for char in name)
