"""What a reader left out or found odd, said once, with counts and the first example of each kind."""

import logging
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cutlayer.runtime.ground.text import printable

log = logging.getLogger(__name__)


class Findings:
    """Paths by what is the matter with them.

    Attributes:
        paths: for each kind ("links that lead nowhere") the paths it holds for, in the order in which they were added.
    """

    def __init__(self) -> None:
        self.paths: dict[str, list[str]] = {}

    def add(self, kind: str, paths: Iterable[str]) -> None:
        """Note `paths` under `kind`; nothing where there are none."""
        if found := list(paths):
            self.paths.setdefault(kind, []).extend(found)

    def update(self, other: "Findings") -> None:
        """Note all of another's."""
        for kind, paths in other.paths.items():
            self.add(kind, paths)

    def __bool__(self) -> bool:
        return bool(self.paths)

    def __str__(self) -> str:
        """Each kind with its count and the first in order of path, on one line."""
        return "; ".join(
            f"{kind}: {len(paths):,} ({printable(min(paths))}{', ...' if len(paths) > 1 else ''})"
            for kind, paths in self.paths.items()
        )


def kinds(paths: Iterable[str]) -> str:
    """The suffixes of files with their counts, the most frequent first: ".gif 10, .txt 2"."""
    counts = Counter(Path(path).suffix.lower() or "no suffix" for path in paths).most_common()
    shown = ", ".join(f"{printable(suffix)} {count:,}" for suffix, count in counts[:4])
    return shown + (", ..." if len(counts) > 4 else "")


class Notes:
    """What comes to light only when files are decoded; safe to use from several threads.

    Attributes:
        brightest: the largest value found in grey images deeper than 8 bits, and what stands for white in them; None
            where there was no such image.
    """

    def __init__(self) -> None:
        self.brightest: tuple[float, float] | None = None
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock = threading.Lock()

    def deep(self, largest: float, white: float) -> None:
        """A grey image deeper than 8 bits was read: its largest value, and the one that stands for white."""
        with self._lock:
            if self.brightest is None or largest / white > self.brightest[0] / self.brightest[1]:
                self.brightest = largest, white

    def once(self, kind: str, text: str) -> None:
        """Log `text`, the first time that there is something of this kind to say."""
        with self._lock:
            first = kind not in self._said
            self._said.add(kind)
        if first:
            log.warning("%s", printable(text))
