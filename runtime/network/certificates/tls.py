"""TLS with certificates on both sides: credentials from a folder of files, and who a peer's certificate speaks for.

The files are those that `certificates.py` makes; others of the same names, from your own authority, do as well.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.util
import ipaddress
import logging
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.extras import install

if TYPE_CHECKING:
    import grpc
    from cryptography import x509

log = logging.getLogger(__name__)

CERTIFICATES_KEY = "transport.certificates"
CA = "ca.pem"
CA_KEY = "ca.key"
SERVER_NAME = "server"
_CLIENT = re.compile(rb"client-(0|[1-9][0-9]{0,8})")


def client_name(client: int) -> str:
    """What the certificate of a client says, as common name and as alternative name; also the stem of its files."""
    return f"client-{client}"


def number_of(stem: str) -> int:
    """The client of such a name."""
    return int(stem.removeprefix("client-"))


def named_client(common_names: Iterable[bytes], alternative_names: Iterable[bytes]) -> int | None:
    """The client that a certificate with these names speaks for; None unless both kinds name the same single one."""
    spoken = {match[1] for name in alternative_names if (match := _CLIENT.fullmatch(name))}
    common = [match[1] if (match := _CLIENT.fullmatch(name)) else None for name in common_names]
    return int(common[0]) if len(common) == 1 and common[0] is not None and spoken == {common[0]} else None


def peer_client(auth_context: Mapping[str, Iterable[bytes]]) -> int | None:
    """The client that a peer's verified certificate speaks for, from a gRPC call's `auth_context()`.

    None without TLS, and for a certificate that names no client, or more than one.
    """
    if set(auth_context.get("transport_security_type", ())) != {b"ssl"}:
        return None
    alternative = auth_context.get("x509_subject_alternative_name", ())
    return named_client(auth_context.get("x509_common_name", ()), alternative)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on `host`: 127.0.0.0/8, ::1, localhost."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if bare.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return False  # a name: where it leads to is for others to say
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_loopback
    return address == ipaddress.IPv6Address("::1")


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """Credentials of a server that takes only clients with a certificate of the folder's authority.

    Each handshake takes the files of its moment: those that have been renewed are read anew, and as long as new ones
    cannot be used, those before them count.

    Raises:
        ConfigError: a file is missing, cannot be read, has ended or does not go with the others; or gRPC is missing.
    """
    library = _grpc()
    files = _Files(folder, SERVER_NAME, f"python certificates.py {folder} server=HOST")
    known = [files.state()]

    def read() -> grpc.ServerCertificateConfiguration:
        key, chain, authority = files.checked()
        return library.ssl_server_certificate_configuration([(key, chain)], root_certificates=authority)

    def renewed() -> grpc.ServerCertificateConfiguration | None:  # in a thread of gRPC's
        state = files.state()
        if state == known[0]:
            return None
        known[0] = state
        try:
            made = read()
        except ConfigError as error:
            log.warning("the certificates before these still count: %s", error)
            return None
        log.info("the certificates in %s have been read anew", folder)
        return made

    return library.dynamic_ssl_server_credentials(read(), renewed, require_client_authentication=True)


def client_credentials(folder: Path, client: int) -> grpc.ChannelCredentials:
    """Credentials of one client, which takes only a server with a certificate of the folder's authority.

    Raises:
        ConfigError: as in `server_credentials`, or the certificate is another client's.
    """
    library = _grpc()
    files = _Files(folder, client_name(client), f"python certificates.py {folder} client_id={client}")
    key, chain, authority = files.checked()
    return library.ssl_channel_credentials(authority, key, chain)


@dataclass(frozen=True)
class _Files:
    """What one party needs of a folder: ca.pem, <stem>.pem, <stem>.key."""

    folder: Path
    stem: str
    command: str
    """What makes them."""

    def state(self) -> list[object]:
        """What differs when one of the files has been written anew."""
        return [file_state(self.folder / name) for name in (CA, f"{self.stem}.pem", f"{self.stem}.key")]

    def checked(self) -> tuple[bytes, bytes, bytes]:
        """Private key, certificate chain and authority, in PEM form, once they have been found to go together."""
        authority, chain, key = (self._read(name) for name in (CA, f"{self.stem}.pem", f"{self.stem}.key"))
        self._check_pair()
        if importlib.util.find_spec("cryptography") is not None:
            self._check_certificates(authority, chain)
        return key, chain, authority

    def _wrong(self, expected: str) -> ConfigError:
        return ConfigError(
            CERTIFICATES_KEY, self.folder, f"{expected}; `{self.command}` makes what is needed where {CA_KEY} is"
        )

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError as error:
            raise self._wrong(f"a folder with {CA}, {self.stem}.pem and {self.stem}.key; there is no {name}") from error
        except OSError as error:
            raise self._wrong(f"a folder whose {name} can be read ({error.strerror or error})") from error

    def _check_pair(self) -> None:
        """The certificate has this key, and both can be used as they are, without a password."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            paths = (self.folder / f"{self.stem}.pem", self.folder / f"{self.stem}.key")
            # A password is never asked for on the terminal.
            context.load_cert_chain(*paths, password="")
        except (ssl.SSLError, ValueError) as error:
            text = f"{self.stem}.key without a password in it, and {self.stem}.pem with the certificate of that key"
            raise self._wrong(text) from error
        try:
            context.load_verify_locations(self.folder / CA)
        except ssl.SSLError as error:
            raise self._wrong(f"certificates in PEM form in {CA}") from error

    def _check_certificates(self, authority: bytes, chain: bytes) -> None:
        """What a handshake would refuse without saying why: dates, issuer, purpose, name."""
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID

        try:
            issuers, own = x509.load_pem_x509_certificates(authority), x509.load_pem_x509_certificates(chain)
        except ValueError as error:
            raise self._wrong(f"certificates in PEM form in {CA} and {self.stem}.pem ({error})") from error
        for name, certificates in ((CA, issuers), (f"{self.stem}.pem", own)):
            for certificate in certificates:
                self._check_dates(name, certificate)
        if not any(issued_by(own[-1], issuer) for issuer in issuers):
            raise self._wrong(f"{self.stem}.pem to be issued by the authority in {CA}")
        wanted = ExtendedKeyUsageOID.SERVER_AUTH if self.stem == SERVER_NAME else ExtendedKeyUsageOID.CLIENT_AUTH
        with contextlib.suppress(x509.ExtensionNotFound):  # without this extension a certificate is for anything
            usage = own[0].extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            if wanted not in usage:
                raise self._wrong(f"{self.stem}.pem to be for a {'server' if self.stem == SERVER_NAME else 'client'}")
        if self.stem != SERVER_NAME and client_of(own[0]) != number_of(self.stem):
            raise self._wrong(f"{self.stem}.pem to name {self.stem} as common name and as alternative name")

    def _check_dates(self, name: str, certificate: x509.Certificate) -> None:
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        now = datetime.datetime.now(datetime.UTC)
        if not start <= now <= end:
            span = f"from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"
            made = "" if now < start or name == CA else " (with renew=true)"
            raise self._wrong(f"{name} valid now; it is {span}, and here it is {now:%Y-%m-%d %H:%M}{made}")


def file_state(path: Path) -> object:
    """What differs when a file has been written anew; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether `issuer`'s key has signed the certificate, under its name."""
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, TypeError, ValueError):
        return False
    return True


def client_of(certificate: x509.Certificate) -> int | None:
    """The client that a certificate speaks for, as `peer_client` finds it in a connection."""
    from cryptography import x509

    common = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    texts = [*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.UniformResourceIdentifier)]
    encoded = [name if isinstance(name, bytes) else name.encode() for name in common]
    return named_client(encoded, [text.encode() for text in texts])


def _grpc() -> Any:
    if importlib.util.find_spec("grpc") is None:
        raise ConfigError("transport", "grpc", f"the packages of the extra: {install('grpc')}")
    return importlib.import_module("grpc")
