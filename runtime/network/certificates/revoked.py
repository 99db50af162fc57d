"""Certificates that are not taken any more, though they have not ended: a list in the certificates' folder.

`python certificates.py certs revoke=3` writes it, and the server reads it anew whenever it changes. It is JSON:
``{"clients": {"3": ["5f3a"]}, "serials": ["77aa"]}`` revokes all certificates of client 3 but the one with the serial
number 5f3a (hexadecimal), which was made afterwards, and the single certificate 77aa.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from cutlayer.runtime.ground.config import ConfigError

REVOKED = "revoked.json"


def serial_text(serial: int) -> str:
    """A certificate's serial number as the list and the audit log have it."""
    return f"{serial:x}"


@dataclass
class Revoked:
    """The list: by client, the serial numbers that are valid all the same; and single serial numbers."""

    clients: dict[int, set[str]] = field(default_factory=dict[int, set[str]])
    serials: set[str] = field(default_factory=set[str])

    def has(self, client: int | None, serial: str) -> bool:
        """Whether a client's certificate with this number is revoked."""
        valid = None if client is None else self.clients.get(client)
        return serial in self.serials or (valid is not None and serial not in valid)

    def text(self) -> str:
        """The content of the file."""
        clients = {str(client): sorted(self.clients[client]) for client in sorted(self.clients)}
        return json.dumps({"clients": clients, "serials": sorted(self.serials)}, indent=1) + "\n"


def read_revoked(folder: Path) -> Revoked:
    """The list in a folder; an empty one where there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        text = (folder / REVOKED).read_text(encoding="utf-8")
    except FileNotFoundError:
        return Revoked()
    except (OSError, ValueError) as error:
        raise _wrong(folder, error) from None
    try:
        known: Any = json.loads(text)
        if not isinstance(known, dict) or not cast("dict[str, Any]", known).keys() <= {"clients", "serials"}:
            raise ValueError("its keys are clients and serials")
        lists = cast("dict[str, Any]", known)
        clients = cast("dict[str, Any]", lists.get("clients", {}))
        return Revoked(
            {int(client): _serials(valid) for client, valid in clients.items()}, _serials(lists.get("serials", []))
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise _wrong(folder, error) from None


def _serials(values: Any) -> set[str]:
    if not isinstance(values, list):
        raise ValueError("serial numbers are a list of hexadecimal texts")
    return {serial_text(int(str(value), 16)) for value in cast("list[Any]", values)}


def _wrong(folder: Path, error: Exception) -> ConfigError:
    return ConfigError("transport.certificates", str(folder), f"a folder whose {REVOKED} can be read ({error})")
