"""Per-client state: rows made lazily, bounded memory with a disk tier, a segment of a few files by checkpoint.

A row is a flat mapping of names to tensors, found by (client, name). An absent row means the initial state, so that a
population of a million costs nothing until a client has state of its own. Writes are staged and become visible to the
next round when ``commit`` is called; a client that drops out is rolled back with ``discard``.

Rows that memory does not hold, and at a checkpoint all that no file holds, go to the end of one file, a segment. It is
finished at the checkpoint and reads then what still counts of segments that are no larger, or mostly out of date: so
their number grows with the logarithm of the rows, and they take at most about twice the room of these.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cutlayer.runtime.ground.files import Mark
from cutlayer.runtime.ground.segments import Key, Place, Row, SegmentWriter, read_place, read_segment, to_row
from cutlayer.runtime.ground.serial import encode_tensors
from cutlayer.runtime.messages.codec import encode

# A segment between checkpoints is written anew once so much of it is out of date, and more than half.
_STALE_BYTES = 16 << 20


class Store:
    """Rows of tensors by client and name.

    Args:
        folder: where rows go that do not fit in memory, and at checkpoints; None keeps everything in memory.
        name: of the files in it.
        memory_limit: bytes of rows held in memory, where there is a folder for the others.
        device: where rows are handed out.
    """

    def __init__(
        self,
        folder: Path | None,
        name: str = "rows",
        *,
        device: torch.device | None = None,
        memory_limit: float = math.inf,
    ) -> None:
        self._folder, self._name = folder, name
        self._device = device or torch.device("cpu")
        self._limit = memory_limit
        self._memory: OrderedDict[Key, Row] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._dirty: set[Key] = set()  # rows in memory that no file holds
        self._names: set[str] = set()  # of all rows so far
        self._places: dict[Key, Place] = {}
        self._live: dict[str, int] = {}  # bytes of these, by file
        self._gone: set[Key] = set()  # keys without a row, which an earlier segment may have
        self._segments: dict[str, Mark] = {}  # oldest first
        self._changed = False
        self._writer: SegmentWriter | None = None
        self._staged: dict[int, dict[str, Row | None]] = {}
        self._version = 0

    def get(self, client: int, name: str) -> Row | None:
        """The row, or None where the client still has the initial state. Treat its tensors as read-only."""
        staged = self._staged.get(client, {})
        if name in staged:
            return staged[name]
        key = client, name
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        if key not in self._places or self._folder is None:
            return None
        place = self._places[key]
        tensors = to_row(self._read(place), self._folder / place.file)
        row = {entry: tensor.to(self._device) for entry, tensor in tensors.items()}
        self._hold(key, row)
        return row

    def _read(self, place: Place) -> bytes:
        assert self._folder is not None
        if self._writer is not None and place.file == self._writer.path.name:
            return self._writer.read(place)
        return read_place(self._folder, place)

    def names(self, client: int) -> frozenset[str]:
        """The names of the rows that a client has, without what it staged."""
        return frozenset(
            name for name in self._names if (client, name) in self._memory or (client, name) in self._places
        )

    def put(self, client: int, name: str, row: Mapping[str, Tensor]) -> None:
        """Stage a row; it is copied."""
        copied = {entry: tensor.detach().clone() for entry, tensor in row.items()}
        self._staged.setdefault(client, {})[name] = copied

    def drop(self, client: int, name: str) -> None:
        """Stage that the row is absent again."""
        self._staged.setdefault(client, {})[name] = None

    def staged(self, client: int) -> dict[str, Row | None]:
        """What a client staged since the last commit: rows by name, None of those that it drops."""
        return dict(self._staged.get(client, {}))

    def discard(self, client: int) -> None:
        """Forget what ``client`` staged since the last commit."""
        self._staged.pop(client, None)

    def discard_all(self) -> None:
        """Forget all that was staged since the last commit."""
        self._staged.clear()

    def commit(self) -> None:
        """Make everything staged the current state; called once at the end of a round."""
        for client, rows in self._staged.items():
            for name, row in rows.items():
                if row is None:
                    self._release((client, name))
                else:
                    self._dirty.add((client, name))
                    self._hold((client, name), row)
        self._staged.clear()

    def _release(self, key: Key) -> None:
        self._bytes -= _size(self._memory.pop(key, {}))
        self._dirty.discard(key)
        if key in self._places:
            self._put_at(key, None)
            self._gone.add(key)
            self._changed = True

    def _put_at(self, key: Key, place: Place | None) -> None:
        before = self._places.pop(key, None)
        if before is not None:
            self._live[before.file] -= before.bytes
        if place is not None:
            self._names.add(key[1])
            self._places[key] = place
            self._live[place.file] = self._live.get(place.file, 0) + place.bytes

    def _hold(self, key: Key, row: Row) -> None:
        if key in self._memory:
            self._bytes -= _size(self._memory.pop(key))
        self._names.add(key[1])
        self._memory[key] = row
        self._bytes += _size(row)
        while self._folder is not None and self._bytes > self._limit and len(self._memory) > 1:
            oldest = next(iter(self._memory))
            if oldest in self._dirty:
                self._write(oldest)
            self._bytes -= _size(self._memory.pop(oldest))

    def _write(self, key: Key) -> None:
        self._append(key, _encoded(self._memory[key]))
        self._dirty.discard(key)
        writer = self._open()
        if writer.bytes > max(_STALE_BYTES, 2 * self._live[writer.path.name]):
            self._rewrite(writer)

    def _append(self, key: Key, content: bytes) -> None:
        self._put_at(key, self._open().append(content))
        self._gone.discard(key)

    def _open(self) -> SegmentWriter:
        assert self._folder is not None
        if self._writer is None:
            self._writer = SegmentWriter(self._folder / f"{self._name}-{self._version}.rows")
            self._live[self._writer.path.name] = 0
        return self._writer

    def _rewrite(self, writer: SegmentWriter) -> None:
        """The rows of the segment being written that count, in a file of their own in its place."""
        mine = self._within({writer.path.name})
        for key, _ in mine:
            self._put_at(key, None)
        self._writer = None
        for key, place in mine:
            self._append(key, writer.read(place))
        writer.close()

    def _within(self, files: Collection[str]) -> list[tuple[Key, Place]]:
        """The rows in some files, in the order in which they lie there."""
        found = [(key, place) for key, place in self._places.items() if place.file in files]
        return sorted(found, key=lambda each: (each[1].file, each[1].first))

    def all(self) -> list[Key]:
        """(client, name) of every row."""
        return sorted({*self._memory, *self._places})

    def rows(self, client: int) -> dict[str, Row]:
        """All rows of a client, by name."""
        return {name: row for name in sorted(self._names) if (row := self.get(client, name)) is not None}

    def replace(self, client: int, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make these all the rows of a client."""
        for name in self.rows(client).keys() - rows.keys():
            self.drop(client, name)
        for name, row in rows.items():
            self.put(client, name, {entry: tensor.to(self._device) for entry, tensor in row.items()})
        self.commit()

    def checkpoint(self) -> list[Mark]:
        """Write what no file holds yet; the segments that hold all rows now, for a checkpoint's manifest."""
        if self._folder is not None and (self._dirty or self._writer is not None or self._changed):
            self._finish()
        self._version += 1
        return [*self._segments.values()]

    def _finish(self) -> None:
        for key in sorted(self._dirty):
            self._append(key, _encoded(self._memory[key]))
        self._dirty.clear()
        writer = self._open()
        absorbed = self._absorbed(writer)
        for key, place in self._within(absorbed):
            self._append(key, self._read(place))
        for file in absorbed:
            del self._segments[file], self._live[file]
        if not self._segments:
            self._gone.clear()
        mine = dict(self._within({writer.path.name}))
        if mine or self._segments:
            self._segments[writer.path.name] = writer.finish(mine, self._gone)
        else:
            writer.abandon()
        self._writer, self._changed = None, False

    def _absorbed(self, writer: SegmentWriter) -> set[str]:
        """The files whose rows go into the segment being written."""
        total, chosen = writer.bytes, set[str]()
        for mark in reversed(self._segments.values()):
            live = self._live.get(mark.name, 0)
            if live <= total or 2 * live < mark.bytes or not mark.sha256:
                total += live
                chosen.add(mark.name)
        return chosen

    def restore(self, segments: Sequence[Mark], version: int) -> None:
        """Restore the rows of a manifest; what was written after it is written over in time.

        Args:
            version: number of checkpoints taken.

        Raises:
            DamagedError: a segment is none.
        """
        self.clear()
        self._version = version
        for mark in segments:
            assert self._folder is not None
            found = read_segment(self._folder / mark.name)
            self._segments[mark.name] = mark
            self._live[mark.name] = 0
            for key, place in found.places.items():
                self._put_at(key, place)
            self._gone = found.gone  # each names all that were gone when it was finished
            for key in found.gone:
                self._put_at(key, None)

    def load_places(self, places: Mapping[Key, Place], version: int) -> None:
        """Restore rows that are in a file each, as in the first format; the next checkpoint has them together."""
        self.clear()
        self._version = version
        for key, place in places.items():
            self._put_at(key, place)
            self._segments[place.file] = Mark(place.file, 0, "")

    def clear(self) -> None:
        """Be as a store that was made just now."""
        if self._writer is not None:
            self._writer.abandon()
        self._writer, self._bytes, self._version, self._changed = None, 0, 0, False
        for each in (self._memory, self._staged, self._dirty, self._places, self._live, self._gone, self._segments):
            each.clear()

    @property
    def version(self) -> int:
        """Number of checkpoints taken."""
        return self._version

    def bytes_of(self, client: int) -> int:
        """Bytes of a client's committed rows that are held in memory."""
        return sum(_size(row) for (owner, _), row in self._memory.items() if owner == client)

    @property
    def memory_bytes(self) -> int:
        """Bytes of committed rows held in memory."""
        return self._bytes


def _encoded(row: Row) -> bytes:
    """A row in the format of `encode_tensors`, in a third of the time where it could cross the boundary."""
    try:
        return encode(row)
    except ValueError:  # a dtype or a name that does not cross
        return encode_tensors(row)


def _size(row: Row) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in row.values())
