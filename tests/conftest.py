"""What all tests share: configurations from the real Hydra files, and few threads."""

import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from cutlayer.runtime.ground.importing import quick_imports

with quick_imports():
    import torch

    from cutlayer.datasets.partition import Partition
    from cutlayer.datasets.partition_files import save_partition
    from cutlayer.runtime import experiment
    from cutlayer.runtime.launching.hydra_support import load_config
    from cutlayer.runtime.rounds.federation import Federation
    from cutlayer.runtime.settings import RunConfig
    from tests.composing import Known, quick_composition
    from tests.forked import Forks, server
    from tests.places import ROOT

# How long an example takes says nothing on a shared machine.
settings.register_profile("house", deadline=None)
settings.load_profile("house")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
forget = quick_composition()

SMALL = (
    "num_clients=4",
    "rounds=2",
    "batch_size=100",
    "eval_interval=100",
    "device=cpu",
    "dataset=digits",
    "model=mlp",
    "model.projector.hidden=16",
    "model.projector.width=16",
)


# What starts many processes and waits for them goes first, the longest before all others, so that one test process is
# not left alone with it.
WAITING = ("test_sweep.py", "test_hosts.py", "test_kill.py", "test_main.py", "test_readme.py", "test_wheel.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: WAITING.index(item.path.name) if item.path.name in WAITING else len(WAITING))
    gc.freeze()  # thousands of tests and all that they import stay to the end


@pytest.fixture(scope="session", autouse=True)
def compositions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one test process has composed, those beside it need not compose again."""
    if hasattr(request.config, "workerinput"):  # else what is above the folder is not this session's
        Known.folder = tmp_path_factory.getbasetemp().parent / "composed"
        Known.folder.mkdir(exist_ok=True)


@pytest.fixture(scope="session", autouse=True)
def pictures_of_partitions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs in this process whose clients have the same data draw that once, as the jobs of a sweep do."""
    drawn = tmp_path_factory.mktemp("pictures")

    def saved(folder: Path, parts: Partition, labels: Any, classes: int, names: Any, shared: Path | None) -> None:
        save_partition(folder, parts, labels, classes, names, drawn if shared is None else shared)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "save_partition", saved)
        yield


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts a program, but no sweeps, without the seconds that each new process loads the libraries."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}
    with server(ROOT, tmp_path_factory.mktemp("forked"), environment) as made:
        yield made


@pytest.fixture(scope="session")
def configure() -> Callable[..., RunConfig]:
    """``configure("algorithm=fed_avg", ...)``: what main.py would run, on a small setting."""
    return _configured


@cache
def _configured(*overrides: str) -> RunConfig:
    return load_config([*SMALL, *overrides])


def play(federation: Federation, rounds: int | None = None) -> Federation:
    """Run to the end, or for a number of rounds."""
    while not federation.done and rounds != 0:
        federation.step()
        rounds = None if rounds is None else rounds - 1
    return federation


def weights(federation: Federation) -> dict[str, torch.Tensor]:
    """Everything that a run has learnt: the server's parts and every row of both stores."""
    state = {
        f"{name}/{key}": tensor.clone()
        for name, part in federation.server.ctx.parts.items()
        for key, tensor in part.state_dict().items()
    }
    for kind, store in federation.stores.items():
        for client, row in store.all():
            for key, tensor in (store.get(client, row) or {}).items():
                state[f"{kind}/{client}/{row}/{key}"] = tensor
    return state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
