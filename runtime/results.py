"""What a run writes down: `results.json`, `config.yaml`, `env.json` and csv files.

The csv files only ever grow by whole rounds; a checkpoint keeps their lengths and the history, and a resumed run cuts
them back to these lengths. So a run that was killed at any instant and resumed leaves the same bytes as one that was
not, but for the time columns. Everything else is replaced atomically.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import yaml

from runtime.config import NO_VALUE, ConfigError
from runtime.environment import describe_environment
from runtime.files import CLIENT_ACCURACY, RESULTS, replace_file, sync_file
from runtime.loggers import Logger

log = logging.getLogger(__name__)

TrafficRow = tuple[int, str, str, str, int, int, int]
"""round, direction ("up" or "down"), kind, field, client, payload bytes, framed bytes"""

ClientRow = tuple[str, int, int, float]
"""metric, client, samples that it was measured on, accuracy as a fraction"""

_COLUMNS = {
    "metrics.csv": (
        *("round", "test_acc", "test_loss", "train_loss", "comm_load", "comm_up", "comm_down", "comm_framed"),
        *("clients", "round_trips", "time_wall", "time_client", "time_server", "time_eval"),
    ),
    "extras.csv": ("round", "name", "value"),
    "communication.csv": ("round", "direction", "kind", "field", "client", "payload_bytes", "framed_bytes"),
}
_SERIES = (
    *("test_acc", "test_loss", "train_loss", "comm_load", "comm_up", "comm_down", "comm_framed"),
    *("round_trips", "client_rounds", "time_wall", "time_client", "time_server", "time_eval"),
)
# Rewriting the whole history at each evaluated round is quadratic in their number; it may take this share of the time.
_WRITE_SHARE = 0.05


@dataclass
class RoundRecord:
    """One completed round.

    `round` counts completed rounds from 1. Accuracies are fractions; `test_*` are None in a round that was not
    evaluated. `comm_*` are cumulative payload bytes of training traffic (`comm_framed`: bytes on the wire), `time_*`
    cumulative seconds. `clients` survived the round. `round_trips` counts so far how often a client waited for the
    server, see `runtime.ledger.Ledger`; `in_turn` tells that a round's clients work one after the other. `metrics` are
    the algorithm's own, e.g. "align/error_before", `client_rows` what was measured client by client.
    """

    round: int
    test_acc: float | None
    test_loss: float | None
    train_loss: float | None
    comm_load: int
    comm_up: int
    comm_down: int
    comm_framed: int
    time_wall: float
    time_client: float
    time_server: float
    time_eval: float
    clients: int
    round_trips: int = 0
    in_turn: bool = False
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    client_rows: list[ClientRow] = field(default_factory=list[ClientRow])

    @property
    def evaluated(self) -> bool:
        """Whether the global test set was measured in this round."""
        return self.test_acc is not None

    def scalars(self) -> dict[str, float]:
        """Every figure of the round but its number, by name, the algorithm's own included; missing ones left out."""
        own = {name: getattr(self, name) for name in _COLUMNS["metrics.csv"][1:]}
        return {name: value for name, value in (self.metrics | own).items() if value is not None}


@dataclass(frozen=True)
class RunSummary:
    """A run in a few figures. Accuracies are fractions, None when nothing was evaluated; times are seconds.

    `traffic` maps direction ("up", "down") to kind to (payload bytes, framed bytes), messages that are no training
    traffic included; `comm_*` as in `RoundRecord`.
    """

    rounds: int
    final_acc: float | None
    final_loss: float | None
    best_acc: float | None
    best_round: int | None
    comm_load: int
    comm_up: int
    comm_down: int
    comm_framed: int
    time_wall: float
    time_client: float
    time_server: float
    time_eval: float
    traffic: dict[str, dict[str, tuple[int, int]]]


@dataclass
class _History:
    """Everything that `results.json` and the summary need; plain containers, so that it is a checkpoint's state too.

    `totals` holds cumulative [payload, framed] bytes by "direction/kind/field"; `traffic` the payload part of it at
    each evaluated round. `pending` holds metrics of rounds since the last evaluation, `client_rows` what that measured
    client by client.
    """

    rounds: list[int] = field(default_factory=list[int])
    series: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _SERIES})
    metrics: dict[str, list[float | None]] = field(default_factory=dict[str, list[float | None]])
    traffic: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    totals: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    pending: dict[str, float | None] = field(default_factory=dict[str, float | None])
    last: dict[str, Any] = field(default_factory=dict[str, Any])
    client_rows: list[list[Any]] = field(default_factory=list[list[Any]])

    def add(self, record: RoundRecord, traffic: Iterable[TrafficRow]) -> None:
        assert record.round > self.last.get("round", 0), f"round {record.round} after round {self.last['round']}"
        for _, direction, kind, name, _, payload, framed in traffic:
            total = self.totals.setdefault(f"{direction}/{kind}/{name}", [0, 0])
            total[0] += int(payload)
            total[1] += int(framed)
        self.pending.update({name: _finite(value) for name, value in record.metrics.items()})
        own = {name: _finite(value) for name, value in vars(record).items() if name in _SERIES}
        clients = self.last.get("client_rounds", 0) + record.clients
        self.last = {"round": record.round, "in_turn": record.in_turn, "client_rounds": clients, **own}
        if record.evaluated:
            self.client_rows = [[*names, _plain(accuracy)] for *names, accuracy in record.client_rows]
            self._evaluated()

    def _evaluated(self) -> None:
        before = len(self.rounds)
        self.rounds.append(self.last["round"])
        for name in _SERIES:
            self.series[name].append(self.last[name])
        for name in self.pending.keys() | self.metrics.keys():
            self.metrics.setdefault(name, [None] * before).append(self.pending.get(name))
        for name, total in self.totals.items():
            self.traffic.setdefault(name, [0] * before).append(total[0])
        self.pending.clear()


