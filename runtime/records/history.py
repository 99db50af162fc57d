"""The figures of a run round by round, and the history that `results.json` is made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

TrafficRow = tuple[int, str, str, str, int, int, int]
"""round, direction ("up" or "down"), kind, field, client, payload bytes, framed bytes"""

ClientRow = tuple[str, int, int, float]
"""metric, client, samples that it was measured on, accuracy as a fraction"""

CSV_COLUMNS = {
    "metrics.csv": (
        *("round", "test_acc", "test_loss", "train_loss", "comm_load", "comm_up", "comm_down", "comm_framed"),
        *("clients", "round_trips", "time_wall", "time_client", "time_server", "time_eval"),
    ),
    "extras.csv": ("round", "name", "value"),
    "communication.csv": ("round", "direction", "kind", "field", "client", "payload_bytes", "framed_bytes"),
}
JOURNAL = "history.jsonl"
GROWING = (*CSV_COLUMNS, JOURNAL)
SERIES = (
    *("test_acc", "test_loss", "train_loss", "comm_load", "comm_up", "comm_down", "comm_framed"),
    *("round_trips", "client_rounds", "time_wall", "time_client", "time_server", "time_eval"),
)


@dataclass
class RoundRecord:
    """One completed round.

    `round` counts completed rounds from 1. Accuracies are fractions; `test_*` are None in a round that was not
    evaluated. `comm_*` are cumulative payload bytes of training traffic (`comm_framed`: bytes on the wire), `time_*`
    cumulative seconds. `clients` survived the round. `round_trips` counts so far how often a client waited for the
    server, see `ledger.Ledger`; `in_turn` says that a round's clients work one after the other. `metrics` are the
    algorithm's own, e.g. "align/error_before", `client_rows` what was measured client by client.
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
        own = {name: getattr(self, name) for name in CSV_COLUMNS["metrics.csv"][1:]}
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
class History:
    """Everything that `results.json` and the summary need; plain containers, so that it is a checkpoint's state too.

    `totals` holds cumulative [payload, framed] bytes by "direction/kind/field"; `traffic` the payload part of it at
    each evaluated round. `pending` holds metrics of rounds since the last evaluation, `client_rows` what that measured
    client by client. The first four grow with the rounds: each evaluated round adds an entry, which is a line of the
    journal; the others are `current`, small, and in a checkpoint as they are.
    """

    rounds: list[int] = field(default_factory=list[int])
    series: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in SERIES})
    metrics: dict[str, list[float | None]] = field(default_factory=dict[str, list[float | None]])
    traffic: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    totals: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    pending: dict[str, float | None] = field(default_factory=dict[str, float | None])
    last: dict[str, Any] = field(default_factory=dict[str, Any])
    client_rows: list[list[Any]] = field(default_factory=list[list[Any]])

    def add(self, record: RoundRecord, traffic: Iterable[TrafficRow]) -> dict[str, Any] | None:
        """Add a round; the entry of the journal, if it was evaluated."""
        assert record.round > self.last.get("round", 0), f"round {record.round} after round {self.last['round']}"
        for _, direction, kind, name, _, payload, framed in traffic:
            total = self.totals.setdefault(f"{direction}/{kind}/{name}", [0, 0])
            total[0] += int(payload)
            total[1] += int(framed)
        self.pending.update({name: finite(value) for name, value in record.metrics.items()})
        own = {name: finite(value) for name, value in vars(record).items() if name in SERIES}
        clients = self.last.get("client_rounds", 0) + record.clients
        self.last = {"round": record.round, "in_turn": record.in_turn, "client_rounds": clients, **own}
        if not record.evaluated:
            return None
        self.client_rows = [[*names, plain_number(accuracy)] for *names, accuracy in record.client_rows]
        entry = {
            "round": record.round,
            "series": [self.last[name] for name in SERIES],
            "metrics": self.pending,
            "traffic": {name: total[0] for name, total in self.totals.items()},
        }
        self.enter(entry)
        self.pending = {}
        return entry

    def enter(self, entry: Mapping[str, Any]) -> None:
        """Add an entry of the journal to the lists."""
        before = len(self.rounds)
        self.rounds.append(entry["round"])
        for name, value in zip(SERIES, entry["series"], strict=True):
            self.series[name].append(value)
        for name in entry["metrics"].keys() | self.metrics.keys():
            self.metrics.setdefault(name, [None] * before).append(entry["metrics"].get(name))
        for name, total in entry["traffic"].items():
            self.traffic.setdefault(name, [0] * before).append(total)

    def entries(self) -> Iterable[dict[str, Any]]:
        """The journal once more, of the lists."""
        for at, number in enumerate(self.rounds):
            yield {
                "round": number,
                "series": [self.series[name][at] for name in SERIES],
                "metrics": {name: values[at] for name, values in self.metrics.items()},
                "traffic": {name: values[at] for name, values in self.traffic.items()},
            }

    def current(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the journal."""
        return {name: copy.deepcopy(getattr(self, name)) for name in ("totals", "pending", "last", "client_rows")}


def finite(value: Any) -> Any:
    """A plain number; None for none and for what JSON cannot hold (NaN, infinity)."""
    value = plain_number(value)
    return None if value is None or not math.isfinite(value) else value


def plain_number(value: Any) -> Any:
    """Numbers of numpy or torch as Python's own, so that they are written alike."""
    return value if value is None or type(value) in (int, float) else value.item() if hasattr(value, "item") else value
