"""The ledger: every byte that crosses the boundary, charged by the channel alone.

No algorithm contains byte arithmetic. Each message is charged by round, direction, kind, field and client with two
figures: payload bytes (element count times element size, what papers count) and framed bytes (what the wire carries).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from runtime.boundary import METRICS, Payload, field_of, payload_bytes
from runtime.codec import framed_bytes

Direction = Literal["up", "down"]
CONTROL_KINDS = frozenset({METRICS})


class Traffic(NamedTuple):
    """One line of ``communication.csv``: what one client exchanged in one round under one kind and field."""

    round: int
    direction: str
    kind: str
    field: str
    client: int
    payload: int
    framed: int


@dataclass
class Count:
    """A running sum of payload and framed bytes."""

    payload: int = 0
    framed: int = 0

    def add(self, payload: int, framed: int) -> None:
        self.payload += payload
        self.framed += framed


class Ledger:
    """Running totals of all traffic, and the lines of the current round.

    Memory is bounded by the cohort: ``close_round`` hands out the round's lines and forgets them.
    """

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str, str], Count] = {}
        self._round: dict[tuple[str, str, str, int], Count] = {}

    def charge(self, direction: Direction, kind: str, client: int, payload: Payload) -> None:
        """Charge one message of ``client``; an empty message carries no bytes and leaves no line."""
        framed = framed_bytes(payload)
        sizes = dict.fromkeys(framed, 0)
        for name, value in payload.items():
            sizes[field_of(name)] += payload_bytes(value)
        for field, size in sizes.items():
            self._totals.setdefault((direction, kind, field), Count()).add(size, framed[field])
            self._round.setdefault((direction, kind, field, client), Count()).add(size, framed[field])

    def close_round(self, round: int) -> list[Traffic]:
        """The lines of the round that ends now, in the order in which they first occurred."""
        lines = [Traffic(round, *key, count.payload, count.framed) for key, count in self._round.items()]
        self._round.clear()
        return lines

    def totals(self) -> Iterator[tuple[str, str, str, Count]]:
        """Direction, kind, field and bytes so far."""
        for (direction, kind, field), count in self._totals.items():
            yield direction, kind, field, count

    def training(self, direction: Direction | None = None) -> Count:
        """Bytes of training traffic so far: everything but metrics, in one direction or in both."""
        result = Count()
        for way, kind, _, count in self.totals():
            if kind not in CONTROL_KINDS and direction in (None, way):
                result.add(count.payload, count.framed)
        return result

    def state_dict(self) -> list[list[str | int]]:
        """The totals, for a checkpoint's manifest."""
        return [[*key, count.payload, count.framed] for key, count in self._totals.items()]

    def load_state_dict(self, state: list[list[str | int]]) -> None:
        """Take up the totals of a checkpoint; lines of an unfinished round are forgotten."""
        self._round.clear()
        self._totals = {
            (str(way), str(kind), str(field)): Count(int(payload), int(framed))
            for way, kind, field, payload, framed in state
        }
