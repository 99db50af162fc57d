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
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.streams import run_program
from cutlayer.runtime.ground.text import tell

ATTACKS = ("model_inversion",)
LINE_INTERVAL = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Attack what the command line names; returns the exit status."""
    return over_runs(
        arguments,
        "Measure how well an attacker sees a client's images in what a finished run's clients send.",
        "Keys: attack=model_inversion, attack.epochs=50, attack.lr=0.001, attack.batch_size=128, attack.client=0, "
        "attack.samples=null, attack.width=64, attack.blocks=4; device, threads, dataset.root and others that only say "
        "where to compute.",
        "50 or null",
        _measure,
    )


def _measure() -> Measure:
    from cutlayer.attacks.model_inversion import attack_run  # late: a mistake in the keys need not wait for torch

    def attack(run: Path, changes: Mapping[str, Any]) -> None:
        kind = changes.get("attack", ATTACKS[0])
        if kind not in ATTACKS:
            raise ConfigError("attack", kind, "an attack", ATTACKS)
        tell(f"attacking {run}")
        given = {key: value for key, value in changes.items() if key != "attack"}
        found, folder = attack_run(run, given, _Lines())
        tell(*found.table().split("\n"), f"results  {folder}")

    return attack


class _Lines:
    """Tells of an epoch that is over, but not more often than every few seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: int, of: int, loss: float) -> None:
        if time.monotonic() - self._last >= LINE_INTERVAL:
            self._last = time.monotonic()
            tell(f"epoch {done}/{of}, mean squared error {loss:.5f}")


if __name__ == "__main__":
    run_program(main)
