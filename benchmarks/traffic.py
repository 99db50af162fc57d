"""Bytes of a round by method, in closed form: what a setting will send, before anything is trained.

``python -m benchmarks.traffic experiment=fsl_sage/cifar10_iid`` takes the overrides of ``main.py`` and prints, for each
of the five methods of the FSL-SAGE paper, payload bytes of training per round (mean over one alignment interval).
"""

from __future__ import annotations

import argparse

from cutlayer.runtime.costs.cuts import prepared
from cutlayer.runtime.costs.traffic import crossing_bytes, expected_bytes
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.setup import Setup

METHODS = ("fsl_sage", "cse_fsl", "sl_multi_server", "sl_single_server", "fed_avg")
ROUNDS = 10


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as for main.py, e.g. experiment=fsl_sage/cifar10_iid")
    overrides = parser.parse_args(arguments).overrides
    print(f"{'method':<18}{'up':>10}{'down':>10}{'sum':>10}   MB a round, mean of {ROUNDS}; MB = 10^6 bytes")
    for method in METHODS:
        setup = Setup(*prepared(load_config([*overrides, f"algorithm={method}"])))
        expected = expected_bytes(setup, range(ROUNDS))
        ways = [sum(size for (way, _), size in expected.items() if way == each) for each in ("up", "down")]
        figures = [size / ROUNDS / 1e6 for size in (*ways, sum(ways))]
        smashed = (
            f"   {crossing_bytes(setup)['smashed']} bytes of smashed data a sample" if method == METHODS[0] else ""
        )
        print(f"{method:<18}" + "".join(f"{figure:>10.1f}" for figure in figures) + smashed)


if __name__ == "__main__":
    main()
