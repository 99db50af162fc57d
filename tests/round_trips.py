"""The round trips of a run in closed form, by the arrows that its algorithm declares."""

from collections.abc import Iterable

from cutlayer.runtime.costs.traffic import crossings
from cutlayer.runtime.messages.boundary import MODEL
from cutlayer.runtime.rounds.setup import Setup


def expected_round_trips(setup: Setup, rounds: Iterable[int]) -> int:
    """How often clients wait for the server over the given rounds: for what opens a round, and for each reply."""
    total = 0
    for flows in crossings(setup, rounds):
        replies = {flow.kind: len(sizes) for flow, sizes in flows if flow.direction == "down"}
        replies |= {flow.kind: 1 for flow, _ in flows if flow.kind == MODEL}
        total += sum(replies.values())
    return total
