"""A certificate authority in a folder: makes the certificates of a server and its clients, and adds what is missing.

Keys are EC P-256. A server's certificate is for servers only and names the hosts under which clients reach it, a
client's is for clients only and names its number. Needs the package cryptography.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import ipaddress
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import sync_folder
from cutlayer.runtime.ground.folders import remove_empty, standing
from cutlayer.runtime.ground.locks import FileLock
from cutlayer.runtime.network.certificates.revoked import REVOKED, read_revoked, serial_text
from cutlayer.runtime.network.certificates.tls import CA, CA_KEY, SERVER_NAME, client_name, issued_by, number_of

T = TypeVar("T")

CA_DAYS = 3650
LOCAL = ("localhost", "127.0.0.1", "::1")
"""Names of every server: what a client at the end of a tunnel calls it."""
_MOST_DAYS = 36500  # 100 years
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.IGNORECASE)


@dataclass(frozen=True)
class Order:
    """What to make: certificates of a server with these names, and of these clients, valid for so many days.

    Attributes:
        revoke: clients none of whose certificates made so far is taken any more.
    """

    server: tuple[str, ...] = ()
    clients: tuple[int, ...] = ()
    days: int = 825
    renew: bool = False
    revoke: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "server", tuple(host_name(name) for name in self.server))
        for key, clients in (("client_id", self.clients), ("revoke", self.revoke)):
            if clients and min(clients) < 0:
                raise ConfigError(key, min(clients), "numbers of clients, from 0 on")
        if not 1 <= self.days <= _MOST_DAYS:
            raise ConfigError("days", self.days, f"a number of days from 1 to {_MOST_DAYS}")


@dataclass(frozen=True)
class Done:
    """What was made and what was there already, by file stem, with the end of each certificate's validity."""

    made: dict[str, datetime.datetime]
    kept: dict[str, datetime.datetime]
    names: tuple[str, ...]
    """What the server's certificate names; () without one."""
    listed: bool = False
    """Whether the list of revoked certificates has changed, which the server then needs."""


def make_certificates(folder: Path, order: Order, now: datetime.datetime | None = None) -> Done:
    """Make what the order names and the folder lacks; with `renew` also what it has, but for the authority.

    All files are written elsewhere first, so that a failure leaves the folder as it was.

    Raises:
        ConfigError: the folder cannot be used, or what is in it does not fit the order.
    """
    with _held(folder) as staging:
        workshop = _Workshop(folder, staging, order, now or datetime.datetime.now(datetime.UTC))
        done = workshop.fill()
        workshop.deliver()
    return done


