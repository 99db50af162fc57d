"""Loggers write what they are told, continue after a resume, and say in one line what is missing."""

import json
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from cutlayer.runtime.ground.config import ConfigError, plain
from cutlayer.runtime.records import loggers
from cutlayer.runtime.records.loggers import LOGGERS, build_loggers, check_loggers, logger_config
from cutlayer.runtime.records.loggers.mlflow import flat_config, mlflow_key
from cutlayer.runtime.records.results import RoundRecord

CONFIG = {"lr": 0.1, "dataset": {"name": "digits", "options": {}}, "tags": ["a"], "init": None}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach another machine, which fails."""
    tried: list[Any] = []
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        if not local:
            tried.append(address)
            raise OSError(f"no network in this test: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    return tried


def record(number: int, accuracy: float | None = 0.5) -> RoundRecord:
    return RoundRecord(
        *(number, accuracy, None, 1.5, 30 * number, 20, 10, 40),
        *(1.0, 0.5, 0.25, 0.125),
        2,
        metrics={"align/error": 0.25 * number},
    )


def run(name: str, folder: Path, rounds: range, resumed: bool, **keys: Any) -> None:
    (logger,) = build_loggers([logger_config({"name": name, **keys})], folder, resumed)
    logger.start(CONFIG)
    for number in rounds:
        logger.log(record(number))
    logger.finish()


def test_record_scalars_leave_out_what_is_missing() -> None:
    scalars = record(3, accuracy=None).scalars()
    assert "test_acc" not in scalars
    assert "round" not in scalars
    assert scalars["align/error"] == 0.75
    assert scalars["comm_load"] == 90


def test_what_a_client_calls_a_metric_does_not_replace_a_figure_of_the_run() -> None:
    for accuracy in (0.5, None):
        reported = record(3, accuracy)
        reported.metrics.update(test_acc=1.0, comm_load=0.0)
        assert reported.scalars() == record(3, accuracy).scalars()


@pytest.mark.parametrize("name", sorted(LOGGERS))
def test_every_config_goes_round_through_plain_values(name: str) -> None:
    config = logger_config({"name": name})
    assert config.name == name
    assert logger_config(plain(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "tensorbord"}, "logger.name=tensorbord: expected a logger; did you mean tensorboard?"),
        ({}, "logger.name: a logger"),
        ({"name": "wandb", "projct": "x"}, "logger.projct: no such key; did you mean logger.project?"),
        ({"name": "wandb", "mode": "cloud"}, "logger.mode=cloud: expected one of the choices"),
        ({"name": "tensorboard", "flush_seconds": 0}, "logger.flush_seconds=0: expected an integer >= 1"),
    ],
)
def test_mistakes_are_reported_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        logger_config(values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_named_with_its_cure(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda _: None)
    check_loggers([logger_config({"name": "csv"})])
    with pytest.raises(ConfigError) as caught:
        build_loggers([logger_config({"name": name})], tmp_path)
    assert f'pip install -e ".[{name}]"' in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_names_for_trackers() -> None:
    assert flat_config(CONFIG) == {
        "lr": "0.1",
        "dataset.name": "digits",
        "dataset.options": "{}",
        "tags": '["a"]',
        "init": "null",
    }
    assert mlflow_key("align/error (a=0.1)") == "align/error _a_0.1_"


def test_csv_adds_no_files(tmp_path: Path) -> None:
    run("csv", tmp_path, range(1, 3), False)
    assert not list(tmp_path.iterdir())


def read_tensorboard(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_continues_after_a_resume(tmp_path: Path, no_network: list[Any]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run("tensorboard", tmp_path, range(1, 6), False)  # killed in round 5, the last checkpoint after round 3
    run("tensorboard", tmp_path, range(4, 8), True)
    assert read_tensorboard(tmp_path, "comm_load") == [(number, 30.0 * number) for number in range(1, 8)]
    assert read_tensorboard(tmp_path, "align/error")[-1] == (7, 1.75)
    assert no_network == []


@pytest.mark.filterwarnings("default")  # the package warns about its own dependencies
def test_mlflow_continues_one_run(tmp_path: Path, no_network: list[Any]) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    run("mlflow", tmp_path, range(1, 6), False)
    run("mlflow", tmp_path, range(4, 8), True)
    with sqlite3.connect(tmp_path / "mlflow" / "mlflow.db") as store:
        points = store.execute("select step, value from metrics where key = 'comm_load' order by step").fetchall()
        runs = store.execute("select status from runs").fetchall()
        params = dict(store.execute("select key, value from params").fetchall())
    store.close()
    assert points == [(number, 30.0 * number) for number in range(1, 8)]
    assert runs == [("FINISHED",)]
    assert params["dataset.name"] == "digits"
    assert no_network == []


@pytest.mark.filterwarnings("default")
def test_wandb_stays_offline(tmp_path: Path, no_network: list[Any]) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    run("wandb", tmp_path, range(1, 4), False)
    run("wandb", tmp_path, range(3, 5), True)
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1  # both under the same run id
    assert no_network == []
    assert json.dumps(CONFIG)  # the configuration was not changed
