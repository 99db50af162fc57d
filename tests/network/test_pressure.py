"""What peers can hold of a server, or make it do: all of it ends by itself, and leaves no more than a few lines.

`python -m tests.network.pressure` measures the same in large, on a server that trains.
"""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.network.programs import until

pytest.importorskip("grpc", reason="the extra grpc is not installed")

from cutlayer.runtime.messages.bounds import Limits
from cutlayer.runtime.network.client.link import ServerLink
from cutlayer.runtime.network.links import LinkLostError
from cutlayer.runtime.network.server import audit, connection, guard, hub
from cutlayer.runtime.network.server.audit import AUDIT, BEFORE, Audit
from cutlayer.runtime.network.server.hub import Greeting, Hub
from cutlayer.runtime.network.wire import Head, What, outgoing
from cutlayer.runtime.transport import GrpcTransport
from tests.network import raw

POPULATION = 3
SHORT_S = 0.3
STRANGER = raw.says(1, What.HELLO, {"client": 99})


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that may last some seconds lasts a fraction of one."""
    monkeypatch.setattr(guard, "GREETING_S", SHORT_S)
    monkeypatch.setattr(hub, "_GREETING_S", SHORT_S)
    monkeypatch.setattr(hub, "_CARE_S", 0.05)
    monkeypatch.setattr(guard, "_IDLE_MS", 300)
    for module in (hub, connection):
        monkeypatch.setattr(module, "FAREWELL_S", 0.2)


@pytest.fixture
def here(brief: None, tmp_path: Path) -> Iterator[Hub]:
    """A server of three clients that does nothing but greet."""
    greeting = Greeting(lambda *_: {"text": "welcome"}, lambda *_: Limits(message_bytes=1 << 20), audit=Audit(tmp_path))
    made = Hub(GrpcTransport(port=0, timeout=SHORT_S, keepalive=30), POPULATION, greeting)
    yield made
    made.close("the test is over")


def audited(folder: Path, name: str = AUDIT) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="ascii").splitlines()]


def honest(server: Hub, client: int = 0) -> ServerLink:
    """A client that is let in: it goes on to greet until there is a place for it."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        link = ServerLink(f"127.0.0.1:{server.port}", client, GrpcTransport())
        link.send(What.HELLO, {"client": client})
        link.send(What.HELLO, {})
        try:
            link.receive((What.WELCOME,))
            until(lambda: client in server.connections, "there", 10)
            return link
        except LinkLostError:
            link.close()
            time.sleep(0.05)
    raise AssertionError("it was never let in")


# ---------------------------------------------------------------------- what ends by itself

HELD: dict[str, Callable[[int], bytes]] = {
    "nothing": lambda _: b"",
    "half a preface": lambda _: raw.PREFACE[:10],
    "the beginning of a TLS handshake": lambda _: b"\x16\x03\x01\x02\x00\x01",
    "HTTP/2 and no stream": lambda _: raw.greeting(),
    "a stream without a greeting": lambda _: raw.greeting() + raw.request(1),
    "half a greeting": lambda _: raw.greeting() + raw.request(1) + STRANGER[:-3],
    "streams that take nothing": lambda _: (
        raw.greeting(0) + b"".join(raw.request(n) + raw.says(n, What.HELLO, {"client": 0}) for n in range(1, 40, 2))
    ),
    "a refused stream that takes nothing": lambda _: raw.greeting(0) + raw.request(1) + STRANGER,
    "a stream to what is not there": lambda _: raw.greeting(0) + raw.request(1, x="y").replace(b"Join", b"Joim"),
}


@pytest.mark.parametrize("name", HELD)
def test_what_a_peer_holds_is_ended(here: Hub, name: str) -> None:
    with raw.Crowd(here.port) as crowd:
        for number in range(5):
            crowd.come(HELD[name](number))
        until(lambda: not crowd.open, "all connections ended", 20)
        until(lambda: not len(here._streams), "all streams ended", 10)
        link = honest(here)
        link.close()


def test_one_that_sends_a_byte_at_a_time_has_no_longer_than_others(here: Hub) -> None:
    with raw.Crowd(here.port) as crowd:
        number = crowd.come(raw.greeting() + raw.request(1))
        piece = next(outgoing(Head(What.HELLO), {"client": 0}))
        drops = itertools.cycle([raw.data(1, piece[:17]), raw.data(1, piece[17:18])])

        def drip() -> bool:
            crowd.say(number, next(drops))
            return not crowd.open

        until(drip, "ended", 10)
    assert "too long" in here.refused[1] or "JSON" in here.refused[1] or "behind the end" in here.refused[1]


