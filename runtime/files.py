"""Files that survive a crash: written whole or not at all, and on the disk when the call returns."""

from __future__ import annotations

import os
from pathlib import Path

RESULTS = "results.json"
CLIENT_ACCURACY = "client_accuracy.csv"
PERSONALIZED = "personalized"
PROBED = "probed"
MODEL_FILE = "model.safetensors"


def temporary_name(path: Path) -> Path:
    """Where the new content of ``path`` is until it takes the old one's place."""
    return path.with_name(f".{path.name}.new")


def replace_file(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file so that a reader, or a crash, sees either the old content or the new one.

    Args:
        durable: on the disk when the call returns; else a reader sees one or the other, but a crash may leave neither.
    """
    temporary = temporary_name(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and new files in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
