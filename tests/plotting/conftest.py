"""Runs as the platform writes them, with curves in closed form."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutlayer.runtime.records.results import Results, RoundRecord

WriteRun = Callable[..., Path]


def config_of(
    method: str, *, seed: int = 0, alpha: float = 0.1, distribution: str = "iid", **keys: Any
) -> dict[str, Any]:
    return {
        "algorithm": {"name": method},
        "model": {"name": "resnet18", "cut": None, "options": {}},
        "dataset": {"name": "cifar10", "root": "data", "distribution": distribution, "alpha": alpha, "options": {}},
        "lr": 0.001,
        "seed": seed,
        "save_dir": "saves",
        "resume": "auto",
        "logger": {"csv": {}},
        **keys,
    }


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """A function that writes one run into `tmp_path / "saves"`.

    Its accuracy in round t is ceiling * (1 - exp(-t / 5)) plus 0.01 * seed, each round sends `sent` bytes, of which 10
    are labels.
    """
    made = 0

    def write(
        method: str, *, ceiling: float = 0.9, sent: int = 1000, rounds: int = 20, finished: bool = True, **keys: Any
    ) -> Path:
        nonlocal made
        made += 1
        config = config_of(method, **keys)
        folder = tmp_path / "saves" / method / f"run{made}"
        results = Results(folder)
        results.start(config)
        for number in range(1, rounds + 1):
            accuracy = ceiling * (1 - math.exp(-number / 5)) + 0.01 * config["seed"]
            load = sent * number
            record = RoundRecord(number, accuracy, 1.0, 1.0, load, load, 0, load, *[1.0 * number] * 4, clients=2)
            lines = [(number, "up", "smashed", "z", 0, sent - 10, sent), (number, "up", "smashed", "y", 0, 10, 10)]
            results.record(record, lines if sent else [])
        if finished:
            results.finish()
        else:
            results.close()
        return folder

    return write
