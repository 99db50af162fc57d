"""Certificates while a server runs: renewed ones are read again, and one that ends or is revoked ends its session."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cutlayer import certificates
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.bounds import Limits
from cutlayer.runtime.network.certificates.revoked import REVOKED, Revoked, read_revoked
from cutlayer.runtime.network.wire import What
from cutlayer.runtime.transport import GrpcTransport
from tests.network.programs import until

x509 = pytest.importorskip("cryptography.x509", reason="the extra grpc is not installed")
pytest.importorskip("grpc", reason="the extra grpc is not installed")

from cutlayer.runtime.network.certificates.authority import Order, make_certificates  # noqa: E402
from cutlayer.runtime.network.client.link import ServerLink  # noqa: E402
from cutlayer.runtime.network.server import guard, hub  # noqa: E402
from cutlayer.runtime.network.server.audit import AUDIT, Audit  # noqa: E402
from cutlayer.runtime.network.server.hub import Greeting, Hub  # noqa: E402
from tests.network import raw  # noqa: E402

CLIENTS = 3


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    """Certificates of a server and three clients."""
    make_certificates(tmp_path / "certs", Order(server=("localhost",), clients=tuple(range(CLIENTS))))
    return tmp_path / "certs"


@pytest.fixture
def here(certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server with these certificates, which looks after them many times a second."""
    monkeypatch.setattr(hub, "_CARE_S", 0.05)
    greeting = Greeting(lambda *_: {}, lambda *_: Limits(message_bytes=0), audit=Audit(tmp_path))
    made = Hub(GrpcTransport(port=0, certificates=certs), CLIENTS, greeting)
    yield made
    made.close("the test is over")


def greets(server: Hub, client: int, folder: Path) -> ServerLink:
    link = ServerLink(f"127.0.0.1:{server.port}", client, GrpcTransport(certificates=folder))
    link.send(What.HELLO, {"client": client})
    link.send(What.HELLO, {})
    return link


def joins(server: Hub, client: int, folder: Path) -> ServerLink:
    """A client that is let in."""
    before = server.connections.get(client)
    link = greets(server, client, folder)
    link.receive((What.WELCOME,))
    until(lambda: server.connections.get(client) not in (None, before), "let in", 10)
    return link


def ended(link: ServerLink) -> dict[str, Any]:
    """The server's last word."""
    try:
        return dict(link.receive((What.END,)).body)
    finally:
        link.close()


def context(folder: Path, client: int = 0) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    made.load_cert_chain(folder / f"client-{client}.pem", folder / f"client-{client}.key")
    made.set_alpn_protocols(["h2"])
    return made


def shown(server: Hub, folder: Path) -> bytes:
    """The hash of the certificate that the server shows in a new handshake."""
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        context(folder).wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        certificate = secure.getpeercert(binary_form=True)
        assert certificate is not None
        return hashlib.sha256(certificate).digest()


