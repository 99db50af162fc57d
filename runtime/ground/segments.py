"""Rows of tensors in few files: a checkpoint's rows are one segment, written from front to end and never changed.

A segment is a mark, rows (safetensors each) one after another, an index (JSON) of them, the index's length (8 bytes,
little-endian), and the mark again. The index has of each row its key, place and sum; and the keys whose rows in earlier
segments are no longer any.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

from safetensors import SafetensorError
from torch import Tensor

from cutlayer.runtime.ground.files import DamagedError, Mark, named, open_anew, temporary_name
from cutlayer.runtime.ground.serial import decode_tensors

_MARK = b"CUTROWS1"
_TAIL = 8 + len(_MARK)

Row: TypeAlias = dict[str, Tensor]
Key: TypeAlias = tuple[int, str]
"""client, name"""


class Place(NamedTuple):
    """Where a row lies: a file, and in it the first byte, how many, and their CRC-32 (None: not known)."""

    file: str
    first: int
    bytes: int
    crc: int | None


class Segment(NamedTuple):
    """What a finished segment holds."""

    places: dict[Key, Place]
    gone: set[Key]


class SegmentWriter:
    """A segment that is being written, under a temporary name until ``finish``. Rows can be read from it meanwhile."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._handle = open_anew(temporary_name(path))
        self.close = weakref.finalize(self, os.close, self._handle)  # what has the file's name is left alone
        self._digest = hashlib.sha256()
        self.bytes = 0
        self._write(_MARK)

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        with named(self.path):
            while left:
                left = left[os.write(self._handle, left) :]
        self._digest.update(content)
        self.bytes += len(content)

    def append(self, content: bytes) -> Place:
        """Write a row that is encoded already."""
        place = Place(self.path.name, self.bytes, len(content), zlib.crc32(content))
        self._write(content)
        return place

    def read(self, place: Place) -> bytes:
        """The bytes of a row that was appended; also after another writer took the name."""
        return _read(self._handle, place, self.path)

    def finish(self, places: Mapping[Key, Place], gone: set[Key]) -> Mark:
        """Write the index of the rows that still count, and give the file its name; the folder is not synced."""
        rows = [[*key, place.first, place.bytes, place.crc] for key, place in sorted(places.items())]
        index = json.dumps({"rows": rows, "gone": sorted(gone)}).encode()
        self._write(index + len(index).to_bytes(8, "little") + _MARK)
        with named(self.path):
            os.fsync(self._handle)
            temporary_name(self.path).replace(self.path)
        self.close()
        return Mark(self.path.name, self.bytes, self._digest.hexdigest())

    def abandon(self) -> None:
        """Close the file and remove it."""
        self.close()
        temporary_name(self.path).unlink(missing_ok=True)


def read_segment(path: Path) -> Segment:
    """The index of a segment.

    Raises:
        DamagedError: it is none.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read()
            length = int.from_bytes(tail[:8], "little")
            if tail[8:] != _MARK or length > size - _TAIL:
                raise ValueError("it does not end as rows do")
            file.seek(size - _TAIL - length)
            content = cast(dict[str, Any], json.loads(file.read(length)))
        places: dict[Key, Place] = {}
        for client, name, first, count, crc in content["rows"]:
            inside = all(type(value) is int and value >= 0 for value in (client, first, count, crc))
            if not inside or not isinstance(name, str) or first + count > size:
                raise ValueError("a row that it lists is not in it")
            places[client, name] = Place(path.name, first, count, crc)
        return Segment(places, {(int(client), str(name)) for client, name in content["gone"]})
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedError.unreadable(path, error) from None


def read_place(folder: Path, place: Place) -> bytes:
    """The bytes of a row.

    Raises:
        DamagedError: they are not those that were written.
    """
    path = folder / place.file
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise DamagedError.unreadable(path, error) from None
    try:
        return _read(handle, place, path)
    finally:
        os.close(handle)


def _read(handle: int, place: Place, path: Path) -> bytes:
    pieces: list[bytes] = []
    left = place.bytes
    try:
        while left and (piece := os.pread(handle, left, place.first + place.bytes - left)):
            pieces.append(piece)
            left -= len(piece)
    except OSError as error:
        raise DamagedError.unreadable(path, error) from None
    content = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if left or (place.crc is not None and zlib.crc32(content) != place.crc):
        raise DamagedError.of(path, "has other bytes than were written")
    return content


def to_row(content: bytes, path: Path) -> Row:
    """A row of its bytes.

    Raises:
        DamagedError: they are none.
    """
    try:
        return decode_tensors(content)
    except (SafetensorError, ValueError, LookupError) as error:
        raise DamagedError.unreadable(path, error) from None