class _Workshop:
    """One order: reads the folder, writes new files to `staging`, and puts them in their places at the end."""

    def __init__(self, folder: Path, staging: Path, order: Order, now: datetime.datetime) -> None:
        self.folder, self.staging, self.order, self.now = folder, staging, order, now
        self.names = tuple(dict.fromkeys((*order.server, *LOCAL))) if order.server else ()
        self.revoked = read_revoked(folder)

    def fill(self) -> Done:
        """Write everything that is needed to `staging`."""
        made: dict[str, datetime.datetime] = {}
        kept: dict[str, datetime.datetime] = {}
        listed = self.revoked.text()
        has_authority = (self.folder / CA).exists()
        if self.order.revoke and not has_authority:
            raise self._wrong(f"the folder where the authority was made; there is no {CA}")
        for client in self.order.revoke:  # what is made below is valid
            self.revoked.clients[client] = set()
        self.authority, self.authority_key = self._old_authority() if has_authority else self._new_authority()
        (kept if has_authority else made)["ca"] = self.authority.not_valid_after_utc
        stems = [SERVER_NAME] if self.order.server or (self.folder / f"{SERVER_NAME}.pem").exists() else []
        renewed = {SERVER_NAME} if self.order.server and self.order.renew else set[str]()
        if self.order.renew:
            renewed |= {client_name(client) for client in self.order.clients}
        for stem in [*stems, *map(client_name, self.order.clients)]:
            old = None if stem in renewed else self._read_certificate(f"{stem}.pem")
            certificate = self._issue(stem, stem in renewed) if old is None else self._fitting(stem, old)
            (made if old is None else kept)[stem] = certificate.not_valid_after_utc
            if stem == SERVER_NAME:
                self.names = _hosts(certificate)
        changed = self.revoked.text() != listed
        if changed:
            self._write(REVOKED, self.revoked.text().encode(), 0o644)
        return Done(made, kept, self.names, changed)

    def deliver(self) -> None:
        """Move the new files to their places: each key before its certificate, as a certificate alone is worthless."""
        for path in sorted(self.staging.iterdir(), key=lambda path: (path.stem != "ca", path.stem, path.suffix)):
            path.replace(self.folder / path.name)
        sync_folder(self.folder)

    # ------------------------------------------------------------------ the authority

    def _old_authority(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        certificate = self._read_certificate(CA)
        key = self._read_key(CA_KEY)
        if key is None:
            raise self._wrong(f"the folder where the authority was made: {CA_KEY} is not there, only {CA}")
        if certificate is None or certificate.public_key() != key.public_key():
            raise self._wrong(f"{CA} and {CA_KEY} that belong together")
        if certificate.not_valid_after_utc <= self.now:
            ended = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
            raise self._wrong(f"an authority that is valid; {CA} ended on {ended}: name a new folder")
        return certificate, key

    def _new_authority(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        if (self.folder / f"{SERVER_NAME}.pem").exists() or any(self.folder.glob("client-*.pem")):
            raise self._wrong(f"the folder where the authority was made: there are certificates, but no {CA}")
        key = self._key(CA_KEY, renew=False)
        # A name of its own: with equal names, a certificate of another authority looks like a forged one.
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Cutlayer authority {os.urandom(4).hex()}")])
        end = self.now + datetime.timedelta(days=max(CA_DAYS, self.order.days))
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = (
            self._builder(name, name, key, end)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
            .add_extension(identifier, critical=False)
        )
        return self._write_certificate(CA, builder.sign(key, hashes.SHA256())), key

    # ------------------------------------------------------------------ server and clients

    def _fitting(self, stem: str, old: x509.Certificate) -> x509.Certificate:
        """A certificate that is there already, if it is what was ordered."""
        if not issued_by(old, self.authority):
            raise self._wrong(f"{stem}.pem to be issued by the authority in {CA}; with renew=true it is made anew")
        key = self._read_key(f"{stem}.key")
        if key is not None and key.public_key() != old.public_key():
            raise self._wrong(f"{stem}.pem and {stem}.key that belong together; with renew=true they are made anew")
        if stem == SERVER_NAME and not set(self.names) <= set(_hosts(old)):
            raise ConfigError(
                "server",
                ",".join(self.order.server),
                f"names that {SERVER_NAME}.pem has ({', '.join(_hosts(old))}), or renew=true besides, to make it anew",
            )
        return old

    def _issue(self, stem: str, renew: bool) -> x509.Certificate:
        key = self._key(f"{stem}.key", renew)
        is_server = stem == SERVER_NAME
        hosts = [_general_name(name) for name in self.names] if is_server else [x509.DNSName(stem)]
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if is_server else ExtendedKeyUsageOID.CLIENT_AUTH
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"cutlayer {SERVER_NAME}" if is_server else stem)])
        end = min(self.now + datetime.timedelta(days=self.order.days), self.authority.not_valid_after_utc)
        identifier = self.authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        signer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
        builder = (
            self._builder(subject, self.authority.subject, key, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(signer, critical=False)
        )
        certificate = builder.sign(self.authority_key, hashes.SHA256())
        if not is_server and (valid := self.revoked.clients.get(number_of(stem))) is not None:
            valid.add(serial_text(certificate.serial_number))
        return self._write_certificate(f"{stem}.pem", certificate)

    def _builder(
        self, subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, end: datetime.datetime
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now - datetime.timedelta(days=1))  # the clocks of other machines may be behind
            .not_valid_after(end)
        )

    # ------------------------------------------------------------------ files

    def _key(self, name: str, renew: bool) -> ec.EllipticCurvePrivateKey:
        """The key in the folder, or a new one in `staging`."""
        old = None if renew else self._read_key(name)
        if old is not None:
            return old
        key = ec.generate_private_key(ec.SECP256R1())
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        self._write(name, key.private_bytes(*form), 0o600)
        return key

    def _write_certificate(self, name: str, certificate: x509.Certificate) -> x509.Certificate:
        self._write(name, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        return certificate

    def _write(self, name: str, content: bytes, mode: int) -> None:
        handle = os.open(self.staging / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _read_certificate(self, name: str) -> x509.Certificate | None:
        return self._read(name, x509.load_pem_x509_certificate, "a certificate")

    def _read_key(self, name: str) -> ec.EllipticCurvePrivateKey | None:
        key = self._read(name, lambda content: serialization.load_pem_private_key(content, None), "a key")
        if key is None or isinstance(key, ec.EllipticCurvePrivateKey):
            return key
        raise self._wrong(f"an elliptic-curve key in {name}")

    def _read(self, name: str, load: Callable[[bytes], T], kind: str) -> T | None:
        """What a file of the folder holds; None where there is none."""
        try:
            return load((self.folder / name).read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._wrong(f"a folder whose {name} can be read ({error.strerror or error})") from error
        except (ValueError, TypeError) as error:
            raise self._wrong(f"{kind} in PEM form in {name}, without a password") from error

    def _wrong(self, expected: str) -> ConfigError:
        return ConfigError("folder", self.folder, expected)


@contextlib.contextmanager
def _held(folder: Path) -> Generator[Path]:
    """A new folder below `folder`, which is made if need be, to write to; afterwards it is gone again."""
    root, lock = standing(folder), None
    try:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            lock = FileLock.take(folder / ".lock")
            if lock is None:
                raise ConfigError("folder", folder, "a folder that no other certificates.py is at work in")
            for stale in folder.glob(".new-*"):  # of one that was killed
                shutil.rmtree(stale)
            staging = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
        except OSError as error:
            raise ConfigError(
                "folder", folder, f"a folder that can be written to ({error.strerror or error})"
            ) from error
        try:
            yield staging
        except OSError as error:
            raise ConfigError("folder", folder, f"room for files and leave to write them ({error})") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        if lock is not None:
            lock.release(remove=True)
        remove_empty(folder, root)


def _usage(*granted: str) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    names += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: name in granted for name in names})


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _hosts(certificate: x509.Certificate) -> tuple[str, ...]:
    """The hosts that a server's certificate names."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found: Sequence[str] = names.get_values_for_type(x509.DNSName)
    return (*found, *map(str, names.get_values_for_type(x509.IPAddress)))


def host_name(name: str) -> str:
    """A host that clients can connect to, a name or an address, in its usual spelling.

    Raises:
        ConfigError: it is none.
    """
    expected = "names or addresses of the server, without ports, such as cutlayer.example,10.0.0.1"
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        labels = name.split(".")
        fits = len(name) <= 253 and all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit()
        if not fits or re.fullmatch(r"client-\d+", name, re.IGNORECASE):
            raise ConfigError("server", name, expected) from None
        return name.lower()
    if address.is_unspecified or address.is_multicast:
        raise ConfigError("server", name, f"{expected}; nobody can connect to this one")
    return str(address)
