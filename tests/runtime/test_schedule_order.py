"""Both schedules on any course of a round, without a model: who is served when, with whom, and who is told of whom."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.runtime.messages.boundary import ClientDroppedError, Message, Upload
from cutlayer.runtime.rounds.schedule import RoundReport, lockstep, sequential

LOST = "lost"
ABSENT = "absent"
Course = list[tuple[str, bool] | str]
"""A client's round: messages (kind, whether it waits) until it ends, or is lost; or it is not there."""

steps = st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=4)
courses = st.one_of(
    st.builds(lambda course, lost: [*course, *([LOST] if lost else [])], steps, st.sampled_from([False, False, True])),
    st.just([ABSENT]),
)
rounds = st.lists(courses, min_size=1, max_size=5)


class Table:
    """A server, a channel and clients that write down what happens."""

    def __init__(self, courses: Sequence[Course], ahead: int) -> None:
        self.courses, self.ahead = courses, ahead
        self.log: list[Any] = []
        self.open_now: set[int] = set()
        self.closed: list[int] = []
        self.dropped: list[int] = []
        self.forgotten: list[int] = []
        self.most = 0
        self.server = self  # the server of the party

    # The server.
    def down(self, client: int, kind: str | None = None, payload: Any = None) -> Any:
        return ("down", client) if kind is None else (kind, client, payload)

    def serve(self, kind: str, inbox: dict[int, Any]) -> dict[int, Any]:
        self.log.append((kind, dict(inbox)))
        return {client: {"to": client} for client in inbox}

    def absorb(self, client: int, upload: Upload) -> None:
        self.log.append(("upload", client, upload.fields))

    def forget(self, client: int) -> None:
        self.forgotten.append(client)

    # The channel.
    def up(self, client: int, kind: str, fields: Any) -> Any:
        return (client, kind, fields["step"])

    def reply(self, client: int, kind: str, payload: Any) -> Any:
        return (client, kind, payload)

    def upload(self, client: int, upload: Upload) -> Upload:
        return Upload({"of": client}, upload.samples, upload.metrics)

    # The clients.
    def begin(self, client: int) -> "Session":
        if self.courses[client] == [ABSENT]:
            raise ClientDroppedError
        self.open_now.add(client)
        self.most = max(self.most, len(self.open_now))
        return Session(self, client)


class Session:
    """One client; it checks what it is sent."""

    def __init__(self, table: Table, client: int) -> None:
        self.table, self.client, self.at = table, client, 0
        self.expected: Any = ("model", client, ("down", client))

    def send(self, message: Any) -> None:
        assert message == self.expected
        self.expected = None

    def receive(self) -> Message | Upload:
        assert self.expected is None, "what it waits for has come"
        course = self.table.courses[self.client]
        if self.at == len(course):
            return Upload({}, 10 * (self.client + 1), {"loss": float(self.client), "steps": float(self.at)})
        if course[self.at] == LOST:
            raise ClientDroppedError
        kind, waits = course[self.at]
        if waits:
            self.expected = (self.client, kind, {"to": self.client})
        self.at += 1
        return Message(kind, {"step": self.at - 1}, waits)

    def close(self) -> None:
        self.table.open_now.discard(self.client)
        self.table.closed.append(self.client)


def in_turn(courses: Sequence[Course]) -> list[Any]:
    log: list[Any] = []
    for client, course in enumerate(courses):
        if course == [ABSENT]:
            continue
        for step, event in enumerate(course):
            if event != LOST:
                log.append((event[0], {client: (client, event[0], step)}))
        if LOST not in course:
            log.append(("upload", client, {"of": client}))
    return log


def side_by_side(courses: Sequence[Course]) -> list[Any]:
    """Each to its next question; then all that ask the same as the first of those that wait, together."""
    log: list[Any] = []
    at = dict.fromkeys((c for c, course in enumerate(courses) if course != [ABSENT]), 0)
    waiting: dict[int, str] = {}

    def move(client: int) -> None:
        while at[client] < len(courses[client]):
            event, step = courses[client][at[client]], at[client]
            at[client] += 1
            if event == LOST:
                return
            if event[1]:
                waiting[client] = event[0]
                return
            log.append((event[0], {client: (client, event[0], step)}))
        log.append(("upload", client, {"of": client}))

    for client in at:
        move(client)
    while waiting:
        kind = waiting[min(waiting)]
        together = sorted(client for client in waiting if waiting[client] == kind)
        log.append((kind, {client: (client, kind, at[client] - 1) for client in together}))
        for client in together:
            del waiting[client]
        for client in together:
            move(client)
    return log


def check(report: RoundReport, table: Table, courses: Sequence[Course]) -> None:
    lost = [c for c, course in enumerate(courses) if course and course[-1] in (LOST, ABSENT)]
    left = [c for c in range(len(courses)) if c not in lost]
    assert sorted(report.survivors) == left
    assert sorted(report.dropped) == sorted(table.dropped) == sorted(table.forgotten) == lost
    assert sorted(table.closed) == [c for c, course in enumerate(courses) if course != [ABSENT]]
    samples = sum(10 * (c + 1) for c in left)
    if left:
        assert report.metrics == {
            "loss": pytest.approx(sum(10 * (c + 1) * c for c in left) / samples),
            "steps": pytest.approx(sum(10 * (c + 1) * len(courses[c]) for c in left) / samples),
        }
    else:
        assert report.metrics == {}


@settings(max_examples=150)
@given(rounds, st.integers(0, 4))
def test_one_after_another(courses: list[Course], ahead: int) -> None:
    table = Table(courses, ahead)
    report = sequential(list(range(len(courses))), table.begin, table.dropped.append, table, table)  # type: ignore[arg-type]
    assert table.log == in_turn(courses)
    assert table.most <= ahead + 1
    present = [course for course in courses if course != [ABSENT]]
    if len(present) == len(courses):
        assert table.most == min(ahead + 1, len(courses)), "as many ahead as may be"
    check(report, table, courses)


@settings(max_examples=150)
@given(rounds, st.integers(0, 4))
def test_all_together(courses: list[Course], ahead: int) -> None:
    table = Table(courses, ahead)
    report = lockstep(list(range(len(courses))), table.begin, table.dropped.append, table, table)  # type: ignore[arg-type]
    assert table.log == side_by_side(courses)
    check(report, table, courses)


@pytest.mark.parametrize("schedule", [sequential, lockstep])
def test_an_error_of_the_server_closes_every_session(schedule) -> None:
    table = Table([[("a", True)], [("a", True)], [("b", True)]], ahead=2)

    def broken(kind: str, inbox: dict[int, Any]) -> dict[int, Any]:
        raise RuntimeError("broken")

    table.serve = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        schedule([0, 1, 2], table.begin, table.dropped.append, table, table)
    assert sorted(table.closed) == [0, 1, 2]


def test_metrics_of_clients_without_samples_are_left_out() -> None:
    report = RoundReport()
    report.add(0, Upload({}, 0, {"loss": 3.0}))
    assert report.metrics == {}
    report.add(1, Upload({}, 2, {"loss": 5.0, "other": 1.0}))
    assert report.metrics == {"loss": 5.0, "other": 1.0}
    assert report.survivors == [0, 1]
