"""Whom a server trusts while it runs: a client's certificate may end, or be revoked, while its session continues."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.extras import install
from cutlayer.runtime.network.certificates.revoked import REVOKED, read_revoked, serial_text
from cutlayer.runtime.network.certificates.tls import CERTIFICATES_KEY, file_state, peer_client

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Passport:
    """What a certificate says: for which client it speaks, its serial number, when it ends (seconds since 1970)."""

    client: int | None
    serial: str = ""
    ends: float = float("inf")


def passport(auth_context: Mapping[str, Iterable[bytes]]) -> Passport:
    """That of a peer, from a gRPC call's ``auth_context()``."""
    client = peer_client(auth_context)
    raw = next(iter(auth_context.get("x509_pem_cert", ())), None)
    if raw is None:
        return Passport(client)
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(raw)
    except ValueError:
        return Passport(None)  # of which nothing is known speaks for nobody
    return Passport(client, serial_text(certificate.serial_number), certificate.not_valid_after_utc.timestamp())


class Trust:
    """Which of the clients' certificates a server takes at this moment, though all of them were valid at a handshake.

    Raises:
        ConfigError: as ``read_revoked``, or certificates cannot be read without the package cryptography.
    """

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("cryptography") is None:
            raise ConfigError(
                CERTIFICATES_KEY, folder, f"the packages of the extra, with cryptography: {install('grpc')}"
            )
        self._folder = folder
        self._state = file_state(folder / REVOKED)
        self._revoked = read_revoked(folder)

    def objection(self, shown: Passport) -> tuple[str, bool]:
        """Why a certificate is not taken, "" if it is; and whether its client may come again, with a renewed one."""
        whose = "" if shown.client is None else f" of client {shown.client}"
        if self._revoked.has(shown.client, shown.serial):
            return f"the certificate{whose} is revoked", False
        if time.time() > shown.ends:
            return f"the certificate{whose} has ended", True
        return "", False

    def refresh(self) -> None:
        """Read the list of revoked certificates anew if it has changed; one that cannot be read changes nothing."""
        state = file_state(self._folder / REVOKED)
        if state == self._state:
            return
        self._state = state
        try:
            self._revoked = read_revoked(self._folder)
        except ConfigError as error:
            log.warning("the list before this one still counts: %s", error)
        else:
            log.info("%s has been read anew", self._folder / REVOKED)
