"""Personalise finished runs: `python personalize.py <run> ... personalize.part=full personalize.epochs=[0,1,5]`.

A run is its folder below saves/, or a folder above several. Every client fine-tunes the run's model on its own data and
is tested on its own share of the test set; the results go to `personalized/` in the run's folder.
"""

from __future__ import annotations

from functools import partial

from cutlayer.runtime.after.over_runs import Measure, over_runs
from cutlayer.runtime.ground.streams import run_program


def main(arguments: list[str] | None = None) -> int:
    """Personalise what the command line names; returns the exit status."""
    return over_runs(
        arguments,
        "Fine-tune a finished run's model on every client, and test it on the client's own test data.",
        "Keys: personalize.part=body|head|full, personalize.epochs=5 or =[0,1,5], personalize.lr=0.001, "
        "personalize.start=final|best, personalize.loss=cross_entropy|method; "
        "device, threads, workers, dataset.root and others that only say where and how to compute.",
        "5, [0,1,5] or full",
        _measure,
    )


def _measure() -> Measure:
    from cutlayer.runtime.after.saved import personalize_run  # late: a mistake in the keys need not wait for torch
    from cutlayer.runtime.workers.place import local_place

    return partial(personalize_run, place=partial(local_place, everyone=True))


if __name__ == "__main__":
    run_program(main)