class Results:
    """Writer of a run's files, and the one who tells its loggers.

    Args:
        folder: the run's folder; made if it is not there.
        loggers: trackers to feed, from `build_loggers`. One that fails in mid-run is reported and left out; the run
            goes on.
    """

    def __init__(self, folder: Path, loggers: Sequence[Logger] = (), *, by_client: bool = True) -> None:
        self.folder = folder
        self._by_client = by_client
        self._loggers = list(loggers)
        self._history = _History()
        self._begun = False
        self._finished = False
        self._summary: dict[str, Any] | None = None
        self._stale = False
        self._written_at = -math.inf
        self._write_cost = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, config: Mapping[str, Any]) -> None:
        """Write `config.yaml` (resolved, plain containers) and `env.json`; start the loggers.

        In a folder that an earlier process began, `env.json` keeps that one's environment and lists this one's under
        "resumed". May be called before or after `restore`.
        """
        replace_file(self.folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        path = self.folder / "env.json"
        environment = describe_environment()
        if path.exists():
            first = json.loads(path.read_text(encoding="utf-8"))
            first.setdefault("resumed", []).append(environment)
            environment = first
        replace_file(path, json.dumps(environment, indent=2) + "\n")
        for logger in self._loggers:
            logger.start(config)

    def record(self, record: RoundRecord, traffic: Iterable[TrafficRow] = ()) -> None:
        """Append one round to the csv files, tell the loggers, and bring `results.json` up to date if evaluated.

        Args:
            record: the round's figures; rounds must come in rising order.
            traffic: the round's lines of the ledger.
        """
        traffic = list(traffic)
        self._begin()
        self._history.add(record, traffic)
        self._append("metrics.csv", [[_plain(getattr(record, name)) for name in _COLUMNS["metrics.csv"]]])
        self._append("extras.csv", [[record.round, name, float(value)] for name, value in record.metrics.items()])
        self._append("communication.csv", traffic if self._by_client else _over_clients(traffic))
        self._stale |= record.evaluated
        if self._stale and time.monotonic() - self._written_at >= self._write_cost / _WRITE_SHARE:
            self._write_results()
        self._tell(record)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep: the history and the lengths in bytes of the csv files, which are synced first.

        The result is made of plain JSON types and shares nothing with this object.
        """
        offsets: dict[str, int] = {}
        self._begin()
        for name in _COLUMNS:
            sync_file(self.folder / name)
            offsets[name] = (self.folder / name).stat().st_size
        if self._stale:
            self._write_results()
        history = {each.name: getattr(self._history, each.name) for each in fields(_History)}
        return {"offsets": offsets, "history": copy.deepcopy(history)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a `state()`: cut the csv files back to it and take up its history.

        Raises:
            ConfigError: a csv file is missing or shorter than it was at the checkpoint.
        """
        for name, offset in state["offsets"].items():
            path = self.folder / name
            size = path.stat().st_size if path.exists() else -1
            if size < offset:
                found = "is missing" if size < 0 else f"has {size} bytes"
                reason = f"cannot resume: {path} {found}, the checkpoint was made when it had {offset}"
                raise ConfigError("resume", NO_VALUE, reason)
        for name, offset in state["offsets"].items():
            os.truncate(self.folder / name, offset)
            sync_file(self.folder / name)
        self._begun = True
        self._history = _History(**copy.deepcopy(dict(state["history"])))
        self._write_results()

    def finish(self, summary: Mapping[str, Any] | None = None) -> RunSummary:
        """Mark the run as finished in `results.json`, sync the files, close the loggers.

        Args:
            summary: plain figures of the caller's own to keep in `results.json` under "summary".
        """
        self.state()
        self._finished = True
        self._summary = None if summary is None else dict(summary)
        self._write_results()
        self._finish_loggers()
        return self.summary()

    def close(self) -> None:
        """Write what is pending and close the loggers; for an interrupted run, which can be resumed later."""
        if self._stale:
            self._write_results()
        self._finish_loggers()

    def summary(self) -> RunSummary:
        """The run so far in a few figures."""
        history, last = self._history, self._history.last
        accuracies = history.series["test_acc"]
        known = [(acc, -number) for acc, number in zip(accuracies, history.rounds, strict=True) if acc is not None]
        best, best_round = max(known, default=(None, 0))
        traffic: dict[str, dict[str, tuple[int, int]]] = {}
        for key, (payload, framed) in history.totals.items():
            direction, kind, _ = key.split("/", 2)
            kinds = traffic.setdefault(direction, {})
            earlier = kinds.get(kind, (0, 0))
            kinds[kind] = (earlier[0] + payload, earlier[1] + framed)
        sums = {name: last.get(name, 0) for name in _SERIES if name.startswith(("comm_", "time_"))}
        return RunSummary(
            rounds=last.get("round", 0),
            final_acc=accuracies[-1] if accuracies else None,
            final_loss=history.series["test_loss"][-1] if accuracies else None,
            best_acc=best,
            best_round=None if best is None else -best_round,
            traffic=traffic,
            **sums,
        )

    def results(self) -> dict[str, Any]:
        """The content of `results.json`.

        Lists of equal length with one entry per evaluated round: "rounds", "test_acc", "test_loss", "train_loss",
        cumulative payload bytes "comm_load", "comm_up", "comm_down" (and "comm_framed"), cumulative seconds "time_*".
        "metrics" maps each further name to such a list, with the last value since the evaluation before, or null;
        "traffic" maps "direction/kind/field" to cumulative payload bytes. A figure that is not finite is null.
        Cumulative too: "round_trips" as in `RoundRecord`, and "client_rounds", clients that finished a round. "in_turn"
        is a single bool.
        """
        history = self._history
        content: dict[str, Any] = {"rounds": history.rounds, **history.series}
        content["metrics"] = dict(sorted(history.metrics.items()))
        content["traffic"] = dict(sorted(history.traffic.items()))
        content["in_turn"] = bool(history.last.get("in_turn"))
        if self._summary is not None:
            content["summary"] = self._summary
        return {**content, "finished": self._finished}

    def _begin(self) -> None:
        """Begin the csv files anew, unless `restore` took them up or this object wrote them."""
        if not self._begun:
            self._begun = True
            for name, columns in _COLUMNS.items():
                (self.folder / name).write_bytes(b"")
                self._append(name, [columns])

    def _append(self, name: str, rows: Iterable[Sequence[Any]]) -> None:
        text = _csv_text(rows)
        if text:
            # Opened each time: three files a round cost little, and an interrupted run leaves none open.
            with (self.folder / name).open("ab") as file:
                file.write(text.encode())

    def _write_results(self) -> None:
        began = time.monotonic()
        path = self.folder / CLIENT_ACCURACY
        if self._history.client_rows:
            replace_file(path, _csv_text([("metric", "client", "samples", "accuracy"), *self._history.client_rows]))
        else:
            path.unlink(missing_ok=True)  # of a round after the checkpoint that the run went back to
        replace_file(self.folder / RESULTS, _one_line_a_list(self.results()))
        self._written_at = time.monotonic()
        self._write_cost = self._written_at - began
        self._stale = False

    def _finish_loggers(self) -> None:
        for logger in self._loggers:
            try:
                logger.finish()
            except Exception as error:  # as in `_tell`: the run's own files are complete
                log.warning("logger %s failed at the end: %s", logger.config.name, error)

    def _tell(self, record: RoundRecord) -> None:
        for logger in list(self._loggers):
            try:
                logger.log(record)
            except Exception as error:  # a tracker that breaks must not cost hours of training
                log.warning("logger %s failed in round %d and is left out: %s", logger.config.name, record.round, error)
                self._loggers.remove(logger)


def _over_clients(traffic: Iterable[TrafficRow]) -> list[tuple[Any, ...]]:
    """The lines summed over clients, whose column stays empty."""
    sums: dict[tuple[int, str, str, str], list[int]] = {}
    for *key, _, payload, framed in traffic:
        found = sums.setdefault(cast(tuple[int, str, str, str], tuple(key)), [0, 0])
        found[0] += payload
        found[1] += framed
    return [(*key, "", *bytes) for key, bytes in sums.items()]


def _csv_text(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _finite(value: Any) -> Any:
    """A plain number; None for none and for what JSON cannot hold (NaN, infinity)."""
    value = _plain(value)
    return None if value is None or not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """Numbers of numpy or torch as Python's own, so that they are written alike."""
    return value if value is None or type(value) in (int, float) else value.item() if hasattr(value, "item") else value


def _one_line_a_list(content: Mapping[str, Any], indent: str = "") -> str:
    """JSON with every list on one line: short to read, quick to write, stable to compare."""
    inner = indent + "  "
    lines: list[str] = []
    for key, value in content.items():
        nested = isinstance(value, Mapping) and len(cast(Mapping[str, Any], value)) > 0
        text = _one_line_a_list(cast(Mapping[str, Any], value), inner) if nested else json.dumps(value, allow_nan=False)
        lines.append(f"{inner}{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n" + indent + "}" + ("\n" if not indent else "")
