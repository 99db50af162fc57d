"""Attack finished runs: `python attack.py attack=model_inversion run=<folder> attack.epochs=50`.

A run is its folder below saves/, or a folder above several. Runs of methods that send smashed data can be
attacked. The results go to `attacks/` in the run's folder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutlayer.runtime.after.over_runs import Measure, over_runs
from cutlayer.runtime.ground.config import plain, show
from cutlayer.runtime.ground.streams import run_program
from cutlayer.runtime.ground.text import print_lines

DEFAULT = "model_inversion"
_LINE_INTERVAL = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Attack what the command line names; returns the exit status."""
    return over_runs(
        arguments,
        "Measure how well an attacker sees a client's images in what a finished run's clients send.",
        _keys,
        "50 or null",
        _measure,
    )


def _keys() -> str:
    """The keys of every attack, with their defaults."""
    from cutlayer.attacks import ATTACKS  # late, as below

    keys = [
        ", ".join([f"attack={name}", *(f"attack.{key}={show(value)}" for key, value in plain(each.config()).items())])
        for name, each in ATTACKS.items()
    ]
    return f"Keys: {'; '.join(keys)}; device, threads, dataset.root and others that only say where to compute."


def _measure() -> Measure:
    from cutlayer.attacks.running import attack_run  # late: a mistake in the keys need not wait for torch

    def attack(run: Path, changes: Mapping[str, Any]) -> None:
        print_lines(f"attacking {run}")
        given = {key: value for key, value in changes.items() if key != "attack"}
        found, folder = attack_run(changes.get("attack", DEFAULT), run, given, _Lines())
        print_lines(*found.table().split("\n"), f"results  {folder}")

    return attack


class _Lines:
    """Tells of an epoch that is over, but not more often than every few seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: int, of: int, what: str) -> None:
        if time.monotonic() - self._last >= _LINE_INTERVAL:
            self._last = time.monotonic()
            print_lines(f"epoch {done}/{of}, {what}")


if __name__ == "__main__":
    run_program(main)
