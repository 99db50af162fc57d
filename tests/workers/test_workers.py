"""A run with several workers is the run of one process, to the bit."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cutlayer.algorithms as algorithms
from cutlayer.runtime.rounds.evaluator import Evaluator
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.local_clients import Seats
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.workers.clients import WorkerClients
from tests.conftest import same, weights

Configure = Callable[..., RunConfig]


@contextmanager
def federation(config: RunConfig, folder: Path | None = None) -> Generator[Federation]:
    """A federation whose clients are at workers, which end with the block."""
    made = Federation(config, folder, clients=WorkerClients)
    try:
        yield made
    finally:
        assert isinstance(made.clients, WorkerClients)
        made.clients.close()


def recorded(federation: Federation) -> list[object]:
    """What the rounds that are left give, but for times."""
    found: list[object] = []
    while not federation.done:
        record, lines = federation.step()
        values = {name: value for name, value in vars(record).items() if not name.startswith("time_")}
        found += [values, lines]
    return found


def settings(name: str) -> tuple[str, ...]:
    return (f"algorithm={name}", "model=cnn2", "eval_interval=1", "optimizer.keep=run", "num_clients=5", "frac=0.8")


@pytest.mark.parametrize("name", [name for name in algorithms.names() if not algorithms.get(name).pooled])
def test_several_workers_give_the_bits_and_the_ledger_of_one_process(
    name: str, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Federation(configure(*settings(name)))
    expected = recorded(alone)
    with federation(configure(*settings(name), "workers=3")) as made:
        # Neither is computed here.
        monkeypatch.delattr(Seats, "open")
        if made.setup.personal:
            monkeypatch.delattr(Evaluator, "of_client")
        assert recorded(made) == expected
        assert same(weights(made), weights(alone))
