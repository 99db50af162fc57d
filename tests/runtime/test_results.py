"""The files of a run: their content against closed forms, and their bytes after a kill and a resume."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.units import byte_unit, format_bytes
from cutlayer.runtime.records.environment import describe_environment, git_revision
from cutlayer.runtime.records.loggers import Logger, LoggerConfig
from cutlayer.runtime.records.results import Results, RoundRecord, TrafficRow

TIMES = ("time_wall", "time_client", "time_server", "time_eval")
FILES = ("results.json", "metrics.csv", "extras.csv", "communication.csv")


def make_record(
    number: int, *, every: int = 1, clock: float = 1.0, metrics: dict[str, float] | None = None
) -> RoundRecord:
    evaluated = number % every == 0
    return RoundRecord(
        round=number,
        test_acc=1 - 1 / (number + 1) if evaluated else None,
        test_loss=1 / number if evaluated else None,
        train_loss=2 / number,
        comm_load=30 * number,
        comm_up=20 * number,
        comm_down=10 * number,
        comm_framed=40 * number,
        time_wall=clock * number,
        time_client=clock * number / 2,
        time_server=clock * number / 4,
        time_eval=clock * number / 8,
        clients=2,
        round_trips=5 * number,
        in_turn=number > 3,
        client_rows=[("local_acc", client, 7, 1 / (number + client)) for client in range(2)] if evaluated else [],
        metrics={"align/error": 1 / number} if metrics is None and number % 3 == 0 else metrics or {},
    )


def make_traffic(number: int) -> list[TrafficRow]:
    lines: list[TrafficRow] = [(number, "up", "smashed", "z", client, 9, 12) for client in range(2)]
    lines += [(number, "up", "smashed", "y", 0, 2, 4), (number, "down", "model", "client", 0, 10, 12)]
    if number > 4:
        lines.append((number, "up", "metrics", "loss", 1, 8, 8))
    return lines


def run(results: Results, first: int, last: int, every: int = 1, clock: float = 1.0) -> None:
    for number in range(first, last + 1):
        results.record(make_record(number, every=every, clock=clock), make_traffic(number))


def without_times(folder: Path) -> dict[str, bytes]:
    content = {name: (folder / name).read_bytes() for name in FILES}
    table = folder / "client_accuracy.csv"
    content[table.name] = table.read_bytes() if table.exists() else b""
    lines = content["results.json"].splitlines(keepends=True)
    content["results.json"] = b"".join(line for line in lines if not line.strip().startswith(b'"time_'))
    content["metrics.csv"] = b"\n".join(
        line.rsplit(b",", len(TIMES))[0] for line in content["metrics.csv"].splitlines()
    )
    return content


def test_results_json_has_one_entry_per_evaluated_round(tmp_path: Path) -> None:
    results = Results(tmp_path)
    run(results, 1, 6, every=2)
    results.finish({"seconds": 3})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["rounds"] == [2, 4, 6]
    assert found["test_acc"] == [1 - 1 / 3, 1 - 1 / 5, 1 - 1 / 7]
    assert found["test_loss"] == [1 / 2, 1 / 4, 1 / 6]
    assert found["comm_load"] == [60, 120, 180]
    assert found["comm_up"] == [40, 80, 120]
    assert found["time_client"] == [1.0, 2.0, 3.0]
    assert found["round_trips"] == [10, 20, 30]
    assert found["client_rounds"] == [4, 8, 12]
    assert found["in_turn"] is True
    # Reported in rounds 3 and 6: the value of round 3 shows at the evaluation after it.
    assert found["metrics"] == {"align/error": [None, 1 / 3, 1 / 6]}
    assert found["traffic"]["up/smashed/z"] == [36, 72, 108]
    assert found["traffic"]["up/metrics/loss"] == [0, 0, 16]
    assert found["summary"] == {"seconds": 3}
    assert found["finished"] is True
    series = [*TIMES, "rounds", "test_acc", "test_loss", "train_loss", "comm_load", "comm_up", "comm_down"]
    assert {len(found[name]) for name in series} == {3}


def test_the_last_measurement_of_each_client_is_a_table(tmp_path: Path) -> None:
    results = Results(tmp_path)
    path = tmp_path / "client_accuracy.csv"
    record = make_record(1)
    record.client_rows = []
    results.record(record)
    results.state()
    assert not path.exists()
    run(results, 2, 4, every=2)
    results.close()
    table = pd.read_csv(path)
    expected = {"metric": ["local_acc"] * 2, "client": [0, 1], "samples": [7, 7], "accuracy": [1 / 4, 1 / 5]}
    assert table.to_dict("list") == expected


def test_going_back_takes_later_measurements_of_clients_away(tmp_path: Path) -> None:
    results = Results(tmp_path)
    run(results, 1, 1, every=2)
    state = results.state()
    run(results, 2, 2, every=2)
    results.close()
    assert (tmp_path / "client_accuracy.csv").exists()
    Results(tmp_path).restore(state)
    assert not (tmp_path / "client_accuracy.csv").exists()


def test_csv_files_are_plain_tables(tmp_path: Path) -> None:
    results = Results(tmp_path)
    run(results, 1, 6, every=2)
    results.finish()
    metrics = pd.read_csv(tmp_path / "metrics.csv")
    assert list(metrics["round"]) == [1, 2, 3, 4, 5, 6]
    assert metrics["test_acc"].isna().tolist() == [True, False] * 3
    assert metrics["test_acc"][5] == 1 - 1 / 7
    assert metrics["round_trips"].tolist() == [5, 10, 15, 20, 25, 30]
    assert tuple(metrics.columns[-4:]) == TIMES
    extras = pd.read_csv(tmp_path / "extras.csv")
    assert extras.to_dict("list") == {"round": [3, 6], "name": ["align/error"] * 2, "value": [1 / 3, 1 / 6]}
    traffic = pd.read_csv(tmp_path / "communication.csv")
    assert list(traffic.columns) == ["round", "direction", "kind", "field", "client", "payload_bytes", "framed_bytes"]
    training = traffic[traffic["kind"] != "metrics"]
    by_round = training.groupby("round")["payload_bytes"].sum().cumsum()
    assert by_round.tolist() == metrics["comm_load"].tolist()
    expected = 6 * (18 + 2) + 2 * 8
    assert traffic[traffic["direction"] == "up"]["payload_bytes"].sum() == expected


def test_bytes_may_be_summed_over_clients(tmp_path: Path) -> None:
    results = Results(tmp_path, by_client=False)
    lines = [(1, "up", "smashed", "z", client, 10 + client, 20) for client in range(3)]
    results.record(make_record(1), [*lines, (1, "down", "model", "w", 2, 7, 8)])
    results.record(make_record(2), [(2, "up", "smashed", "z", 1, 5, 6)])
    results.close()
    traffic = pd.read_csv(tmp_path / "communication.csv")
    assert traffic["client"].isna().all()
    found = traffic[["round", "direction", "payload_bytes", "framed_bytes"]].to_numpy().tolist()
    assert found == [[1, "up", 33, 60], [1, "down", 7, 8], [2, "up", 5, 6]]
    each = json.loads((tmp_path / "results.json").read_text())["traffic"]
    assert {name: values[-1] for name, values in each.items()} == {"up/smashed/z": 38, "down/model/w": 7}


def test_odd_names_and_figures_stay_valid(tmp_path: Path) -> None:
    results = Results(tmp_path)
    record = make_record(1, metrics={'acc, "own"': float("nan"), "größe": np.float32(0.5)})  # pyright: ignore
    record.test_loss = math.inf
    results.record(record, [(1, "up", "a,b", "c", 0, 1, 1)])
    results.state()
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["test_loss"] == [None]
    assert found["metrics"] == {'acc, "own"': [None], "größe": [0.5]}
    with (tmp_path / "extras.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[1:] == [["1", 'acc, "own"', "nan"], ["1", "größe", "0.5"]]
    with (tmp_path / "communication.csv").open(newline="") as file:
        assert list(csv.reader(file))[1][2] == "a,b"


@settings(max_examples=25, deadline=None)
@given(
    total=st.integers(2, 14),
    saved=st.integers(0, 13),
    lost=st.integers(0, 6),
    torn=st.integers(0, 40),
    every=st.integers(1, 4),
    start_first=st.booleans(),
)
def test_killed_and_resumed_equals_undisturbed(
    tmp_path_factory: pytest.TempPathFactory,
    total: int,
    saved: int,
    lost: int,
    torn: int,
    every: int,
    start_first: bool,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    saved = min(saved, total - 1)
    calm = Results(folder / "calm")
    run(calm, 1, total, every)
    calm.finish()

    killed = Results(folder / "killed")
    run(killed, 1, saved, every, clock=2.0)
    state = json.loads(json.dumps(killed.state()))
    run(killed, saved + 1, min(total, saved + lost), every, clock=2.0)
    for name in FILES[1:]:  # a kill may leave half a line
        with (folder / "killed" / name).open("ab") as file:
            file.write(b"99,up,z\n\xff"[:torn] * 3)

    resumed = Results(folder / "killed")
    if start_first:
        resumed.start({"lr": 0.1})
    resumed.restore(state)
    if not start_first:
        resumed.start({"lr": 0.1})
    run(resumed, saved + 1, total, every, clock=3.0)
    # What the checkpoint holds is not touched by the run that was built from it.
    assert state == json.loads(json.dumps(state))
    summary = resumed.finish()
    assert without_times(folder / "killed") == without_times(folder / "calm")
    assert summary.rounds == total
    assert summary.traffic == calm.summary().traffic
    assert summary.time_wall == 3.0 * total
    shutil.rmtree(folder)


def test_every_instant_of_a_run_shows_whole_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path)
    run(results, 1, 2)
    results.close()
    before = (tmp_path / "results.json").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    run(results, 3, 3)
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        results.finish()
    left = (tmp_path / "results.json").read_bytes()
    assert json.loads(left)["rounds"] in ([1, 2], [1, 2, 3])
    assert left.startswith(before[:20])


def test_state_shares_nothing_with_the_run(tmp_path: Path) -> None:
    results = Results(tmp_path)
    run(results, 1, 3)
    state = results.state()
    copy = json.loads(json.dumps(state))
    run(results, 4, 6)
    assert state == copy
    results.restore(state)
    run(results, 4, 6)
    assert state == copy


def test_restore_names_a_file_that_is_too_short(tmp_path: Path) -> None:
    results = Results(tmp_path)
    run(results, 1, 3)
    state = results.state()
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-1])
    before = (tmp_path / "communication.csv").read_bytes()
    with pytest.raises(ConfigError, match=r"metrics\.csv has \d+ bytes"):
        Results(tmp_path).restore(state)
    path.unlink()
    with pytest.raises(ConfigError, match=r"metrics\.csv is missing"):
        Results(tmp_path).restore(state)
    assert (tmp_path / "communication.csv").read_bytes() == before


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    run(Results(tmp_path / "a"), 1, 3)
    again = Results(tmp_path / "a")
    again.start({})
    run(again, 1, 2)
    again.finish()
    calm = Results(tmp_path / "b")
    run(calm, 1, 2)
    calm.finish()
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")


def test_rounds_must_rise(tmp_path: Path) -> None:
    results = Results(tmp_path)
    run(results, 1, 2)
    with pytest.raises(AssertionError, match="round 2 after round 2"):
        results.record(make_record(2))


def test_summary_of_a_run(tmp_path: Path) -> None:
    results = Results(tmp_path)
    empty = results.summary()
    assert (empty.rounds, empty.final_acc, empty.best_acc, empty.best_round, empty.traffic) == (0, None, None, None, {})
    for number, accuracy in enumerate([0.5, 0.9, 0.9, None, 0.7, None], start=1):
        record = make_record(number)
        record.test_acc = accuracy
        results.record(record, make_traffic(number))
    summary = results.finish()
    assert (summary.final_acc, summary.best_acc, summary.best_round) == (0.7, 0.9, 2)
    assert (summary.rounds, summary.comm_load) == (6, 180)
    assert summary.traffic == {"up": {"smashed": (120, 168), "metrics": (16, 16)}, "down": {"model": (60, 72)}}


def test_start_writes_config_and_environment(tmp_path: Path) -> None:
    config = {"lr": 1e-5, "dataset": {"name": "digits", "alpha": 0.1}, "logger": [{"name": "csv"}], "resume": None}
    Results(tmp_path).start(config)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config
    first = json.loads((tmp_path / "env.json").read_text())
    Results(tmp_path).start(config)
    second = json.loads((tmp_path / "env.json").read_text())
    assert len(second.pop("resumed")) == 1
    assert second == first


def test_environment_is_this_machine_and_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("API_TOKEN", "hush-hush")
    found = describe_environment()
    assert found["packages"]["numpy"] == np.__version__
    assert found["cpu"]["cores"] >= 1
    assert found["memory_bytes"] > 2**28
    assert found["command"]
    assert "hush-hush" not in json.dumps(found)
    assert git_revision(tmp_path) == (None, None)


def test_a_logger_that_breaks_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    class Broken(Logger):
        def log(self, record: RoundRecord) -> None:
            seen.append(record.round)
            if record.round == 2:
                raise OSError("disk full")

    class Late(Logger):
        def finish(self) -> None:
            raise OSError("store locked")

    broken, late = (cls(LoggerConfig(cls.__name__.lower()), tmp_path, False) for cls in (Broken, Late))
    results = Results(tmp_path, [broken, late])
    run(results, 1, 4)
    assert results.finish().rounds == 4
    assert "logger late failed at the end: store locked" in caplog.text
    assert seen == [1, 2]
    assert "logger broken failed in round 2 and is left out: disk full" in caplog.text


def test_many_clients_over_many_rounds_lose_no_line(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for number in range(1, 201):
        lines = [
            (number, way, kind, name, client, 1234567, 1234600)
            for way, kind, name in [("down", "model", "client"), ("up", "model", "client"), ("up", "smashed", "z")]
            for client in range(100)
        ]
        results.record(make_record(number), lines)
    results.finish()
    assert (tmp_path / "communication.csv").read_bytes().count(b"\n") == 60_001


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_200_000_000, "12.2 GB"),
        (81_310_000, "81.3 MB"),
        (2.5e15, "2.50 PB"),
    ],
)
def test_bytes_in_words(count: float, text: str) -> None:
    assert format_bytes(count) == text
    assert text.endswith(byte_unit(count)[1])
