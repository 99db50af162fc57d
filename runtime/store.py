"""Per-client state: rows made lazily, bounded memory with a disk tier, versioned by checkpoint.

A row is a flat mapping of names to tensors, found by (client, name). An absent row means the initial state, so that a
population of a million costs nothing until a client has state of its own. Writes are staged and become visible to the
next round when ``commit`` is called; a client that drops out is rolled back with ``discard``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from runtime.files import sync_folder
from runtime.serial import open_tensors, save_tensors

Row: TypeAlias = dict[str, Tensor]
Key: TypeAlias = tuple[int, str]


class Store:
    """Rows of tensors by client and name.

    Args:
        folder: where rows go that do not fit in memory, and at checkpoints; None keeps everything in memory.
        memory_limit: bytes of rows held in memory, where there is a folder for the others.
        device: where rows are handed out.
    """

    def __init__(
        self, folder: Path | None, *, device: torch.device | None = None, memory_limit: float = math.inf
    ) -> None:
        self._folder = folder
        self._device = device or torch.device("cpu")
        self._limit = memory_limit
        self._memory: OrderedDict[Key, Row] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._dirty: set[Key] = set()  # rows in memory that no file holds
        self._files: dict[Key, str] = {}
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
        if key not in self._files or self._folder is None:
            return None
        tensors, _ = open_tensors(self._folder / self._files[key])
        row = {entry: tensor.to(self._device) for entry, tensor in tensors.items()}
        self._hold(key, row)
        return row

    def put(self, client: int, name: str, row: Mapping[str, Tensor]) -> None:
        """Stage a row; it is copied."""
        copied = {entry: tensor.detach().clone() for entry, tensor in row.items()}
        self._staged.setdefault(client, {})[name] = copied

    def drop(self, client: int, name: str) -> None:
        """Stage that the row is absent again."""
        self._staged.setdefault(client, {})[name] = None

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
        self._files.pop(key, None)  # the file itself stays until no checkpoint names it

    def _hold(self, key: Key, row: Row) -> None:
        if key in self._memory:
            self._bytes -= _size(self._memory.pop(key))
        self._memory[key] = row
        self._bytes += _size(row)
        while self._folder is not None and self._bytes > self._limit and len(self._memory) > 1:
            oldest = next(iter(self._memory))
            if oldest in self._dirty:
                self._write(oldest)
            self._bytes -= _size(self._memory.pop(oldest))

    def _write(self, key: Key) -> None:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        # A new name for each version: the file that the last checkpoint names stays as it is until the next one.
        name = f"{key[1]}-{key[0]}-{self._version}.safetensors"
        save_tensors(self._folder / name, self._memory[key])
        self._files[key] = name
        self._dirty.discard(key)

    def rows(self, client: int) -> dict[str, Row]:
        """All rows of a client, by name."""
        names = {name for owner, name in (*self._memory, *self._files) if owner == client}
        return {name: row for name in sorted(names) if (row := self.get(client, name)) is not None}

    def replace(self, client: int, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make these all the rows of a client."""
        for name in self.rows(client).keys() - rows.keys():
            self.drop(client, name)
        for name, row in rows.items():
            self.put(client, name, {entry: tensor.to(self._device) for entry, tensor in row.items()})
        self.commit()

    def checkpoint(self) -> list[list[str | int]]:
        """Write what no file holds yet, and list all rows as (client, name, file) for a checkpoint's manifest."""
        if self._folder is not None:
            for key in sorted(self._dirty):
                self._write(key)
            if self._folder.is_dir():
                sync_folder(self._folder)
        self._version += 1
        return [[client, name, file] for (client, name), file in sorted(self._files.items())]

    def clean(self) -> None:
        """Remove the files that no row uses any more; called when the new manifest is in place."""
        if self._folder is None or not self._folder.is_dir():
            return
        used = set(self._files.values())
        for path in self._folder.glob("*.safetensors"):
            if path.name not in used:
                path.unlink()

    def restore(self, rows: list[list[str | int]], version: int) -> None:
        """Take up the rows of a manifest; whatever was written after it is removed."""
        self._memory.clear()
        self._staged.clear()
        self._dirty.clear()
        self._bytes = 0
        self._files = {(int(client), str(name)): str(file) for client, name, file in rows}
        self._version = version
        self.clean()

    @property
    def version(self) -> int:
        """Number of checkpoints taken."""
        return self._version

    @property
    def memory_bytes(self) -> int:
        """Bytes of committed rows held in memory."""
        return self._bytes


def _size(row: Row) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in row.values())
