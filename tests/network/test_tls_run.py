"""A run over TLS: the bits of a run in one process, whoever else comes meanwhile."""

import dataclasses
import os
import socket
import subprocess
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.bounds import Limits
from cutlayer.runtime.network.agreement import PROTOCOL, version
from cutlayer.runtime.network.wire import Head, Incoming, What, outgoing
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.transport import GrpcTransport
from tests.conftest import same, weights
from tests.network.serving import END_S, served, start_client
from tests.places import ROOT, program

pytest.importorskip("cryptography", reason="the extra grpc is not installed")
grpc = pytest.importorskip("grpc", reason="the extra grpc is not installed")

from cutlayer.runtime.network.certificates.authority import Order, make_certificates  # noqa: E402  it needs cryptography
from cutlayer.runtime.network.links import METHOD, SERVICE  # noqa: E402
from cutlayer.runtime.network.server.hub import Greeting, Hub  # noqa: E402

SETTING = ("algorithm=sl_single_server", "num_clients=2", "rounds=3", "batch_size=400", "eval_interval=1")


def credentials(authority: Path, stem: str | None, folder: Path) -> Any:
    """Those of a client that trusts one folder's authority and shows a certificate of another's, or none."""
    key, chain = ((folder / f"{stem}.{end}").read_bytes() if stem else None for end in ("key", "pem"))
    return grpc.ssl_channel_credentials((authority / "ca.pem").read_bytes(), key, chain)


def heard(port: int, shown: Any, client: int) -> list[Any]:
    """What a server says to one who greets as a client, and how its stream ends; without TLS if nothing is shown."""
    address = f"127.0.0.1:{port}"
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.secure_channel(address, shown, options) if shown else grpc.insecure_channel(address, options)
    incoming, found = Incoming(Limits(message_bytes=0), {What.WELCOME, What.END}), list[Any]()
    hello = {"client": client, "protocol": PROTOCOL, "version": version()}
    with channel:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(outgoing(Head(What.HELLO), hello), timeout=20)
        try:
            for piece in call:
                received = incoming.feed(piece)
                if received is not None:
                    found.append((received.head.what, received.body.get("error")))
        except grpc.RpcError:
            pass
        return [*found, call.code().name]


@dataclasses.dataclass
class Reported:
    """What came of a run during which others came."""

    federation: Federation
    records: list[Any]
    strangers: dict[str, list[Any]]
    joined: list[int]
    earlier: tuple[int, str]
    later: str


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Generator[Reported]:
    """One run of three rounds: strangers come after the first, another process as client 1 after the second."""
    folder, certs, foreign = (tmp_path_factory.mktemp(name) for name in ("run", "certs", "foreign"))
    for each in (certs, foreign):
        make_certificates(each, Order(server=("localhost",), clients=(0, 1)))
    secured = f"transport.certificates={certs}"
    processes: list[Any] = []
    try:
        with served(folder, *SETTING, secured, clients=1, of_clients=[secured]) as federation:
            hub = federation.clients.hub
            where = (f"server=127.0.0.1:{hub.port}", "client_id=1", f"save_dir={folder / 'earlier'}", "device=cpu")
            earlier = subprocess.Popen(
                [*program("main"), "transport=grpc", "role=client", *where, secured],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            processes.append(earlier)
            records = [federation.step()]
            strangers = {
                "the right one": heard(hub.port, credentials(certs, "client-1", certs), 1),
                "another number": heard(hub.port, credentials(certs, "client-0", certs), 1),
                "the server": heard(hub.port, credentials(certs, "server", certs), 1),
                "no certificate": heard(hub.port, credentials(certs, None, certs), 1),
                "another authority": heard(hub.port, credentials(certs, "client-1", foreign), 1),
                "no TLS": heard(hub.port, None, 1),
            }
            records.append(federation.step())
            joined = [seen.joined for seen in hub.seen]
            later = start_client(1, hub.port, folder / "later", secured)
            processes.append(later)
            _, errors = earlier.communicate(timeout=END_S)
            with hub.changed:
                assert hub.changed.wait_for(lambda: 1 in hub.connections, END_S)
            records.append(federation.step())
            joined += [seen.joined for seen in hub.seen]
        yield Reported(federation, records, strangers, joined, (earlier.returncode, errors), later.error())
    finally:
        for process in processes:
            process.kill()


def test_the_bits_are_those_of_a_run_in_one_process(reported: Reported, configure) -> None:
    local = Federation(configure(*SETTING))
    expected = [local.step() for _ in range(3)]
    assert same(weights(reported.federation), weights(local))
    assert [lines for _, lines in reported.records] == [lines for _, lines in expected]
    assert [record.test_acc for record, _ in reported.records] == [record.test_acc for record, _ in expected]


def test_nobody_else_is_let_in(reported: Reported) -> None:
    left = (What.END, "the client has left")
    assert reported.strangers == {
        "the right one": [(What.WELCOME, None), left, "OK"],
        "another number": [(What.END, "client 1 came with the certificate of client 0"), "OK"],
        "the server": ["UNAVAILABLE"],
        "no certificate": ["UNAVAILABLE"],
        "another authority": ["UNAVAILABLE"],
        "no TLS": ["UNAVAILABLE"],
    }
    assert reported.joined == [1, 1, 1, 2]


def test_of_two_processes_with_one_number_the_later_counts(reported: Reported) -> None:
    status, errors = reported.earlier
    assert status == 1
    assert errors.splitlines()[-1].endswith(
        "expected a server that takes client 1: another process has come as this client"
    )
    assert "Traceback" not in errors
    assert reported.later == ""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "cutlayer.example"])
def test_other_machines_need_certificates_or_a_word(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    greeting = Greeting(lambda client, hello: {}, lambda client, facts: Limits(message_bytes=0))
    listeners: list[socket.socket] = []

    async def listen(hub: Hub) -> None:
        """On this machine only, whatever the host."""
        listeners.append(socket.create_server(("127.0.0.1", hub.config.port)))

    def is_open() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", config.port)) == 0

    monkeypatch.setattr(Hub, "_listen", listen)
    config = GrpcTransport(host=host, port=free_port())
    threads = threading.active_count()
    with pytest.raises(ConfigError, match=f"transport.insecure=true: {host} is open to other machines") as raised:
        Hub(config, 2, greeting)
    assert len(str(raised.value).splitlines()) == 1
    assert not is_open()
    assert threading.active_count() == threads
    hub = Hub(dataclasses.replace(config, insecure=True), 2, greeting)
    hub.network.release()
    assert is_open()
    listeners.pop().close()
