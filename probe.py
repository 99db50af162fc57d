"""Probe the features of finished runs: `python probe.py <run> ... probe.knn=true probe.labels=[1.0,0.1,0.01]`.

A run is its folder below saves/, or a folder above several. The run's model is frozen; a kNN and linear classifiers on
what its own classifier takes show what its features are worth. The results go to `probed/` in the run's folder.
"""

from __future__ import annotations

from cutlayer.runtime.after.over_runs import Measure, over_runs
from cutlayer.runtime.ground.streams import run_program


def main(arguments: list[str] | None = None) -> int:
    """Probe what the command line names; returns the exit status."""
    return over_runs(
        arguments,
        "Measure the features of a finished run's model by a kNN and by linear classifiers on them.",
        "Keys: probe.knn=true, probe.k=200, probe.temperature=0.1, probe.labels=[1.0,0.1,0.01], probe.l2=0.01, "
        "probe.train_samples=5000, probe.test_samples=null; "
        "device, threads, dataset.root and others that only say where and how to compute.",
        "200, true or [1.0,0.1]",
        _measure,
    )


def _measure() -> Measure:
    from cutlayer.runtime.after.saved import probe_run  # late: a mistake in the keys need not wait for torch

    return probe_run


if __name__ == "__main__":
    run_program(main)
