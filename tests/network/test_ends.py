"""How it ends: at the deadline of a round, with a rate that does not converge, and when the run is over."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import play
from tests.network import test_hostile
from tests.network.serving import served, start_client

pytest.importorskip("grpc", reason="the extra grpc is not installed")

from cutlayer.runtime.messages.bounds import Limits
from cutlayer.runtime.network.client.link import ServerLink
from cutlayer.runtime.network.server.hub import Greeting, Hub
from cutlayer.runtime.network.wire import Head, Incoming, What, outgoing
from cutlayer.runtime.transport import GrpcTransport

SETTING = ("algorithm=fed_avg", "num_clients=2", "rounds=2", "optimizer=sgd")


def test_one_that_is_silent_does_not_use_up_the_time_of_those_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_hostile, "HOSTILE", 0)
    limits = ("transport.quorum=0.5", "transport.deadline=6")
    with served(tmp_path, *SETTING, *limits, clients=0) as federation:
        clients: Any = federation.clients
        silent, quick = test_hostile.Hostile(federation), start_client(1, clients.hub.port, tmp_path)
        try:
            with clients.hub.changed:
                assert clients.hub.changed.wait_for(lambda: len(clients.hub.connections) == 2, 60)
            record, _ = federation.step()
            assert (record.clients, record.metrics["dropped"], clients.repeats) == (1, 1, 0)
            assert list(clients.hub.connections) == [1]
            clients.hub.close("the test is over")
            assert quick.error() == ""
        finally:
            silent.link.close()
            quick.kill()


def test_a_rate_that_does_not_converge_is_reported_by_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WaitedAgainError(Exception):
        pass

    with served(tmp_path, *SETTING, "num_clients=1", "lr=1e6", clients=0) as federation:
        clients: Any = federation.clients
        gather, client = clients.gather, start_client(0, clients.hub.port, tmp_path)
        rounds: list[int] = []

        def once(cohort: list[int], round: int) -> None:
            rounds.append(round)
            if len(rounds) > 1:
                raise WaitedAgainError
            gather(cohort, round)

        monkeypatch.setattr(clients, "gather", once)
        try:
            with pytest.raises(WaitedAgainError):
                federation.step()
            assert client.error().startswith("ConfigError: lr=1000000.0: expected a rate that converges")
            assert "expected a rate that converges" in clients.hub.seen[0].error
        finally:
            client.kill()


def test_a_client_that_was_just_lost_learns_that_the_run_is_over(tmp_path: Path) -> None:
    with served(tmp_path, *SETTING, "num_clients=1") as federation:
        play(federation)
        clients: Any = federation.clients
        clients.hub.connections[0].cut("for a test")
        with clients.hub.changed:
            assert clients.hub.changed.wait_for(lambda: not clients.hub.connections, 30)
        clients.disconnect_all()
        assert list(clients.hub.connections) == [0]


@pytest.mark.parametrize("later", [False, True])
def test_a_client_that_is_still_greeting_learns_it(later: bool) -> None:
    hub = Hub(GrpcTransport(port=0), 1, Greeting(lambda *_: {}, lambda *_: Limits(message_bytes=0)))
    link = ServerLink(f"127.0.0.1:{hub.port}", 0, GrpcTransport())
    try:
        link.send(What.HELLO, {"client": 0})
        link.receive((What.WELCOME,))
        hub.close("the run is over", later=later)  # while the client has its data to load
        reported = {"error": "the run is over", "later": True} if later else {"reason": "the run is over"}
        assert link.receive((What.END,)).body == reported
    finally:
        link.close()
        hub.close("the test is over")


class SlowStream:
    """A stream whose pieces take a while to leave, and which takes one at a time, whether or not somebody waits."""

    def __init__(self) -> None:
        self.came = [*outgoing(Head(What.HELLO), {"client": 0})]
        self.left: list[bytes] = []
        self.begun = asyncio.Event()
        self._leaving = False

    def peer(self) -> str:
        return "a test"

    def add_done_callback(self, _: Callable[[object], None]) -> None:
        pass

    async def read(self) -> bytes:
        if not self.came:
            await asyncio.Event().wait()
        return self.came.pop(0)

    async def write(self, piece: bytes) -> None:
        assert not self._leaving, "gRPC refuses it: too many operations"
        self._leaving = True
        self.begun.set()
        sent = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.2, self._sent, piece, sent)
        await asyncio.shield(sent)

    def _sent(self, piece: bytes, sent: asyncio.Future[None]) -> None:
        self._leaving = False
        self.left.append(piece)
        sent.set_result(None)


def test_one_whose_welcome_is_still_being_sent_learns_it() -> None:
    hub = Hub(GrpcTransport(port=0), 1, Greeting(lambda *_: {}, lambda *_: Limits(message_bytes=0)))

    async def ended() -> list[bytes]:
        stream = SlowStream()
        joined = asyncio.ensure_future(hub._join(None, stream))
        await stream.begun.wait()
        hub._farewell.set_result({"reason": "the run is over"})
        await joined
        return stream.left

    try:
        pieces = hub.network.submit(ended()).result(30)
    finally:
        hub._farewell = hub.network.submit(_future()).result(30)  # of those that there are when it closes
        hub.close("the test is over")
    incoming = Incoming(Limits(message_bytes=0), (What.WELCOME, What.END))
    received = [found for piece in pieces if (found := incoming.feed(piece)) is not None]
    assert [each.head.what for each in received] == [What.WELCOME, What.END]
    assert received[-1].body == {"reason": "the run is over"}


async def _future() -> asyncio.Future[dict[str, Any]]:
    return asyncio.get_running_loop().create_future()
