"""A run with several workers is the run of one process, to the bit."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import cutlayer.algorithms as algorithms
from cutlayer.algorithms.splitfed import ReplicaServer
from cutlayer.runtime.rounds.evaluator import Evaluator
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.seats import Seats
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


RESNET = ("model=resnet18", "model.options.width=4")


@pytest.mark.parametrize("keys", [(), ("model.server.optimizer.keep=round", "aggregate.buffers=average", *RESNET)])
def test_a_copy_of_the_server_computes_beside_its_client(
    keys: tuple[str, ...], configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = (*settings("sl_multi_server"), "optimizer=sgd", "optimizer.momentum=0.9", "rounds=3", *keys)
    alone = Federation(configure(*several))
    expected = recorded(alone)
    with federation(configure(*several, "workers=2")) as made:
        monkeypatch.delattr(ReplicaServer, "on_smashed")
        assert recorded(made) == expected
        assert same(weights(made), weights(alone))
        assert same(kept(made), kept(alone))
        assert made.seconds["server"] > 0


def kept(federation: Federation) -> dict[str, torch.Tensor]:
    """All that the server keeps for clients."""
    store = federation.stores["server"]
    return {f"{row}/{name}": value for row in store.all() for name, value in (store.get(*row) or {}).items()}


def test_a_copy_that_draws_stays_with_the_server(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    """All clients' copies draw from one stream, here through a function, which no module tells of."""
    dropout = (*settings("sl_multi_server"), "model=vit", "model.options.dropout=0.5", "model.options.depth=4")
    alone = Federation(configure(*dropout))
    with federation(configure(*dropout, "workers=2")) as made:
        assert recorded(made) == recorded(alone)
        assert same(weights(made), weights(alone))
    assert caplog.text.count("round 1 is repeated from its start: the server draws random numbers") == 1
    assert "round 2" not in caplog.text
