"""Checkpoints at round boundaries: one manifest that names everything a run needs to resume, and sums of all of it.

The manifest is written to a temporary name, synced and renamed, after the files that it names are on the disk. What
was written after it (a half-done round, rows of a store, lines of a table) is discarded when the run is resumed.
The checkpoint before it stays, whole, until the next one: where the last is damaged the run resumes from that one, and
as it repeats the rounds since, it ends in the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError, build
from cutlayer.runtime.ground.files import DamagedError, Mark, digest_of, refuse_link, replace_file, sync_folder
from cutlayer.runtime.ground.serial import load_state, save_state
from cutlayer.runtime.rounds.first_format import NAMES as FIRST_NAMES
from cutlayer.runtime.rounds.first_format import Rows, is_first, rows_of, values_of

log = logging.getLogger(__name__)

MANIFEST, PREVIOUS = "manifest.json", "previous.json"
FORMAT = 2
_NAMES = re.compile(r"(server-\d+\.safetensors|(clients|server)-\d+\.rows)")
ANEW = "resume=never begins a new run"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint names.

    identity: hash of the configuration that the run was started with.
    round: number of completed rounds.
    generation: number of checkpoints taken before this one.
    rows: segments of the clients' and the server's stores, oldest first.
    ledger, results: totals so far, and what is to be known of the run's own files.
    seconds: compute time so far by party.
    clients: what is known of clients that keep their state on machines of their own.
    server: the file of the server's state.
    before: the files of the checkpoint before this one.
    obsolete: files that neither of them needs.
    revision: of the method and the model, see `Setup.revision`.
    """

    identity: str
    round: int
    generation: int
    rows: dict[str, tuple[Mark, ...]]
    ledger: dict[str, Any]
    results: dict[str, Any]
    seconds: dict[str, float]
    clients: dict[str, Any] = field(default_factory=dict[str, Any])
    server: Mark = field(default_factory=lambda: Mark("", 0, ""))
    before: tuple[str, ...] = ()
    obsolete: tuple[str, ...] = ()
    revision: int = 0

    @property
    def marks(self) -> list[Mark]:
        """The files in the checkpoint's folder that it needs."""
        return [self.server, *(mark for marks in self.rows.values() for mark in marks)]


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint as it was read: its manifest, and where its rows are if it is of the first format."""

    manifest: Manifest
    first: Rows | None = None

    @property
    def names(self) -> set[str]:
        """The files in the checkpoint's folder that it needs."""
        old = (place.file for places in (self.first or {}).values() for place in places.values())
        return {*(mark.name for mark in self.manifest.marks), *old}


Restore = Callable[[FoundCheckpoint, Any], None]
"""Restores a checkpoint and the server's state; raises DamagedError where the run's other files are not as they were.

May be called again then, with the checkpoint before.
"""


