"""One side's run: `python -m benchmarks.peers.side cutlayer FOLDER WORKERS NAME`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.peers.work import Clock, Counted, Given


class Done(NamedTuple):
    """What a side has done; ``versions`` are those of its packages, by name."""

    weights: Mapping[str, Tensor]
    counted: Counted
    versions: Mapping[str, str]


Run = Callable[[Given, int, Clock], "Done | None"]
"""Does the work with so many workers and tells the clock of each round; one process of several gives what was done."""


def main(arguments: Sequence[str]) -> None:
    """Do the work and leave what there is to tell."""
    side, folder, workers, name = arguments
    torch.set_num_threads(1)
    given, clock = Given(Path(folder)), Clock()
    # Not the module that is run, which a process that is sent functions of it would not find.
    run: Run = importlib.import_module(f"benchmarks.peers.by_{side}").run
    done = run(given, int(workers), clock)
    if done is not None:
        given.tell(name, *done[:2], clock, done.versions)


if __name__ == "__main__":
    main(sys.argv[1:])
