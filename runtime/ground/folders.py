"""Folders that are made for something, and go again where nothing comes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

# Another process may remove a folder above the one that is made, as it is empty, but hardly so often.
_TRIES = 100


def make_folders(path: Path) -> None:
    """Make a folder and those above it, also while other processes remove empty ones."""
    for attempt in range(_TRIES):
        try:
            path.mkdir(parents=True, exist_ok=True)
            return
        except FileNotFoundError:
            if attempt == _TRIES - 1:
                raise


def standing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there; absolute."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())


def remove_empty(path: Path, root: Path) -> None:
    """Remove `path` if it is an empty folder or not there, and then each parent below `root` that this leaves empty."""
    path, root = path.absolute(), root.absolute()
    while root in path.parents:
        try:
            path.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return
        path = path.parent


@contextlib.contextmanager
def nothing_left(folder: Path) -> Generator[None]:
    """Where the block fails, remove `folder` and those above it that were not there before and are empty."""
    root = standing(folder)
    try:
        yield
    except BaseException:
        remove_empty(folder, root)
        raise