class Checkpoint:
    """The checkpoints of one run's folder: the last one, and the one before it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: set[str] | None = None  # the files of the one that the run is at
        self._is_last = True  # it is the one in MANIFEST, not in PREVIOUS
        self._unneeded: set[str] = set()  # named once by this run's manifests

    def exists(self) -> bool:
        """Whether there is a checkpoint to resume from, be it a damaged one."""
        refuse_link(self._folder)
        return any(os.path.lexists(self._folder / name) for name in (MANIFEST, PREVIOUS))

    def write(self, manifest: Manifest, server_state: Any) -> None:
        """Put a new checkpoint in place of the last, and the last in place of the one before.

        Args:
            manifest: its ``server``, ``before`` and ``obsolete`` are set here.
            server_state: nested, see ``save_state``.
        """
        refuse_link(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        server = save_state(self._folder / f"server-{manifest.generation}.safetensors", server_state)
        sync_folder(self._folder)
        manifest = replace(manifest, server=server)
        kept, names = self._last or set[str](), FoundCheckpoint(manifest).names
        obsolete = tuple(sorted(self._unneeded - kept - names))
        manifest = replace(manifest, before=tuple(sorted(kept)), obsolete=obsolete)
        if self._last is not None and self._is_last:
            with contextlib.suppress(FileNotFoundError):
                (self._folder / MANIFEST).replace(self._folder / PREVIOUS)
        replace_file(self._folder / MANIFEST, _to_text(manifest))
        self._remove(manifest.obsolete)
        self._unneeded, self._last, self._is_last = kept, names, True

    def _remove(self, names: Iterable[str]) -> None:
        """Remove files that a manifest once named; a link goes, never what is behind it."""
        for name in names:
            path = self._folder / name
            if path.parent.is_symlink():
                continue
            with contextlib.suppress(OSError):
                path.unlink()
                if path.parent != self._folder:
                    path.parent.rmdir()  # of the first format; once it is empty

    def read(self, identities: Collection[str], restore: Restore, *, fall_back: bool) -> None:
        """Restore the last checkpoint that is whole.

        Args:
            identities: one of which it has to be of.
            fall_back: resume from the checkpoint before, where the last is damaged.

        Raises:
            ConfigError: there is none, or it is not this configuration's.
        """
        damage: list[str] = []
        for name in (MANIFEST, PREVIOUS) if fall_back else (MANIFEST,):
            try:
                found = self._read(name, identities)
                self._unneeded |= found.names | {*found.manifest.before, *found.manifest.obsolete}
                restore(found, self._checked(found))
            except DamagedError as error:
                damage.append(str(error))
                continue
            if damage:
                log.warning("%s: resumes from the checkpoint before, of round %d", damage[0], found.manifest.round)
            self._last, self._is_last = found.names, name == MANIFEST
            if fall_back and self._is_last:
                self._remove(found.manifest.obsolete)  # a killed process may not have come to it
            return
        advice = ANEW if fall_back else "a run is measured as its last checkpoint has it"
        raise ConfigError("resume", NO_VALUE, f"{'; '.join(dict.fromkeys(damage))}; {advice}")

    def _read(self, name: str, identities: Collection[str]) -> FoundCheckpoint:
        path = self._folder / name
        try:
            if path.is_symlink():
                raise DamagedError.of(path, "is a link")
            found = self._found(path, json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise DamagedError.of(Path(error.filename), "is missing") from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, ConfigError) and (isinstance(error, DamagedError) or error.key == "resume"):
                raise
            raise DamagedError.unreadable(path, error) from None
        if found.manifest.identity not in identities:
            raise DamagedError.of(path, f"is of another configuration ({found.manifest.identity!r:.40})")
        return found

    def _found(self, path: Path, content: Any) -> FoundCheckpoint:
        if is_first(content):
            found = FoundCheckpoint(build(Manifest, values_of(content)), rows_of(self._folder, content))
        else:
            version, body = content["format"], content["body"]
            if type(version) is int and version > FORMAT:
                reason = f"a newer version of the platform wrote it (format {version}; this one reads up to {FORMAT})"
                raise ConfigError("resume", NO_VALUE, f"{path}: {reason}; continue with that version, or {ANEW}")
            if version != FORMAT or content["sha256"] != _sum_of(body):
                raise DamagedError.of(path, "has other content than was written")
            found = FoundCheckpoint(build(Manifest, body))
        allowed = _NAMES if found.first is None else FIRST_NAMES
        for name in found.names:
            if not allowed.fullmatch(name):
                raise DamagedError.of(path, f"names {name!r:.80}, which is no file of a checkpoint")
        for name in (*found.manifest.before, *found.manifest.obsolete):
            if not _NAMES.fullmatch(name) and not FIRST_NAMES.fullmatch(name):
                raise DamagedError.of(path, f"names {name!r:.80}, which is no file of a checkpoint")
        return found

    def _checked(self, found: FoundCheckpoint) -> Any:
        """The server's state; every file that a manifest names is as it was."""
        server = found.manifest.server
        if found.first is None:
            for mark in found.manifest.marks:
                digest_of(self._folder, mark)
        elif (self._folder / server.name).is_symlink():
            raise DamagedError.of(self._folder / server.name, "is a link")
        return load_state(self._folder / server.name)


def _to_text(manifest: Manifest) -> str:
    body = json.loads(json.dumps(asdict(manifest)))  # as it will be read: tuples are lists
    return json.dumps({"format": FORMAT, "sha256": _sum_of(body), "body": body})


def _sum_of(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
