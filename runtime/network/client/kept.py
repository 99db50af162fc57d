"""What a client keeps between rounds, on its own machine: one file for each round that changed it.

The server says which of the client's rounds counted last; the state after that one is restored, and what was kept of
later ones, which did not count, is removed. So a server that resumes from a checkpoint finds its clients as they were.
"""

from __future__ import annotations

import re
from pathlib import Path

from cutlayer.runtime.ground.files import DamagedError, refuse_link
from cutlayer.runtime.ground.serial import load_state, save_state
from cutlayer.runtime.parties.store import Row

_NAME = re.compile(r"state-(\d+)\.safetensors")


class KeptState:
    """The states of one client in one run, by the round after which they were kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rounds(self) -> list[int]:
        """The rounds after which a state was kept."""
        refuse_link(self._folder)
        if not self._folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def read(self, round: int) -> dict[str, Row]:
        """The rows as they were after a round.

        Raises:
            DamagedError: none were kept then, or the file is damaged.
        """
        try:
            return load_state(self._path(round))["rows"]
        except (LookupError, TypeError) as error:
            raise DamagedError.unreadable(self._path(round), error) from None

    def write(self, round: int, rows: dict[str, Row]) -> None:
        """Keep the rows as they are after a round; they are on the disk when this returns."""
        refuse_link(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        save_state(self._path(round), {"rows": rows})

    def forget(self, *, before: int | None, after: int | None) -> None:
        """Remove the states of rounds before one and of rounds after another; None is before all rounds.

        That of ``before`` itself stays: a client may have had nothing to keep after its last round.
        """
        first, last = (-1 if each is None else each for each in (before, after))
        for round in self.rounds():
            if not first <= round <= max(first, last):
                self._path(round).unlink(missing_ok=True)

    def _path(self, round: int) -> Path:
        return self._folder / f"state-{round}.safetensors"
