"""Locks on files: held by one process, and dropped by the kernel when that process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from cutlayer.runtime.ground.config import ConfigError

# Another process that only looks whether a file is locked holds its lock for an instant.
_TRIES, _PAUSE_S = 5, 0.02


class FileLock:
    """An exclusive lock on a file, this process's own until `release`; a forked child does not share it."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle: int | None = handle
        # A forked child (a data worker) would keep the lock alive after this process is killed.
        os.register_at_fork(after_in_child=self._close)

    @classmethod
    def take(cls, path: Path) -> FileLock | None:
        """Lock `path`, a file that is made if need be in a folder that exists; None when another process holds it.

        Raises:
            ConfigError: the file system has no locks.
        """
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE_S)
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except FileNotFoundError:
                return None  # its folder was removed by the owner just now
            except PermissionError:
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # another user's file: enough to lock it
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The owner before us may have removed the file between our opening and locking it.
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return cls(path, handle)
            except (BlockingIOError, FileNotFoundError):
                pass
            except OSError as error:
                os.close(handle)
                where = str(path.parent)
                raise ConfigError(
                    "save_dir", where, f"a folder on a file system that can lock files ({error})"
                ) from error
            os.close(handle)
        return None

    def release(self, *, remove: bool = False) -> None:
        """Let go; with `remove` the file goes too, while it is still locked, so that nobody else holds it."""
        if remove and self._handle is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._close()

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a live process holds the lock on this file."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
