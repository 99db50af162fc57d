"""Checkpoints as the first versions of the platform wrote them: no sums, a file for each row, all of the history.

The next checkpoint of a run that resumes from one is of today's format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutlayer.runtime.ground.files import DamagedError, refuse_link
from cutlayer.runtime.ground.segments import Key, Place

_KEYS = {"identity", "round", "server", "rows", "version", "ledger", "results", "seconds"}
NAMES = re.compile(r"(server-\d+|(clients|server)/[^./][^/]*)\.safetensors")

Rows = dict[str, dict[Key, Place]]
"""Where each row of each store is."""


def is_first(content: Any) -> bool:
    """Whether the content of a manifest is of the first format."""
    return isinstance(content, dict) and content.keys() >= _KEYS


def values_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same as today's manifest has it, but for the rows."""
    values = {key: content.get(key, {}) for key in ("identity", "round", "ledger", "results", "seconds", "clients")}
    server = {"name": content["server"], "bytes": 0, "sha256": ""}
    return {**values, "generation": content["version"], "server": server, "rows": {}}


def rows_of(folder: Path, content: Mapping[str, Any]) -> Rows:
    """Where the rows of a manifest are.

    Raises:
        DamagedError: it names what is no file of a checkpoint. ConfigError: a store's folder is a link.
    """
    places: Rows = {}
    for store, rows in content["rows"].items():
        refuse_link(folder / store)
        places[store] = {}
        for client, row, file in rows:
            name = f"{store}/{file}"
            if not NAMES.fullmatch(name) or (folder / name).is_symlink():
                raise DamagedError.of(folder, f"holds a manifest that names {name!r:.80}, which is no file of its own")
            places[store][int(client), str(row)] = Place(name, 0, (folder / name).stat().st_size, None)
    return places
