"""The folder of a run: its name, who owns it, and whether there is something in it to continue.

A folder belongs to the process that holds an exclusive lock on its `.lock` file. The kernel drops the lock when that
process ends, however it ends, so a killed run is found unlocked and unfinished and may be continued.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

from cutlayer.runtime.ground import locks
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import replace_file, temporary_name
from cutlayer.runtime.ground.folders import make_folders, remove_empty, standing
from cutlayer.runtime.ground.locks import FileLock

State = Literal["running", "finished", "failed"]

LOCK, IDENTITY, STATUS = ".lock", "identity", "status.json"
# Left out of a folder's name, as the folders above it have them, or as they are always in it.
_NAMED = ("algorithm", "model", "dataset", "dataset.distribution", "lr", "seed")
_NAME_BYTES = 150
# Of an identity of earlier versions, which counted more keys.
_FIRST_DIGITS = 16
Fits = Callable[[Path], bool]


def unique_name() -> str:
    """A name that no other process takes: local time, process id and a random part; sorts by time."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}-{os.getpid()}-{secrets.token_hex(4)}"


def safe_component(text: str, limit: int = _NAME_BYTES) -> str:
    """`text` as one path component of at most `limit` bytes; what does not fit is replaced by a hash of it all."""
    name = re.sub(r"[^\w.,=+-]+", "-", text).strip("-")
    if name.strip(".") == "":
        name = f"_{name.strip('.')}"
    raw = name.encode()
    if len(raw) <= limit:
        return name
    return raw[: limit - 9].decode(errors="ignore") + "-" + hashlib.sha256(text.encode()).hexdigest()[:8]


def what_differs(lr: object, seed: object, overrides: Iterable[str]) -> str:
    """The folder name that distinguishes one setting of an algorithm, model and dataset from another.

    Args:
        lr: learning rate, always named. seed: likewise.
        overrides: what was given on the command line and decides the result, e.g. "rounds=5" or
            "++optimizer.momentum=0.9".
    """
    named: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key not in _NAMED:
            named[key] = value
    return safe_component(",".join([f"lr={lr}", f"seed={seed}", *(f"{key}={named[key]}" for key in sorted(named))]))


def read_status(path: Path) -> dict[str, Any]:
    """What `status.json` of a run folder says; an empty dict when there is none, or none that can be read."""
    try:
        status = json.loads((path / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], status) if isinstance(status, dict) else {}


def is_owned(path: Path) -> bool:
    """Whether a live process owns the run folder."""
    return locks.is_locked(path / LOCK)


def find_unfinished(above: Path, identity: str, fits: Fits = lambda _: True) -> Path | None:
    """The newest run folder below `above` that has this identity, fits, is not finished and that nobody owns."""
    free = (folder for folder in _find(above, identity) if _can_continue(folder) and not is_owned(folder))
    return next((folder for folder in free if fits(folder)), None)


def find_finished(above: Path, identity: str, fits: Fits = lambda _: True) -> Path | None:
    """The newest run folder below `above` that has this identity, fits, and holds a finished run."""
    done = (folder for folder in _find(above, identity) if read_status(folder).get("state") == "finished")
    return next((folder for folder in done if fits(folder)), None)


def find_running(above: Path, identity: str) -> Path | None:
    """A run folder below `above` that has this identity and that a live process owns."""
    return next((folder for folder in _find(above, identity) if is_owned(folder)), None)


def _find(above: Path, identity: str) -> Iterator[Path]:
    """Run folders of an identity, newest first.

    They lie two levels below, because the same configuration may be spelled in several ways on a command line, which
    gives differing names to the level between.
    """
    for mark in sorted(above.glob(f"*/*/{IDENTITY}"), key=lambda mark: mark.parent.name, reverse=True):
        if _is_of(mark.parent, identity):
            yield mark.parent


