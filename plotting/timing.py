"""Simulated time: how long a run would take over a given link, from the seconds, bytes and replies it recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutlayer.runtime.ground.config import ConfigError

Array = NDArray[np.float64]

ROUND_PARTS = ("client", "server", "transfer", "waiting")
# Seconds, bytes or rounds: more than any run takes.
_LARGEST = 1e20
_NEEDED = ("rounds", "comm_framed", "time_client", "time_server", "round_trips", "client_rounds")


@dataclass(frozen=True)
class Link:
    """Each client's link to the server.

    bandwidth_mbit: megabits (10^6 bits) per second, shared by both directions, > 0. rtt_ms: milliseconds from a
    question to the first byte of its reply, >= 0.
    """

    bandwidth_mbit: float = 100.0
    rtt_ms: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth_mbit < float("inf"):
            raise ConfigError("bandwidth_mbit", self.bandwidth_mbit, "a number > 0")
        if not 0 <= self.rtt_ms < float("inf"):
            raise ConfigError("rtt_ms", self.rtt_ms, "a number >= 0")

    @property
    def label(self) -> str:
        """For people, e.g. "100 Mbit/s, 20 ms round trip"."""
        size, unit = (1e3, "Gbit/s") if self.bandwidth_mbit >= 1e3 else (1.0, "Mbit/s")
        return f"{self.bandwidth_mbit / size:g} {unit}, {self.rtt_ms:g} ms round trip"


def simulated_time(results: Mapping[str, Any], link: Link) -> Array | None:
    """Seconds of a synchronous run so far at each evaluated round [n]; None where the run lacks what it takes.

    The clients of a round are equal and work side by side, then the server; clients of a method that hands its model
    on (`in_turn`) work one after the other. With c clients a round and all figures for what lies between two
    evaluations, time = (client seconds + 8 framed bytes / bandwidth + round trips * rtt) / c + server seconds.

    Args:
        results: content of `results.json`.
        link: of every client.
    """
    increments = _increments(results, link)
    return None if increments is None else np.sum([np.cumsum(part) for part in increments.values()], axis=0)


def time_parts(results: Mapping[str, Any], link: Link) -> dict[str, float] | None:
    """Mean seconds of one round over the run, by `ROUND_PARTS`, which add up to it; None as in `simulated_time`."""
    increments = _increments(results, link)
    if increments is None:
        return None
    return {name: float(part.sum()) / results["rounds"][-1] for name, part in increments.items()}


def time_unit(largest: float) -> tuple[float, str]:
    """Seconds in the unit in which a duration reads best, and its name: (60, "min") for 600."""
    units = (("d", 86400.0, 2), ("h", 3600.0, 2), ("min", 60.0, 2), ("s", 1.0, 1), ("ms", 1e-3, 1))
    return next(((size, name) for name, size, least in units if largest >= least * size), (1e-6, "µs"))


def format_in_unit(seconds: float) -> str:
    """A duration in its best unit, e.g. "12.3 min"."""
    size, unit = time_unit(seconds)
    count = seconds / size
    return f"{count:.{0 if count >= 100 else 1 if count >= 10 else 2}f} {unit}"


def _increments(results: Mapping[str, Any], link: Link) -> dict[str, Array] | None:
    """Seconds between two evaluations [n] by part."""
    columns = [_column(results.get(name)) for name in _NEEDED]
    found = [column for column in columns if column is not None]
    if len(found) < len(columns) or len({len(column) for column in found}) != 1:
        return None
    rounds, framed, client, server, trips, clients = (np.diff(column, prepend=0.0) for column in found)
    if not (rounds > 0).all() or any((part < 0).any() for part in (framed, client, server, trips, clients)):
        return None
    # Where every client of a round dropped out, their work still took the time of one.
    together = np.ones_like(rounds) if results.get("in_turn") else np.maximum(clients / rounds, 1.0)
    return {
        "client": client / together,
        "server": server,
        "transfer": 8 * framed / (link.bandwidth_mbit * 1e6) / together,
        "waiting": trips * link.rtt_ms / 1e3 / together,
    }


def _column(values: Any) -> Array | None:
    """A list of numbers as an array; None for anything else, as folders of other programs may hold."""
    if not isinstance(values, list) or not values:
        return None
    try:
        column = np.asarray(values, dtype=np.float64)
    except (OverflowError, TypeError, ValueError):
        return None
    return column if column.ndim == 1 and (np.abs(column) <= _LARGEST).all() else None
