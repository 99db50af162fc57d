"""Files that only ever grow, whose length and sum a checkpoint keeps, and which a resumed run cuts back to these."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from cutlayer.runtime.ground.files import DamagedError, Mark, digest_of, named, open_to_append, replace_file, sync_file


class GrowingFile:
    """One such file, with the sum of what was written to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sum: Any = hashlib.sha256()
        self._bytes = 0

    def begin(self, text: str = "") -> None:
        """Begin it anew."""
        replace_file(self.path, b"", durable=False)
        self._sum, self._bytes = hashlib.sha256(), 0
        self.append(text)

    def append(self, text: str) -> None:
        """Add text at its end; it is opened each time, so that an interrupted run leaves none open."""
        content = text.encode()
        if content:
            with named(self.path), open_to_append(self.path) as file:
                file.write(content)
            self._sum.update(content)
            self._bytes += len(content)

    def mark(self) -> Mark:
        """What the file is known by now; its bytes are on the disk when this returns."""
        sync_file(self.path)
        return Mark(self.path.name, self._bytes, self._sum.hexdigest())

    def resume_from(self, mark: Mark) -> None:
        """Go on from a mark; the file itself is not changed, see ``cut``.

        Args:
            mark: one without a sum, of a checkpoint of the first format, gives the length only.

        Raises:
            DamagedError: the file is missing, shorter than it was, or was changed.
        """
        if mark.sha256:
            self._sum = digest_of(self.path.parent, mark, whole=False)
        else:
            self._sum = self._sum_unchecked(mark.bytes)
        self._bytes = mark.bytes

    def _sum_unchecked(self, length: int) -> Any:
        size = self.path.stat().st_size if self.path.is_file() and not self.path.is_symlink() else -1
        if size < length:
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise DamagedError.of(self.path, f"{found}; the checkpoint was made when it had {length}")
        with self.path.open("rb") as file:
            return hashlib.sha256(file.read(length))

    def read(self) -> bytes:
        """All of it up to the mark that was restored."""
        with self.path.open("rb") as file:
            return file.read(self._bytes)

    def cut(self) -> None:
        """Take away what came after the mark that was restored."""
        os.truncate(self.path, self._bytes)
        sync_file(self.path)
