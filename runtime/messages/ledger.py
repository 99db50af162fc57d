"""The ledger: every byte that crosses the boundary and every reply waited for, charged by the channel alone.

No algorithm contains byte arithmetic. Each message is charged by round, direction, kind, field and client with two
figures: payload bytes (element count times element size, what papers count) and framed bytes (what the wire carries).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cutlayer.runtime.messages.boundary import METRICS, MODEL, Payload, field_of, payload_bytes
from cutlayer.runtime.messages.codec import framed_bytes

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

    Memory is bounded by the cohort: ``close_round`` hands out the round's lines and forgets them. ``round_trips``
    counts over closed rounds how often a client waited for the server: once for each reply, and once for the message
    that opens its round together with the upload that ends it, if either carries anything.
    """

    def __init__(self) -> None:
        self.round_trips = 0
        self._replies = 0
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

    def count_reply(self) -> None:
        """Count a reply that a client waited for, whether or not it carries bytes."""
        self._replies += 1

    def close_round(self, round: int) -> list[Traffic]:
        """The lines of the round that ends now, by client, then direction, kind and field."""
        self.round_trips += self._replies + len({client for _, kind, _, client in self._round if kind == MODEL})
        self._replies = 0
        # Not in the order in which they occurred, which depends on who works ahead of its turn.
        ordered = sorted(self._round.items(), key=lambda item: (item[0][3], item[0]))
        lines = [Traffic(round, *key, count.payload, count.framed) for key, count in ordered]
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

    def state_dict(self) -> dict[str, Any]:
        """The totals, for a checkpoint's manifest."""
        totals = [[*key, count.payload, count.framed] for key, count in self._totals.items()]
        return {"totals": totals, "round_trips": self.round_trips}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the totals of a checkpoint; what an unfinished round left is forgotten."""
        self._round.clear()
        self._replies = 0
        self.round_trips = int(state["round_trips"])
        self._totals = {
            (str(way), str(kind), str(field)): Count(int(payload), int(framed))
            for way, kind, field, payload, framed in state["totals"]
        }
