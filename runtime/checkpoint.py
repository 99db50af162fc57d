"""Checkpoints at round boundaries: one manifest that names everything a run needs to go on.

The manifest is written to a temporary name, synced and renamed, after the files that it names are on the disk. What
was written after it (a half-done round, rows of a store, lines of a table) is discarded when the run is taken up again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime.files import replace_file, sync_folder
from runtime.serial import load_state, save_state

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint names.

    identity: hash of the configuration that the run was started with.
    round: number of completed rounds.
    server: file name of the server's state.
    rows: rows of the clients' and the server's stores, (client, name, file) each.
    version: number of checkpoints taken before this one.
    ledger, results: totals and histories so far.
    seconds: compute time so far by party.
    clients: what is known of clients that keep their state on machines of their own.
    """

    identity: str
    round: int
    server: str
    rows: dict[str, list[list[str | int]]]
    version: int
    ledger: dict[str, Any]
    results: dict[str, Any]
    seconds: dict[str, float]
    clients: dict[str, Any] = field(default_factory=dict[str, Any])


class Checkpoint:
    """The checkpoint of one run's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def exists(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return (self._folder / MANIFEST).is_file()

    def server_file(self, round: int) -> str:
        """The name of the file that holds the server's state after ``round`` rounds."""
        return f"server-{round}.safetensors"

    def write(self, manifest: Manifest, server_state: Any) -> None:
        """Put a new checkpoint in place of the old one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        save_state(self._folder / manifest.server, server_state)
        sync_folder(self._folder)
        replace_file(self._folder / MANIFEST, json.dumps(asdict(manifest)))
        self._clean(manifest)

    def _clean(self, manifest: Manifest) -> None:
        for path in self._folder.glob("server-*.safetensors"):
            if path.name != manifest.server:
                path.unlink()

    def read(self) -> tuple[Manifest, Any]:
        """The manifest and the server's state; what a killed process left half written is removed."""
        manifest = Manifest(**json.loads((self._folder / MANIFEST).read_text(encoding="utf-8")))
        self._clean(manifest)
        return manifest, load_state(self._folder / manifest.server)
