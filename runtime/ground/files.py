"""Files that survive a crash: written whole or not at all, and on the disk when the call returns.

A run's folder may come from another machine: no file there is written through a link, and what has a sum is checked
against it. An error of the system names the file that it is about.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError

RESULTS = "results.json"
CLIENT_ACCURACY = "client_accuracy.csv"
PERSONALIZED = "personalized"
PROBED = "probed"
GENERATED = "generated"
SUMMARY = "summary.json"
"""What an evaluation of a finished run found, in a folder of its own below one of these three."""
MODEL_FILE = "model.safetensors"
ADAPTERS = "adapter"
# Ends the name of a file with a language model and its tokenizer in one.
GGUF = ".gguf"
FOLDED = "folded"
BEST_MODEL_FILE = "best_model.safetensors"
_PIECE = 1 << 20


class DamagedError(ConfigError):
    """A file is not as it was written; the text says in one line which file and how it differs."""

    @classmethod
    def of(cls, path: Path, what: str) -> DamagedError:
        """The error of a file, where ``what`` follows its name."""
        return cls("", NO_VALUE, f"{path} {what}")

    @classmethod
    def unreadable(cls, path: Path, error: Exception) -> DamagedError:
        """The error of a file that cannot be understood."""
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        return cls.of(path, f"cannot be read ({reason})")


@dataclass(frozen=True)
class Mark:
    """What a file is known by: its name, and of its first bytes the number and their sum (SHA-256, hexadecimal)."""

    name: str
    bytes: int
    sha256: str


def temporary_name(path: Path) -> Path:
    """Where the new content of ``path`` is until it takes the old one's place."""
    return path.with_name(f".{path.name}.new")


@contextlib.contextmanager
def named(path: Path) -> Generator[None]:
    """Name the file in an error of the system that does not: a full disk shows only when bytes are written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def refuse_link(path: Path) -> None:
    """Raise ConfigError for a link: what it leads to is none of the run's."""
    if path.is_symlink():
        raise ConfigError("run", NO_VALUE, f"{path} is a link, which is not followed; put there what it leads to")


def open_anew(path: Path) -> int:
    """The handle of a new file, in place of whatever has that name: a link goes, not what it leads to."""
    with named(path):
        path.unlink(missing_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def open_to_append(path: Path) -> BinaryIO:
    """A file to write on at its end, made if need be.

    Raises:
        ConfigError: it is a link.
    """
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "ab")
    except OSError as error:
        if error.errno == errno.ELOOP:
            refuse_link(path)
        raise


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Generator[BinaryIO]:
    """A new file that takes the place of ``path`` at the end of the block, or leaves nothing where the block fails.

    Args:
        durable: on the disk when the block is over; else a reader sees one or the other, but a crash may leave neither.
    """
    temporary = temporary_name(path)
    try:
        with named(path), os.fdopen(open_anew(temporary), "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except Exception:
        with contextlib.suppress(OSError):
            temporary.unlink()  # half a file, on a disk that may be full
        raise
    if durable:
        sync_folder(path.parent)


@contextlib.contextmanager
def written_whole(path: Path) -> Generator[Path]:
    """A path to write to by name, whose file takes the place of ``path`` at the end of the block; not durable."""
    temporary = temporary_name(path)
    try:
        with named(path):
            temporary.unlink(missing_ok=True)
            yield temporary
        temporary.replace(path)
    except Exception:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def make_folder(within: Path, folder: Path) -> None:
    """Make a folder, a run's folder that it is in, and those between.

    Raises:
        ConfigError: one of those below the run's folder is a link.
    """
    within.mkdir(parents=True, exist_ok=True)
    for each in (*reversed(folder.relative_to(within).parents[:-1]), folder.relative_to(within)):
        refuse_link(within / each)
        (within / each).mkdir(exist_ok=True)


def replace_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader, or a crash, sees either the old content or the new one; ``durable`` as above."""
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with named(path), path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and new files in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with named(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(folder: Path, mark: Mark, *, whole: bool = True) -> Any:
    """The running sum (hashlib's) of the bytes that a mark is of.

    Args:
        whole: the file has no more bytes than these.

    Raises:
        DamagedError: the file is missing, has another size or another content, or is a link.
    """
    path = folder / mark.name
    digest, left = hashlib.sha256(), mark.bytes
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < left or (whole and size > left):
                raise DamagedError.of(path, f"has {size} bytes, not the {left} that were written")
            while left and (piece := file.read(min(_PIECE, left))):
                digest.update(piece)
                left -= len(piece)
    except FileNotFoundError:
        raise DamagedError.of(path, "is missing") from None
    except OSError as error:
        what = "is a link" if path.is_symlink() else f"cannot be read ({error.strerror})"
        raise DamagedError.of(path, what) from None
    if digest.hexdigest() != mark.sha256:
        raise DamagedError.of(path, "has other bytes than were written")
    return digest