def test_a_client_that_takes_nothing_of_what_it_is_sent_is_given_up(here: Hub) -> None:
    with raw.Crowd(here.port) as crowd:
        window = 5 + sum(map(len, outgoing(Head(What.WELCOME), {"text": "welcome"})))
        crowd.come(
            raw.greeting(window) + raw.request(1) + raw.says(1, What.HELLO, {"client": 1}) + raw.says(1, What.HELLO, {})
        )
        until(lambda: 1 in here.connections, "greeted", 10)
        here.connections[1].send(Head(What.CLOSE), {"much": "x" * 100_000})
        until(lambda: not crowd.open, "ended", 20)
        until(lambda: not here.connections, "gone", 10)
    assert here.seen[1].error == "it did not take what it was sent"


# ---------------------------------------------------------------------- how much of it there may be


def test_a_connection_has_one_stream_and_the_others_cost_nothing(here: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    count = guard.Streams.open
    monkeypatch.setattr(guard.Streams, "open", lambda self, *given: opened.append(0) or count(self, *given))
    with raw.Crowd(here.port) as crowd:
        numbers = range(1, 1001, 2)
        for _ in range(3):
            crowd.come(raw.greeting() + b"".join(raw.request(number) for number in numbers))
        until(lambda: sum(each[raw.RESET] for each in crowd.frames.values()) == 3 * len(numbers), "all reset", 20)
    assert len(opened) == 3


def test_there_are_so_many_connections_and_an_honest_client_comes_when_others_have_ended(
    here: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_SPARE_CONNECTIONS", 4)
    greeting = Greeting(lambda *_: {}, lambda *_: Limits(message_bytes=0))
    narrow = Hub(GrpcTransport(port=0), POPULATION, greeting)
    most = guard.most_connections(POPULATION)
    try:
        with raw.Crowd(narrow.port) as crowd:
            for _ in range(4 * most):
                crowd.come()
            until(lambda: crowd.open <= most, "the others were ended", 10)
            honest(narrow).close()
    finally:
        narrow.close("the test is over")


def test_there_are_so_many_streams(
    here: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "_SPARE_STREAMS", 4)
    monkeypatch.setattr(hub, "_GREETING_S", 1.5)
    few = Hub(GrpcTransport(port=0), POPULATION, Greeting(lambda *_: {}, lambda *_: Limits(message_bytes=0)))
    most = guard.most_streams(POPULATION)
    found: list[int] = []
    try:
        with raw.Crowd(few.port) as crowd:
            for _ in range(3 * most):
                crowd.come(raw.greeting() + raw.request(1))

            def reported() -> int:
                found.append(len(few._streams))
                return sum(each[raw.HEADERS] for each in crowd.frames.values())

            until(lambda: reported() >= 2 * most, "the others turned away", 10)
            assert max(found) == most
            honest(few).close()  # later, when the others' time is over
    finally:
        few.close("the test is over")


def test_a_flood_of_pings_ends_the_connection(here: Hub) -> None:
    with raw.Crowd(here.port) as crowd:
        number = crowd.come(raw.greeting() + raw.request(1))
        crowd.say(number, raw.frame(raw.PING, 0, 0, bytes(8)) * 200)
        until(lambda: not crowd.open, "ended", 10)
        assert crowd.frames[number][raw.GOAWAY]


def test_an_honest_probe_does_not(here: Hub) -> None:
    """A probe in each half second, as of a client whose ``keepalive`` is the shortest that makes sense."""
    link = ServerLink(f"127.0.0.1:{here.port}", 0, GrpcTransport(keepalive=0.5))
    link.send(What.HELLO, {"client": 0})
    link.send(What.HELLO, {})
    try:
        until(lambda: 0 in here.connections, "greeted", 10)
        with here.changed:
            assert not here.changed.wait_for(lambda: 0 not in here.connections, 1.7)
    finally:
        link.close()


def test_headers_and_compressed_messages_are_bounded(here: Hub) -> None:
    bomb = gzip.compress(bytes(1 << 23), 9)
    with raw.Crowd(here.port) as crowd:
        large = crowd.come(raw.greeting())
        until(lambda: crowd.frames[large][raw.SETTINGS] == 2, "the limits agreed on", 10)
        crowd.say(large, raw.request(1, x_filler="x" * 5000))
        until(lambda: crowd.frames[large][raw.RESET] or not crowd.open, "refused", 10)
        assert not here.refused[0]  # by gRPC, before anything was made of it
        crowd.come(raw.greeting() + raw.request(1, grpc_encoding="gzip") + raw.data(1, bomb, compressed=True))
        until(lambda: here.refused[0], "refused", 10)
    assert "no peer of this version" in here.refused[1]  # as it came: nothing has been made of it


def test_the_sockets_of_peers_alone_are_hung_up(brief: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ends = [socket.create_connection(listener.getsockname()) for _ in range(3)]
        served = [listener.accept()[0] for _ in ends]
        names = [f"ipv4:127.0.0.1:{each.getsockname()[1]}" for each in ends]
        strangers = ["ipv4:127.0.0.2:1", "unix:", "ipv6:%5B::1%5D:77", "nonsense", ""]
        assert guard.hang_up({names[1], *strangers}) == 1
        assert ends[1].recv(1) == b""
        for end, each in ((ends[0], served[0]), (ends[2], served[2])):
            each.sendall(b"x")
            assert end.recv(1) == b"x"
        for each in (*ends, *served):
            each.close()
    assert (
        guard._place("ipv6:%5B::ffff:10.0.0.2%5D:40000") == guard._place("ipv4:10.0.0.2:40000") == ("10.0.0.2", 40000)
    )


# ---------------------------------------------------------------------- lines


@pytest.mark.parametrize("bytes_left", range(0, 60, 12))
def test_who_leaves_during_the_greeting_leaves_no_traceback(
    here: Hub, bytes_left: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = raw.request(1) + raw.says(1, What.HELLO, {"client": 2}) + raw.says(1, What.HELLO, {})
    with raw.Crowd(here.port) as crowd:
        for number in range(8):
            window = 0 if number % 2 else 65535
            crowd.leave(crowd.come(raw.greeting(window) + whole[: len(whole) - bytes_left]))
        until(lambda: not len(here._streams), "all streams ended", 10)
    here.close("the test is over")
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


def test_refusals_are_counted_and_only_some_of_them_told(
    here: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    came = 60
    with raw.Crowd(here.port) as crowd:
        for _ in range(came):
            crowd.come(raw.greeting() + raw.request(1) + STRANGER)
        until(lambda: here.refused[0] >= came, "refused", 20)
    here.close("the test is over")
    reported = [record.getMessage() for record in caplog.records if "refused ipv4" in record.getMessage()]
    assert here.refused[0] == came
    assert len(reported) == here.quiet.most
    assert f"refused: {came - len(reported)} more lines like these were left out" in caplog.text
    events = audited(tmp_path)
    assert [each["event"] for each in events] == ["listening", *["refused"] * len(reported), "left out", "closed"]
    assert events[-2]["count"] == came - len(reported)


def test_lines_are_reported_again_when_their_time_is_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: clock[0])
    quiet = guard.Quiet(logging.getLogger("test"), most=3, seconds=60)
    assert [quiet("a", "line %d", number) for number in range(5)] == [True] * 3 + [False] * 2
    assert quiet("b", "another kind")
    assert quiet.report_rest() == []
    clock[0] += 61
    assert quiet.report_rest() == [("a", 2)]
    assert quiet.report_rest() == []
    assert quiet._windows == {}  # nothing stays of those that are over
    assert quiet("a", "line")


# ---------------------------------------------------------------------- the audit log


def test_the_audit_log_tells_who_joined_was_refused_and_left(here: Hub, tmp_path: Path) -> None:
    link = honest(here, 1)
    stranger = ServerLink(f"127.0.0.1:{here.port}", 0, GrpcTransport())
    stranger.send(What.HELLO, {"client": "\x1b[2J\n{\u202e"})
    assert stranger.receive((What.END,))
    link.close()
    until(lambda: not here.connections, "gone", 10)
    stranger.close()
    here.close("the test is over")
    events = audited(tmp_path)
    reported = [(each["event"], each.get("client"), each.get("why")) for each in events]
    refused = r"there is no client '\x1b[2J\n{\u202e'; clients are 0 to 2"
    assert reported == [
        ("listening", None, None),
        ("joined", 1, None),
        ("refused", None, refused),
        ("left", 1, "the link was lost"),
        ("closed", None, "the test is over"),
    ]
    assert all(each["peer"].startswith("ipv4:127.0.0.1:") for each in events[1:4])


def test_the_audit_log_is_bounded_and_neutral(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = Audit(tmp_path, most_bytes=2000)
    for number in range(200):
        log.write("refused", client=number, why="\x1b[2J\n\u202e" + "x" * number)
    sizes = [(tmp_path / name).stat().st_size for name in (AUDIT, BEFORE)]
    assert all(0 < size <= 2000 for size in sizes)
    assert {path.name for path in tmp_path.iterdir()} == {AUDIT, BEFORE}
    kept = [*audited(tmp_path, BEFORE), *audited(tmp_path)]
    assert [each["client"] for each in kept] == list(range(200 - len(kept), 200))
    assert all(each["why"].isprintable() for each in kept)
    missing = Audit(tmp_path / "not" / "there")
    for _ in range(3):
        missing.write("joined")
    assert len([r for r in caplog.records if r.name == audit.__name__]) == 1


def test_a_fault_in_the_greeting_is_the_trouble_of_that_client_alone(
    here: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = honest(here, 1)

    def faulty(*_: object) -> dict[str, Any]:
        raise KeyError("a fault of this program")

    monkeypatch.setattr(here._greeting, "welcome", faulty)
    other = ServerLink(f"127.0.0.1:{here.port}", 0, GrpcTransport())
    try:
        other.send(What.HELLO, {"client": 0})
        end = other.receive((What.END,))
        assert end.body == {"error": "the server cannot serve the greeting: KeyError", "later": False}
        assert list(here.connections) == [1]
    finally:
        other.close()
        link.close()