def own(folder: Path, stem: str = "server") -> bytes:
    """The same of the file in the folder."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert((folder / f"{stem}.pem").read_text())).digest()


# ---------------------------------------------------------------------- renewed


def test_renewed_files_are_read_and_sessions_continue(here: Hub, certs: Path, tmp_path: Path) -> None:
    before = own(certs)
    link = joins(here, 1, certs)
    assert shown(here, certs) == before
    make_certificates(certs, Order(server=("localhost",), clients=(2,), renew=True))
    assert shown(here, certs) == own(certs) != before
    other = joins(here, 2, certs)  # with files of its own that are new, too
    assert sorted(here.connections) == [1, 2]
    for each in (link, other):
        each.close()


def test_files_that_cannot_be_used_change_nothing(here: Hub, certs: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, whole = own(certs), (certs / "server.pem").read_bytes()
    for spoilt in (b"", whole[:200], (certs / "client-0.pem").read_bytes()):
        (certs / "server.pem").write_bytes(spoilt)
        for _ in range(2):
            assert shown(here, certs) == before
    lines = [record.getMessage() for record in caplog.records if "still count" in record.getMessage()]
    assert len(lines) == 3  # not at each handshake
    (certs / "server.pem").write_bytes(whole)
    joins(here, 0, certs).close()


# ---------------------------------------------------------------------- ended


def test_a_certificate_that_ends_ends_its_session_and_a_renewed_one_is_let_in(
    here: Hub, certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day, soon = datetime.timedelta(days=1), datetime.timedelta(seconds=2)
    now = datetime.datetime.now(datetime.UTC)
    make_certificates(certs, Order(clients=(0,), days=1, renew=True), now=now - day + soon)
    link, other = joins(here, 0, certs), joins(here, 1, certs)
    assert ended(link) == {"error": "the certificate of client 0 has ended", "later": True}
    with pytest.raises(ConfigError, match="client-0.pem valid now"):
        greets(here, 0, certs)
    make_certificates(certs, Order(clients=(0,), renew=True))
    again = joins(here, 0, certs)
    assert sorted(here.connections) == [0, 1]
    for each in (again, other):
        each.close()


# ---------------------------------------------------------------------- revoked


def test_one_client_is_revoked_alone_and_comes_back_with_a_new_certificate(
    here: Hub, certs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stolen = shutil.copytree(certs, tmp_path / "stolen")
    links = [joins(here, client, certs) for client in range(CLIENTS)]
    assert certificates.main([str(certs), "revoke=1"]) == 0
    assert "revoked  all that client 1 had so far" in capsys.readouterr().out
    revoked = {"error": "the certificate of client 1 is revoked", "later": False}
    assert ended(links[1]) == revoked
    assert ended(greets(here, 1, certs)) == revoked
    assert certificates.main([str(certs), "client_id=1", "renew=true"]) == 0
    assert f"The server gets {certs / REVOKED}" in capsys.readouterr().out
    again = joins(here, 1, certs)
    assert ended(greets(here, 1, stolen)) == revoked
    assert sorted(here.connections) == [0, 1, 2]
    assert [here.seen[client].joined for client in range(CLIENTS)] == [1, 2, 1]
    for each in (links[0], links[2], again):
        each.close()
    here.close("the test is over")
    events = [json.loads(line) for line in (tmp_path / AUDIT).read_text().splitlines()]
    serials = [each["serial"] for each in events if each.get("client") == 1 and each["event"] == "joined"]
    made = [x509.load_pem_x509_certificate((folder / "client-1.pem").read_bytes()) for folder in (stolen, certs)]
    assert serials == [f"{certificate.serial_number:x}" for certificate in made]
    assert [each["why"] for each in events if each["event"] == "refused"] == [revoked["error"]] * 2


def test_a_list_that_cannot_be_read_leaves_the_one_before_it(
    here: Hub, certs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert certificates.main([str(certs), "revoke=2"]) == 0
    until(lambda: "read anew" in caplog.text, "read", 10)
    (certs / REVOKED).write_text("{")
    until(lambda: "still counts" in caplog.text, "reported", 10)
    assert ended(greets(here, 2, certs))["error"] == "the certificate of client 2 is revoked"
    joins(here, 0, certs).close()
    with pytest.raises(ConfigError, match="a folder whose revoked.json can be read"):
        Hub(here.config, CLIENTS, Greeting(lambda *_: {}, lambda *_: Limits(message_bytes=0)))


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "null", '{"client": {}}', '{"clients": []}', '{"clients": {"x": []}}', '{"clients": {"1": "a"}}'),
        *('{"clients": {"1": [null]}}', '{"serials": {}}', '{"serials": ["xyz"]}', "\x00\xff"),
    ],
)
def test_what_is_no_list_is_not_taken_for_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / REVOKED).write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError):
        read_revoked(tmp_path)


def test_the_list_is_what_was_written(tmp_path: Path) -> None:
    written = Revoked({3: {"5f3a", "1"}, 0: set()}, {"77aa"})
    (tmp_path / REVOKED).write_text(written.text())
    read = read_revoked(tmp_path)
    assert read == written
    assert read.has(0, "1")
    assert not read.has(3, "1")
    assert read.has(3, "2")
    assert not read.has(1, "2")
    assert all(read.has(client, "77aa") for client in (None, 1, 3))
    assert read_revoked(tmp_path / "nothing") == Revoked()
    (tmp_path / REVOKED).write_text('{"serials": ["00AB"]}')  # written by hand, as openssl shows it
    assert read_revoked(tmp_path).has(5, "ab")


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (("revoke=x",), "numbers of clients"),
        (("revoke=-1",), "numbers of clients"),
        (("revoke=1",), "there is no ca.pem"),
    ],
)
def test_what_cannot_be_revoked(
    tmp_path: Path, arguments: tuple[str, ...], reported: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert certificates.main([str(tmp_path / "none"), *arguments]) == 1
    assert reported in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------------- held


def test_a_handshake_that_is_not_finished_is_ended(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "GREETING_S", 0.3)
    monkeypatch.setattr(guard, "_IDLE_MS", 300)
    greeting = Greeting(lambda *_: {}, lambda *_: Limits(message_bytes=0))
    server = Hub(GrpcTransport(port=0, certificates=certs), CLIENTS, greeting)
    hello = ssl.MemoryBIO()
    half = context(certs).wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        half.do_handshake()
    first = hello.read()
    try:
        with raw.Crowd(server.port) as crowd, raw.Crowd(server.port, context(certs)) as secure:
            for said in (b"", first[:20], first):
                crowd.come(said)
            secure.come(raw.greeting())
            until(lambda: not crowd.open and not secure.open, "all ended", 10)
    finally:
        server.close("the test is over")


def test_one_client_has_so_many_streams_at_a_time(here: Hub, certs: Path) -> None:
    ready = context(certs, 2)
    with raw.Crowd(here.port, ready) as crowd:
        for _ in range(guard.STREAMS_EACH + 3):
            crowd.come(raw.greeting() + raw.request(1))
        until(lambda: here.refused[0] == 3, "refused", 10)
        assert f"more than {guard.STREAMS_EACH} streams of client 2" in here.refused[1]
        joins(here, 1, certs).close()
        assert ended(greets(here, 2, certs))["later"] is True
