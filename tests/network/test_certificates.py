"""Certificates and TLS: what is made is checked by openssl and in handshakes of Python's ssl and of gRPC."""

import asyncio
import datetime
import errno
import importlib.util
import os
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutlayer import certificates
from cutlayer.runtime.ground.config import ConfigError

pytest.importorskip("cryptography", reason="the extra grpc is not installed")
grpc = pytest.importorskip("grpc", reason="the extra grpc is not installed")

from cutlayer.runtime.network.certificates import authority, tls  # noqa: E402  it needs cryptography
from cutlayer.runtime.network.certificates.authority import Order, make_certificates  # noqa: E402

NAMES = ("cutlayer.example", "10.0.0.1", "fd00::7")
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything for a server and two clients."""
    folder = tmp_path_factory.mktemp("certificates") / "certs"
    assert certificates.main([str(folder), f"server={','.join(NAMES)}", "clients=2"]) == 0
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of another authority."""
    folder = tmp_path_factory.mktemp("foreign")
    make_certificates(folder, Order(server=NAMES, clients=(0, 1)))
    return folder


@pytest.fixture(scope="module")
def ended(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of the first authority that were valid for a day, long ago."""
    folder = tmp_path_factory.mktemp("ended")
    for name in ("ca.pem", "ca.key"):
        shutil.copy(certs / name, folder)
    make_certificates(folder, Order(server=NAMES, clients=(0, 1), days=1), now=LONG_AGO)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stems(folder: Path) -> set[str]:
    """What is in a folder, each certificate with its key; nothing else is there."""
    found = {path.stem for path in folder.iterdir()}
    assert {path.name for path in folder.iterdir()} == {f"{stem}.{end}" for stem in found for end in ("pem", "key")}
    return found


# ---------------------------------------------------------------------- what is made, as openssl sees it


def openssl(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["openssl", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def verifies(certs: Path, stem: str, *more: str) -> bool:
    done = openssl("verify", "-x509_strict", "-CAfile", certs / "ca.pem", *more, certs / f"{stem}.pem")
    assert done.returncode == 0 or "verification failed" in done.stderr, done.stderr
    return done.returncode == 0


@needs_openssl
def test_openssl_verifies_each_certificate_for_its_own_purpose_only(certs: Path, foreign: Path, ended: Path) -> None:
    assert stems(certs) == {"ca", "server", "client-0", "client-1"}
    assert verifies(certs, "server", "-purpose", "sslserver")
    assert not verifies(certs, "server", "-purpose", "sslclient")
    for stem in ("client-0", "client-1"):
        assert verifies(certs, stem, "-purpose", "sslclient")
        assert not verifies(certs, stem, "-purpose", "sslserver")
        assert verifies(certs, stem, "-verify_hostname", stem)
    for name in ("cutlayer.example", "localhost"):
        assert verifies(certs, "server", "-verify_hostname", name)
    for address in ("10.0.0.1", "127.0.0.1", "::1", "fd00::7"):
        assert verifies(certs, "server", "-verify_ip", address)
    assert not verifies(certs, "server", "-verify_hostname", "other.example")
    assert not verifies(certs, "server", "-verify_ip", "10.0.0.2")
    assert not verifies(certs, "client-0", "-verify_hostname", "client-1")
    assert openssl("verify", "-CAfile", certs / "ca.pem", foreign / "client-0.pem").returncode != 0
    late = openssl("verify", "-CAfile", certs / "ca.pem", ended / "client-0.pem")
    assert "certificate has expired" in late.stderr


@needs_openssl
def test_openssl_reads_keys_dates_and_limits(certs: Path, tmp_path: Path) -> None:
    for stem in stems(certs):
        key = openssl("pkey", "-in", certs / f"{stem}.key", "-pubout").stdout
        assert key
        assert openssl("x509", "-in", certs / f"{stem}.pem", "-noout", "-pubkey").stdout == key
        shown = openssl("x509", "-in", certs / f"{stem}.pem", "-noout", "-text").stdout
        assert "ASN1 OID: prime256v1" in shown
        is_authority = stem == "ca"
        assert ("CA:TRUE, pathlen:0" in shown, "CA:FALSE" in shown) == (is_authority, not is_authority)
        assert ("Certificate Sign, CRL Sign" in shown) == is_authority
        # Valid for 825 days, the authority for more.
        for days, is_valid in ((824, True), (826, is_authority)):
            ends = openssl("x509", "-in", certs / f"{stem}.pem", "-noout", "-checkend", days * 86400)
            assert (ends.returncode == 0) == is_valid, (stem, days)
    # A client's key signs for nobody else: what it issues is not verified.
    request, forged = tmp_path / "request", tmp_path / "forged.pem"
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", tmp_path / "key")
    assert openssl("req", "-new", *new, "-subj", "/CN=client-1", "-out", request).returncode == 0
    signer = ("-CA", certs / "client-0.pem", "-CAkey", certs / "client-0.key", "-set_serial", 1)
    assert openssl("x509", "-req", "-in", request, *signer, "-out", forged).returncode == 0
    chain = ("-CAfile", certs / "ca.pem", "-untrusted", certs / "client-0.pem")
    assert "invalid CA certificate" in openssl("verify", *chain, forged).stderr


# ---------------------------------------------------------------------- the folder


def test_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_certificates(tmp_path / "certs", Order(server=("localhost",), clients=(0,)))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "certs").iterdir()}
    assert modes == {
        f"{stem}.{end}": mode for stem in ("ca", "server", "client-0") for end, mode in (("key", 0o600), ("pem", 0o644))
    }
    assert (tmp_path / "certs").stat().st_mode & 0o777 == 0o700


def test_more_clients_are_added_and_nothing_is_overwritten_unless_renewed(certs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(certs, tmp_path / "certs")
    before = contents(folder)
    for arguments in (["clients=2"], ["clients=3", "client_id=7"], ["server=10.0.0.1"], ["client_id=[1,7]"]):
        assert certificates.main([str(folder), *arguments]) == 0
    after = contents(folder)
    assert stems(folder) == {"ca", "server", *(f"client-{client}" for client in (0, 1, 2, 7))}
    assert before.items() <= after.items()
    for client in (2, 7):
        tls.client_credentials(folder, client)
    assert certificates.main([str(folder), "server=new.example", "client_id=1", "renew=true"]) == 0
    renewed = contents(folder)
    changed = {name for name in after if renewed[name] != after[name]}
    assert changed == {"server.pem", "server.key", "client-1.pem", "client-1.key"}
    tls.server_credentials(folder)
    tls.client_credentials(folder, 1)


def test_a_client_keeps_a_key_whose_certificate_was_never_written(certs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(certs, tmp_path / "certs")
    key = (folder / "client-1.key").read_bytes()
    (folder / "client-1.pem").unlink()
    (folder / "client-0.key").unlink()  # moved to the client's machine: its certificate is not made anew
    (folder / ".new-killed").mkdir()
    make_certificates(folder, Order(clients=(0, 1)))
    assert (folder / "client-1.key").read_bytes() == key
    tls.client_credentials(folder, 1)
    missing = {"client-0.key"}
    assert {path.name for path in folder.iterdir()} == contents(certs).keys() - missing


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_failure_leaves_the_folder_as_it_was(
    certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, failure: BaseException, at: int
) -> None:
    old, new = shutil.copytree(certs, tmp_path / "old"), tmp_path / "deep" / "new"
    before = contents(old)
    synced = []

    def full(handle: int) -> None:
        synced.append(handle)
        if len(synced) > at:
            raise failure

    monkeypatch.setattr(authority.os, "fsync", full)
    for folder in (old, new):
        synced.clear()
        status = certificates.main([str(folder), "server=localhost", "clients=5", "renew=true"])
        assert status == (1 if isinstance(failure, OSError) else 130)
        assert len(synced) == at + 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert contents(old) == before
    assert not new.parent.exists()


def test_two_at_work_in_one_folder_do_not_mix(certs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(certs, tmp_path / "certs")
    with (
        authority._held(folder),
        pytest.raises(ConfigError, match="no other certificates.py"),
    ):
        make_certificates(folder, Order(clients=(2,)))
    assert contents(folder) == contents(certs)


# ---------------------------------------------------------------------- one clear line


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        ([], "name what to make: server="),
        (["client=1"], "client: no such key; did you mean clients?"),
        (["clients=0"], "clients=0: expected a whole number from 1"),
        (["clients=0-3"], "clients=0-3: expected a whole number"),
        (["client_id=1,x"], "client_id=x: expected numbers of clients"),
        (["clients=1", "clients=2"], "clients=2: expected one value"),
        (["clients=1", "days=0"], "days=0: expected a whole number from 1"),
        (["clients=1", "days=36501"], "days=36501: expected a number of days from 1 to 36500"),
        (["clients=1", "renew=yes"], "renew=yes: expected true or false"),
        (["server=10.0.0.1:50505"], "server=10.0.0.1:50505: expected names or addresses of the server, without ports"),
        (["server=0.0.0.0"], "server=0.0.0.0: expected names or addresses"),
        (["server=a,,b"], "server='': expected names"),
        (["server=a b"], "server=a b: expected names"),
        (["server=10.0.0.256"], "server=10.0.0.256: expected names"),
        (["server=client-3"], "server=client-3: expected names"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_makes_nothing(
    arguments: list[str], reported: str, tmp_path: Path, capsys: Any
) -> None:
    assert certificates.main([str(tmp_path / "certs"), *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(reported), line
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    without(monkeypatch, "cryptography")
    assert certificates.main([str(tmp_path / "certs"), "clients=1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert 'pip install -e ".[grpc]"' in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "reported"),
    [
        (lambda folder, foreign: (folder / "ca.key").unlink(), "ca.key is not there"),
        (lambda folder, foreign: (folder / "ca.pem").unlink(), "there are certificates, but no ca.pem"),
        (lambda folder, foreign: shutil.copy(foreign / "ca.key", folder), "ca.pem and ca.key that belong together"),
        (lambda folder, foreign: shutil.copy(foreign / "server.pem", folder), "issued by the authority in ca.pem"),
        (lambda folder, foreign: shutil.copy(foreign / "server.key", folder), "server.key that belong together"),
        (lambda folder, foreign: (folder / "ca.pem").write_text("no"), "a certificate in PEM form in ca.pem"),
        (lambda folder, foreign: (folder / "ca.key").write_text("no"), "a key in PEM form in ca.key"),
    ],
)
def test_a_folder_that_does_not_fit_is_reported_and_left_alone(
    certs: Path, foreign: Path, tmp_path: Path, spoil: Callable[[Path, Path], Any], reported: str
) -> None:
    folder = shutil.copytree(certs, tmp_path / "certs")
    spoil(folder, foreign)
    before = contents(folder)
    with pytest.raises(ConfigError, match=reported):
        make_certificates(folder, Order(server=NAMES, clients=(5,)))
    assert contents(folder) == before


def test_other_names_for_the_server_need_a_renewal(certs: Path, capsys: Any) -> None:
    before = contents(certs)
    assert certificates.main([str(certs), "server=other.example", "clients=2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cutlayer.example" in line
    assert "renew=true" in line
    assert contents(certs) == before


# ---------------------------------------------------------------------- credentials from a folder


def encrypt(folder: Path, foreign: Path, ended: Path) -> None:
    key = authority.serialization.load_pem_private_key((folder / "server.key").read_bytes(), None)
    form = authority.serialization
    hidden = form.BestAvailableEncryption(b"secret")
    (folder / "server.key").write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, hidden))


@pytest.mark.parametrize(
    ("spoil", "reported"),
    [
        (lambda folder, foreign, ended: (folder / "server.pem").unlink(), "there is no server.pem"),
        (lambda folder, foreign, ended: shutil.rmtree(folder), "there is no ca.pem"),
        (lambda folder, foreign, ended: (folder / "ca.pem").write_text("no"), "in PEM form in ca.pem"),
        (lambda folder, foreign, ended: shutil.copy(foreign / "server.key", folder), "the certificate of that key"),
        (lambda folder, foreign, ended: shutil.copy(foreign / "ca.pem", folder), "issued by the authority in ca.pem"),
        (encrypt, "server.key without a password"),
        (
            lambda folder, foreign, ended: [shutil.copy(ended / f"server.{end}", folder) for end in ("pem", "key")],
            "server.pem valid now; it is from 2019-12-31 00:00 to 2020-01-02 00:00 UTC",
        ),
        (
            lambda folder, foreign, ended: [
                shutil.copy(folder / f"client-0.{end}", folder / f"server.{end}") for end in ("pem", "key")
            ],
            "server.pem to be for a server",
        ),
    ],
)
def test_a_server_learns_what_is_wrong_with_its_files(
    certs: Path, foreign: Path, ended: Path, tmp_path: Path, spoil: Callable[[Path, Path, Path], Any], reported: str
) -> None:
    folder = shutil.copytree(certs, tmp_path / "certs")
    tls.server_credentials(folder)
    spoil(folder, foreign, ended)
    with pytest.raises(ConfigError) as raised:
        tls.server_credentials(folder)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(f"transport.certificates={folder}: expected ")
    assert reported in line
    assert f"`python certificates.py {folder} server=HOST`" in line


def test_a_client_learns_what_is_wrong_with_its_files(certs: Path, ended: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(certs, tmp_path / "certs")
    tls.client_credentials(folder, 1)
    for wrong, reported in ((2, "there is no client-2.pem"), (0, "client-0.pem to name client-0")):
        for end in ("pem", "key"):
            shutil.copy(folder / f"client-1.{end}", folder / f"client-0.{end}")
        with pytest.raises(ConfigError) as raised:
            tls.client_credentials(folder, wrong)
        assert reported in str(raised.value)
        assert f"`python certificates.py {folder} client_id={wrong}`" in str(raised.value)
    with pytest.raises(ConfigError, match="client-0.pem valid now"):
        tls.client_credentials(ended, 0)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let a package look as if it were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name != package else None)


def test_credentials_say_what_to_install(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "grpc")
    for make in (lambda: tls.server_credentials(certs), lambda: tls.client_credentials(certs, 0)):
        with pytest.raises(ConfigError, match=r"transport=grpc: .*pip install -e \"\.\[grpc\]\""):
            make()


def test_without_the_library_a_certificate_still_has_to_have_its_key(
    certs: Path, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "cryptography")
    folder = shutil.copytree(certs, tmp_path / "certs")
    tls.client_credentials(folder, 0)
    shutil.copy(foreign / "client-0.key", folder)
    with pytest.raises(ConfigError, match=r"client-0\.pem with the certificate of that key"):
        tls.client_credentials(folder, 0)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost", "LocalHost")),
        *((host, False) for host in ("0.0.0.0", "::", "[::]", "10.0.0.1", "128.0.0.1", "", "*", "localhost.example")),
        *((host, False) for host in ("::ffff:127.0.0.1", "127.1", "::1%lo", "cutlayer.example", "127.0.0.1.example")),
    ],
)
def test_loopback_is_what_no_other_machine_reaches(host: str, is_loopback: bool) -> None:
    assert tls.is_loopback(host) is is_loopback


@pytest.mark.parametrize(
    ("common", "alternative", "client"),
    [
        ([b"client-7"], [b"client-7"], 7),
        ([b"client-0"], [b"10.0.0.1", b"client-0"], 0),
        ([b"client-7"], [b"client-8"], None),
        ([b"client-7"], [], None),
        ([], [b"client-7"], None),
        ([b"client-7"], [b"client-7", b"client-8"], None),
        ([b"client-7", b"client-7"], [b"client-7"], None),
        ([b"cutlayer server"], [b"client-7"], None),
        ([b"client-07"], [b"client-07"], None),
        ([b"client-7\n"], [b"client-7\n"], None),
        ([b"client--7"], [b"client--7"], None),
        ([b"client-7"], [b"client-7.example"], None),
        ([b"client-7.example"], [b"client-7"], None),
        ([b"xclient-7"], [b"xclient-7"], None),
        ([b"client-9999999999"], [b"client-9999999999"], None),
    ],
)
def test_a_certificate_speaks_for_one_client_or_for_none(
    common: list[bytes], alternative: list[bytes], client: int | None
) -> None:
    names = {"x509_common_name": common, "x509_subject_alternative_name": alternative}
    assert tls.peer_client({"transport_security_type": [b"ssl"], **names}) == client
    assert tls.peer_client({"transport_security_type": [b"insecure"], **names}) is None
    assert tls.peer_client(names) is None


# ---------------------------------------------------------------------- handshakes with Python's ssl


def context(side: int, authority_of: Path, stem: str | None, folder: Path) -> ssl.SSLContext:
    """A party that trusts one folder's authority and shows a certificate of another's, or none."""
    made = ssl.SSLContext(side)
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(authority_of / "ca.pem")
    if stem is not None:
        made.load_cert_chain(folder / f"{stem}.pem", folder / f"{stem}.key")
    return made


def shake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> Any:
    """A handshake in memory to its end; the client's certificate as the server has it, or the error of either."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    parties = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    waiting = set(range(2))
    for _ in range(10):
        for at in sorted(waiting):
            try:
                parties[at].do_handshake()
                waiting.discard(at)
            except ssl.SSLWantReadError:
                pass
        if not waiting:
            return parties[1].getpeercert()
    raise AssertionError("the handshake does not end")


def test_python_ssl_takes_the_right_parties_and_refuses_the_others(certs: Path, foreign: Path, ended: Path) -> None:
    def run(
        trusted: Path = certs,
        server: tuple[str, Path] = ("server", certs),
        client: tuple[str | None, Path] = ("client-1", certs),
        host: str = "10.0.0.1",
    ) -> Any:
        parties = (
            context(ssl.PROTOCOL_TLS_SERVER, certs, *server),
            context(ssl.PROTOCOL_TLS_CLIENT, trusted, *client),
        )
        return shake(*parties, host)

    for host in (*NAMES, "localhost", "127.0.0.1", "::1"):
        seen = run(host=host)
        assert seen["subject"] == ((("commonName", "client-1"),),)
        assert seen["subjectAltName"] == (("DNS", "client-1"),)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"client": (None, certs)}, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        ({"client": ("client-1", foreign)}, "CERTIFICATE_VERIFY_FAILED"),
        ({"client": ("client-1", ended)}, "certificate has expired"),
        ({"client": ("server", certs)}, "unsuitable certificate purpose"),
        ({"trusted": foreign}, "CERTIFICATE_VERIFY_FAILED"),
        ({"server": ("client-0", certs), "host": "client-0"}, "unsuitable certificate purpose"),
        ({"server": ("server", ended)}, "certificate has expired"),
        ({"host": "10.0.0.2"}, "IP address mismatch"),
        ({"host": "other.example"}, "Hostname mismatch"),
    ]
    for parties, reason in refused:
        with pytest.raises(ssl.SSLError) as raised:
            run(**parties)
        assert reason in str(raised.value), parties


