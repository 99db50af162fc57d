"""What the tests of the launchers share: sweeps by joblib, which the others have to equal."""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cutlayer.runtime.run_folder import read_status
from tests.launchers.namespace import Namespace, sweep_command
from tests.places import ROOT

SHORT = ("num_clients=2,3,100000", "rounds=2")
"""Three jobs, the last of which cannot run."""
LONG = ("num_clients=3", "rounds=150", "seed=0,1", "eval_interval=50", "checkpoint_interval=1")
"""Two jobs long enough to be disturbed."""

Found = dict[str, tuple[dict[str, Any], str]]


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


@pytest.fixture(scope="package")
def by_joblib(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Found]:
    """What a sweep by joblib leaves; each is run once."""
    known: dict[tuple[str, ...], Found] = {}

    def leave(arguments: tuple[str, ...]) -> Found:
        if arguments not in known:
            saves = tmp_path_factory.mktemp("joblib")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}
            command = sweep_command(saves, "parallel", *arguments, "hydra.launcher.n_jobs=2")
            subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, timeout=200)
            known[arguments] = left(saves)
            assert len(known[arguments]) == 2
        return known[arguments]

    return leave


def left(saves: Path) -> Found:
    """Of each finished run, by its configuration: the results without times, and what the model's bytes hash to."""
    found: Found = {}
    for folder in (mark.parent for mark in saves.rglob("identity")):
        if read_status(folder)["state"] == "finished":
            results = json.loads((folder / "results.json").read_text())
            times = {key: None for key in results if key.startswith("time_")}
            model = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
            found[(folder / "identity").read_text()] = (results | times, model)
    return found


def jobs(saves: Path) -> list[dict[str, Any]]:
    """The jobs of the only sweep below `saves`, in order."""
    states = [json.loads(path.read_text()) for path in saves.glob("multirun/*/jobs/*/state.json")]
    return sorted(states, key=lambda job: job["number"])


def in_mid_run(saves: Path, process: subprocess.Popen[str], seconds: float = 150) -> None:
    """Wait until both jobs of LONG have completed some rounds."""
    end = time.monotonic() + seconds
    while True:
        rows = [path.read_text().count("\n") for path in saves.rglob("metrics.csv")]
        if len(rows) == 2 and all(row > 3 for row in rows):
            return
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the jobs never ran"
        time.sleep(0.05)
