"""What a run writes down: `results.json`, `config.yaml`, `env.json` and csv files.

The csv files and `history.jsonl`, of which `results.json` is made, only ever grow by whole rounds; a checkpoint keeps
their lengths and sums, and a resumed run cuts them back to these lengths. So a run that was killed at any instant and
resumed leaves the same bytes as one that was not, but for the time columns. Everything else is replaced atomically.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import yaml

from cutlayer.runtime.ground.config import build
from cutlayer.runtime.ground.files import CLIENT_ACCURACY, RESULTS, DamagedError, Mark, replace_file
from cutlayer.runtime.ground.growing import GrowingFile
from cutlayer.runtime.ground.text import csv_text
from cutlayer.runtime.records.environment import describe_environment
from cutlayer.runtime.records.history import (
    CSV_COLUMNS,
    JOURNAL,
    SERIES,
    ClientRow,
    History,
    RoundRecord,
    RunSummary,
    TrafficRow,
    plain_number,
)
from cutlayer.runtime.records.loggers import Logger

__all__ = ["ClientRow", "Results", "RoundRecord", "RunSummary", "TrafficRow"]

log = logging.getLogger(__name__)

# Rewriting the whole history at each evaluated round is quadratic in their number; it may take this share of the time.
_WRITE_SHARE = 0.05


class Results:
    """Writer of a run's files, and the one the one that feeds its loggers.

    Args:
        folder: the run's folder; made if it is not there.
        loggers: trackers to feed, from `build_loggers`. One that fails in mid-run is reported and left out; the run
            resumes.
    """

    def __init__(self, folder: Path, loggers: Sequence[Logger] = (), *, by_client: bool = True) -> None:
        self.folder = folder
        self._by_client = by_client
        self._loggers = list(loggers)
        self._history = History()
        self._begun = False
        self._files = {name: GrowingFile(folder / name) for name in (*CSV_COLUMNS, JOURNAL)}
        self._finished = False
        self._setting: list[str] = []
        self._summary: dict[str, Any] | None = None
        self._stale = False
        self._written_at = -math.inf
        self._write_cost = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, config: Mapping[str, Any], setting: Iterable[str] = ()) -> None:
        """Write `config.yaml` (resolved, plain containers) and `env.json`; start the loggers.

        In a folder that an earlier process began, `env.json` keeps that one's environment and lists this one's under
        "resumed". May be called before or after `restore`.

        Args:
            setting: the dotted keys that decide the result, for `results.json`.
        """
        self._setting = sorted(setting)
        replace_file(self.folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        path = self.folder / "env.json"
        environment = describe_environment()
        replace_file(path, json.dumps(_after(path, environment), indent=2) + "\n")
        for logger in self._loggers:
            logger.start(config)

    def record(self, record: RoundRecord, traffic: Iterable[TrafficRow] = ()) -> None:
        """Append one round to the csv files, inform the loggers, and bring `results.json` up to date if evaluated.

        Args:
            record: the round's figures; rounds must come in rising order.
            traffic: the round's lines of the ledger.
        """
        traffic = list(traffic)
        self._begin()
        entry = self._history.add(record, traffic)
        metrics = [[plain_number(getattr(record, name)) for name in CSV_COLUMNS["metrics.csv"]]]
        extras = [[record.round, name, float(value)] for name, value in record.metrics.items()]
        self._files["metrics.csv"].append(csv_text(metrics))
        self._files["extras.csv"].append(csv_text(extras))
        self._files["communication.csv"].append(csv_text(traffic if self._by_client else _over_clients(traffic)))
        if entry is not None:
            self._files[JOURNAL].append(_json_line(entry))
        self._stale |= record.evaluated
        self._write_in_time()
        self._log(record)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep: length and sum of each file that grows, which are synced first, and totals.

        The result is made of plain JSON types and shares nothing with this object.
        """
        self._begin()
        marks = {name: asdict(file.mark()) for name, file in self._files.items()}
        self._write_in_time()
        return {"files": marks, "history": self._history.current()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a `state()`: cut the files that grow back to it and restore its history.

        Raises:
            DamagedError: one of them is missing, shorter than it was, or was changed; all are left as they are.
        """
        if "offsets" in state:
            self._restore_first(state)
            return
        for name, file in self._files.items():
            file.resume_from(build(Mark, state["files"][name]))
        history = History(**copy.deepcopy(dict(state["history"])))
        journal = self._files[JOURNAL]
        try:
            for line in journal.read().decode().splitlines():
                history.enter(json.loads(line))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DamagedError.unreadable(journal.path, error) from None
        self._restore(history, self._files)

    def _restore_first(self, state: Mapping[str, Any]) -> None:
        """The same of a checkpoint of the first format, which has the whole history, and no sums."""
        for name, length in state["offsets"].items():
            self._files[name].resume_from(Mark(name, length, ""))
        history = History(**copy.deepcopy(dict(state["history"])))
        self._restore(history, state["offsets"])
        self._files[JOURNAL].begin("".join(map(_json_line, history.entries())))

    def _restore(self, history: History, names: Iterable[str]) -> None:
        for name in names:
            self._files[name].cut()
        self._begun, self._history = True, history
        self._write_results()

    def _write_in_time(self) -> None:
        if self._stale and time.monotonic() - self._written_at >= self._write_cost / _WRITE_SHARE:
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
        sums = {name: last.get(name, 0) for name in SERIES if name.startswith(("comm_", "time_"))}
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
        is a single bool, and "setting" the keys of the configuration that decide the result.
        """
        history = self._history
        content: dict[str, Any] = {"rounds": history.rounds, **history.series}
        content["metrics"] = dict(sorted(history.metrics.items()))
        content["traffic"] = dict(sorted(history.traffic.items()))
        content["in_turn"] = bool(history.last.get("in_turn"))
        if self._setting:
            content["setting"] = self._setting
        if self._summary is not None:
            content["summary"] = self._summary
        return {**content, "finished": self._finished}

    def _begin(self) -> None:
        """Begin the files that grow anew, unless `restore` took them up or this object wrote them."""
        if not self._begun:
            self._begun = True
            for name, file in self._files.items():
                file.begin(csv_text([CSV_COLUMNS[name]]) if name in CSV_COLUMNS else "")

    def _write_results(self) -> None:
        began = time.monotonic()
        path = self.folder / CLIENT_ACCURACY
        if self._history.client_rows:
            replace_file(path, csv_text([("metric", "client", "samples", "accuracy"), *self._history.client_rows]))
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

    def _log(self, record: RoundRecord) -> None:
        for logger in list(self._loggers):
            try:
                logger.log(record)
            except Exception as error:  # a tracker that breaks must not cost hours of training
                log.warning("logger %s failed in round %d and is left out: %s", logger.config.name, record.round, error)
                self._loggers.remove(logger)


def _after(path: Path, environment: dict[str, Any]) -> dict[str, Any]:
    """An environment behind those that a run's `env.json` lists; alone where there is none that can be read."""
    try:
        first: Any = json.loads(path.read_text(encoding="utf-8"))
        first.setdefault("resumed", []).append(environment)
    except FileNotFoundError:
        return environment
    except (OSError, ValueError, AttributeError, RecursionError):
        log.warning("%s cannot be read and is written anew", path)
        return environment
    return first


def _json_line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False, separators=(",", ":")) + "\n"


def _over_clients(traffic: Iterable[TrafficRow]) -> list[tuple[Any, ...]]:
    """The lines summed over clients, whose column stays empty."""
    sums: dict[tuple[int, str, str, str], list[int]] = {}
    for *key, _, payload, framed in traffic:
        found = sums.setdefault(cast(tuple[int, str, str, str], tuple(key)), [0, 0])
        found[0] += payload
        found[1] += framed
    return [(*key, "", *bytes) for key, bytes in sums.items()]


def _one_line_a_list(content: Mapping[str, Any], indent: str = "") -> str:
    """JSON with every list on one line: short to read, quick to write, stable to compare."""
    inner = indent + "  "
    lines: list[str] = []
    for key, value in content.items():
        nested = isinstance(value, Mapping) and len(cast(Mapping[str, Any], value)) > 0
        text = _one_line_a_list(cast(Mapping[str, Any], value), inner) if nested else json.dumps(value, allow_nan=False)
        lines.append(f"{inner}{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n" + indent + "}" + ("\n" if not indent else "")