def _can_continue(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return _is_open(folder) or _is_fresh(folder)
    return False


def _is_open(folder: Path) -> bool:
    """Whether a run is unfinished. One whose status cannot be read may be: where it is not, resuming does no harm."""
    state = read_status(folder).get("state")
    return state in ("running", "failed") or (state != "finished" and folder.is_dir() and not _is_fresh(folder))


class RunFolder:
    """A run folder that this process owns until `release`, or for the length of a `with` block.

    Leaving the block without an error marks the run finished; on a ConfigError the folder is discarded, unless it holds
    work or an earlier part of the run; any other error marks it failed; an interrupt leaves it as it is, to be
    continued.

    Attributes:
        path: the folder.
        identities: the run's, and any that an earlier version of the platform gave it.
        resumed: whether it holds an earlier, unfinished part of the same run.
    """

    def __init__(self, path: Path, lock: FileLock, identity: str, *, resumed: bool, root: Path) -> None:
        self.path = path
        self.identities = tuple(dict.fromkeys((identity, *(_read_identities(path) if resumed else ()))))
        self.resumed = resumed
        self._root = root
        self._lock = lock

    @classmethod
    def claim(cls, path: Path, identity: str = "", *, save_dir: Path | None = None) -> "RunFolder":
        """Own `path`, made if need be, or a new folder beside it.

        `path` itself is taken when nobody owns it and it is either fresh or holds an unfinished run of the same
        identity. The folder is marked running with `identity`.

        Args:
            path: the folder wished for.
            identity: what distinguishes this run's configuration from others; "" matches only "".
            save_dir: folder above all runs; by default `path`'s parent. What is empty below it goes with a folder that
                is discarded, and so do itself and those above it where they were not there before.
        """
        root = standing(path.parent if save_dir is None else save_dir)
        while True:
            make_folders(path)
            lock = FileLock.take(path / LOCK)
            if lock is not None:
                resumed = _is_open(path) and _is_of(path, identity)
                if resumed or _is_fresh(path):
                    break
                lock.release()
            path = path.parent / unique_name()
        folder = cls(path, lock, identity, resumed=resumed, root=root)
        folder._begin()
        return folder

    @classmethod
    def continue_at(cls, path: Path, identity: str) -> "RunFolder":
        """Own exactly `path`, which must hold an unfinished run of this identity that nobody owns.

        Raises:
            ConfigError: for key `resume`, saying which of this does not hold.
        """
        if not _is_open(path):
            state = "has finished" if read_status(path).get("state") == "finished" else "is no run folder"
            raise ConfigError("resume", str(path), f"auto, never or the folder of an unfinished run; this one {state}")
        if not _is_of(path, identity):
            raise ConfigError("resume", str(path), "the folder of a run of the same configuration")
        lock = FileLock.take(path / LOCK)
        if lock is None:
            raise ConfigError("resume", str(path), "a run folder that no other process is using")
        if not _is_open(path):
            lock.release()
            raise ConfigError(
                "resume", str(path), "auto, never or the folder of an unfinished run; this one has finished"
            )
        folder = cls(path, lock, identity, resumed=True, root=path)
        folder._begin()
        return folder

    def _begin(self) -> None:
        replace_file(self.path / IDENTITY, "".join(f"{identity}\n" for identity in self.identities))
        self.mark("running")

    def mark(self, state: State, error: str | None = None) -> None:
        """Write the run's state; `error` is one line about a failure."""
        replace_file(self.path / STATUS, json.dumps({"state": state, "error": error}) + "\n")

    def holds_work(self) -> bool:
        """Whether the folder holds anything that cost more than a start: a checkpoint, weights, or a record."""
        if any(file.is_file() for file in self.path.glob("checkpoint*/**/*")):
            return True
        if any(self.path.glob("**/*.safetensors")) or (self.path / "results.json").exists():
            return True
        metrics = self.path / "metrics.csv"
        return metrics.is_file() and len(metrics.read_bytes().splitlines()) > 1

    def discard(self) -> bool:
        """Remove the folder, unless it holds work or was resumed, and empty ones above; whether it was removed."""
        if self.resumed or self.holds_work():
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()
        remove_empty(self.path, self._root)
        return True

    def release(self) -> None:
        """Give the folder up; another process may then own it."""
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.mark("finished")
            else:
                # On a full disk there is no room for this either: the run is then unfinished, as it is marked.
                with contextlib.suppress(OSError):
                    self._end(error)
        finally:
            self.release()

    def _end(self, error: BaseException) -> None:
        if isinstance(error, ConfigError):
            if not self.discard():
                self.mark("failed", str(error))
        elif isinstance(error, Exception):
            self.mark("failed", " ".join(f"{type(error).__name__}: {error}".split()))


def _is_fresh(path: Path) -> bool:
    """No run was ever marked as running here: at most a claim that a kill cut short."""
    claim = {LOCK, IDENTITY, temporary_name(path / IDENTITY).name, temporary_name(path / STATUS).name}
    return {entry.name for entry in path.iterdir()} <= claim


def _read_identities(path: Path) -> list[str]:
    """The lines of a folder's mark: the run's identity, then those that it had before; none where none can be read."""
    try:
        return [line.strip() for line in (path / IDENTITY).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


def _is_of(path: Path, identity: str) -> bool:
    """Whether a folder's run is of this identity, which of an earlier version's run follows from its configuration."""
    first = next(iter(_read_identities(path)), None)
    if first == identity or first is None or len(first) != _FIRST_DIGITS:
        return first == identity
    from cutlayer.runtime.settings import identity_in  # late: where there are no such runs, torch is not needed here

    return identity_in(path) == identity


def run_path(save_dir: str | Path, levels: Iterable[object], unique: str) -> Path:
    """`save_dir`, then each level as a safe component, then the unique name; absolute."""
    path = Path(save_dir).absolute()
    for level in levels:
        path /= safe_component(str(level))
    return path / unique