# ---------------------------------------------------------------------- handshakes with gRPC

METHOD = "/test/who"


async def who(credentials: Any, port: int, host: str = "127.0.0.1", called: str | None = None) -> str:
    """The number that a server gives back for us, called by its host or otherwise, or the refusal's status and text."""
    options = [] if called is None else [("grpc.ssl_target_name_override", called)]
    async with grpc.aio.secure_channel(f"{host}:{port}", credentials, options) as channel:
        call = channel.unary_unary(METHOD, request_serializer=None, response_deserializer=None)
        try:
            return (await call(b"", timeout=20)).decode()
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"


async def serve(credentials: Any, seen: list[int | None]) -> tuple[Any, int]:
    """A server of raw bytes on a free port of this machine that tells each client its number."""

    async def answer(request: bytes, call: Any) -> bytes:
        seen.append(tls.peer_client(call.auth_context()))
        return str(seen[-1]).encode()

    server = grpc.aio.server()
    handlers = {"who": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    return server, port


def shown(trusted: Path, stem: str | None, folder: Path) -> Any:
    """Credentials of gRPC without any of our checks."""
    key, chain = ((folder / f"{stem}.{end}").read_bytes() if stem else None for end in ("key", "pem"))
    return grpc.ssl_channel_credentials((trusted / "ca.pem").read_bytes(), key, chain)


def test_grpc_takes_the_right_parties_and_refuses_the_others(certs: Path, foreign: Path, ended: Path) -> None:
    seen: list[int | None] = []

    async def run() -> None:
        server, port = await serve(tls.server_credentials(certs), seen)
        try:
            for client in (0, 1):
                for host in ("127.0.0.1", "localhost"):
                    assert await who(tls.client_credentials(certs, client), port, host) == str(client)
            wrong = {
                "no certificate": shown(certs, None, certs),
                "of another authority": shown(certs, "client-1", foreign),
                "expired": shown(certs, "client-1", ended),
                "a server's": shown(certs, "server", certs),
                "another authority's server": shown(foreign, "client-1", certs),
            }
            for which, credentials in wrong.items():
                answer = await who(credentials, port)
                assert answer.startswith("UNAVAILABLE"), (which, answer)
            answer = await who(tls.client_credentials(certs, 1), port, called="other.example")
            assert answer.startswith("UNAVAILABLE"), answer
            assert "Hostname Verification Check failed" in answer, answer
            assert seen == [0, 0, 1, 1]
            assert await who(tls.client_credentials(certs, 1), port, called="cutlayer.example") == "1"
        finally:
            await server.stop(None)

    asyncio.run(run())


@pytest.mark.parametrize(("stem", "folder"), [("client-0", "certs"), ("server", "ended"), ("server", "foreign")])
def test_a_grpc_client_refuses_who_is_no_server(request: Any, certs: Path, stem: str, folder: str) -> None:
    source = request.getfixturevalue(folder)
    pair = ((source / f"{stem}.key").read_bytes(), (source / f"{stem}.pem").read_bytes())
    posing = grpc.ssl_server_credentials([pair], (certs / "ca.pem").read_bytes(), require_client_auth=True)
    seen: list[int | None] = []

    async def run() -> str:
        server, port = await serve(posing, seen)
        try:
            return await who(tls.client_credentials(certs, 1), port)
        finally:
            await server.stop(None)

    answer = asyncio.run(run())
    assert answer.startswith("UNAVAILABLE"), answer
    assert "CERTIFICATE_VERIFY_FAILED" in answer, answer
    assert seen == []


def test_without_tls_nobody_is_anyone() -> None:
    seen: list[int | None] = []

    async def run() -> str:
        server, port = await serve(grpc.local_server_credentials(), seen)
        try:
            return await who(grpc.local_channel_credentials(), port)
        finally:
            await server.stop(None)

    assert asyncio.run(run()) == "None"
    assert seen == [None]
