"""Who joined a server, was refused and left: a file of JSON lines in the run's folder, of bounded size."""

from __future__ import annotations

import json
import logging
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cutlayer.runtime.ground.text import one_line

log = logging.getLogger(__name__)

AUDIT, BEFORE = "audit.jsonl", "audit.1.jsonl"
_MOST_BYTES = 4_000_000

Event = Literal["listening", "joined", "refused", "left", "left out", "closed"]


class Audit:
    """Writes a line for each event; a full file takes the place of the one before it, and a new one begins.

    It never breaks the run: a file that cannot be written is a line of the log.

    Args:
        folder: of the run; None writes nothing.
        most_bytes: of a file. There are two at most.
    """

    def __init__(self, folder: Path | None, most_bytes: int = _MOST_BYTES) -> None:
        self._folder, self._most = folder, most_bytes
        self._failed = False
        self._lock = threading.Lock()

    def write(self, event: Event, **facts: object) -> None:
        """Add a line; texts, which may be a peer's own, are one printable line each, and those that are empty stay out.

        ``client`` is the client's number, ``peer`` where it is, ``serial`` that of its certificate, ``why`` the reason.
        """
        if self._folder is None:
            return
        known = {name: one_line(value) if isinstance(value, str) else value for name, value in facts.items()}
        reported = {name: value for name, value in known.items() if value not in (None, "")}
        line = (
            json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **reported})
            + "\n"
        )
        with self._lock:
            try:
                self._append(self._folder, line.encode())
                self._failed = False
            except OSError as error:
                if not self._failed:
                    log.warning("%s cannot be written, the run continues: %s", AUDIT, error)
                self._failed = True

    def _append(self, folder: Path, line: bytes) -> None:
        path = folder / AUDIT
        if path.exists() and path.stat().st_size + len(line) > self._most:
            path.replace(folder / BEFORE)
        with path.open("ab") as file:
            file.write(line)
