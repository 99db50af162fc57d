"""However a run with workers ends, none of its processes is left, and a mistake is one line."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cutlayer.algorithms import ALGORITHMS, Algorithm
from cutlayer.algorithms.fed_avg import FedAvg
from cutlayer.algorithms.splitfed import SplitFedV1
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Payload, Upload, ask, owned
from cutlayer.runtime.messages.codec import encode
from cutlayer.runtime.messages.crossing import packed
from cutlayer.runtime.parties.contexts import ClientContext
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.workers import processes
from cutlayer.runtime.workers.clients import WorkerClients
from tests.places import program
from tests.test_main import environment
from tests.workers.test_workers import federation

Configure = Callable[..., RunConfig]
LONG = ("algorithm=fed_avg", "dataset=digits", "model=cnn2", "num_clients=4", "rounds=100000", "workers=2")


def of(mark: str) -> list[int]:
    """The processes that were started with this word in their environment."""
    found: list[int] = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            content = Path("/proc", process, "environ").read_bytes()
        except OSError:
            continue
        found += [int(process)] if mark.encode() in content else []
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left(number: signal.Signals, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    run = subprocess.Popen(
        [*program("main"), *LONG, f"save_dir={tmp_path}", "progress=lines"],
        env={**environment(), "MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout is not None
    for line in run.stdout:
        if "round 1/" in line:
            break
    assert len(of(mark)) >= 4, "the run, what starts processes, two workers"
    run.send_signal(number)
    run.communicate(timeout=60)
    until = time.monotonic() + 30
    while of(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert of(mark) == []


def test_what_a_run_begins_with_workers_another_number_ends(configure: Configure, tmp_path: Path) -> None:
    keys = ("algorithm=fed_per", "model=cnn2", "rounds=3", "eval_interval=1")
    whole = Federation(configure(*keys))
    records = [whole.step()[0] for _ in range(3)]
    with federation(configure(*keys, "workers=3"), tmp_path) as first:
        first.step()
        first.checkpoint({})
    second = Federation(configure(*keys), tmp_path)
    second.resume()
    assert [second.step()[0].test_acc for _ in range(2)] == [record.test_acc for record in records[1:]]
    assert second.setup.config.identity() == first.setup.config.identity()


class _Raises(FedAvg):
    """FedAvg with a client that makes a mistake."""

    name = "raises"

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram | Fields:
        if ctx.id == 2:
            raise ConfigError("lr", 7, "a rate that converges") if ctx.round == 0 else LookupError("nothing here")
        return FedAvg.client(ctx, down)


def test_what_a_client_raises_the_run_raises(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "raises", _Raises)
    with federation(replace(configure("algorithm=fed_avg", "workers=2"), algorithm_name="raises")) as made:
        with pytest.raises(ConfigError, match="lr=7: expected a rate that converges") as one:
            made.step()
        assert "in a worker" in one.value.__notes__[0]
        made.round = 1
        with pytest.raises(LookupError, match="nothing here"):
            made.step()


def test_a_client_that_begins_again_begins_with_what_it_was_sent_first(configure: Configure) -> None:
    config = configure("algorithm=fed_avg", "local_epochs=20", "workers=2")
    alone = Federation(config)
    session = alone.clients.open(0, 0)  # pyright: ignore[reportAttributeAccessIssue]
    session.send(owned(packed(alone.server.down(0))))
    expected = session.receive()
    with federation(config) as made:
        assert isinstance(made.clients, WorkerClients)
        session = made.clients._begin(0, 0, None)  # pyright: ignore[reportPrivateUsage]
        sent = owned(packed(made.server.down(0)))
        session.send(sent)
        (process, *_) = made.clients.pool.living()
        os.kill(process, signal.SIGKILL)
        for value in sent.values():
            assert isinstance(value, torch.Tensor)
            value.zero_()  # as a server that goes on learning
        found = session.receive()
        assert made.clients.pool.living() != [process]
    assert isinstance(found, Upload)
    assert isinstance(expected, Upload)
    assert encode(found.fields) == encode(expected.fields)


def _dies(*_: object) -> None:
    os._exit(3)


class _Poison(FedAvg):
    """FedAvg with a client that no worker survives, while the others end their rounds."""

    name = "poison"

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram | Fields:
        if ctx.id == 2:
            os._exit(9)
        return FedAvg.client(ctx, down)


class _PoisonLater(SplitFedV1):
    """The same where the server answers within a round, so that the round is repeated."""

    name = "poison_later"

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram:
        for x, y in ctx.batches():
            yield ask("smashed", z=ctx.part("client")(x), y=y)
            if ctx.id == 2:
                os._exit(9)
        return ctx.dump("client")


@pytest.mark.parametrize(("method", "base"), [(_Poison, "fed_avg"), (_PoisonLater, "sl_multi_server")])
def test_a_client_that_every_worker_dies_of_ends_the_run(
    method: type[Algorithm], base: str, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the others end their rounds in between."""
    monkeypatch.setitem(ALGORITHMS, method.name, method)
    config = configure(f"algorithm={base}", "workers=2")
    dead = pytest.raises(ConfigError, match=r"that live: 7 died in one round, the last exit status 9 with client 2$")
    with federation(replace(config, algorithm_name=method.name)) as made, dead:
        made.step()


def test_workers_that_die_one_after_another_end_the_run(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "be_worker", _dies)
    dead = pytest.raises(ConfigError, match=r"workers=2: expected workers that live: 7 died in one round, .*status 3")
    with federation(configure("algorithm=fed_avg", "workers=2")) as made, dead:
        made.step()
    assert "another takes its place" in caplog.text


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("workers=5",), "workers=5: expected at most 4, the clients of a round"),
        (("frac=0.5", "workers=3"), "workers=3: expected at most 2, the clients of a round"),
        (("algorithm=centralized", "workers=2"), "workers=2: expected at most 1, the clients of a round"),
    ],
)
def test_more_workers_than_clients_are_refused(keys: tuple[str, ...], line: str, configure: Configure) -> None:
    with pytest.raises(ConfigError) as error:
        Federation(configure("algorithm=fed_avg", *keys), clients=WorkerClients)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("workers=0",), "workers=0: expected auto, or an integer >= 1"),
        (
            ("workers=2", "transport=grpc", "role=server"),
            "workers=2: expected 1 with transport=grpc, whose clients compute elsewhere",
        ),
    ],
)
def test_workers_that_cannot_be_are_refused(keys: tuple[str, ...], line: str, configure: Configure) -> None:
    with pytest.raises(ConfigError) as error:
        configure("algorithm=fed_avg", *keys)
    assert str(error.value) == line


def test_auto_is_one_for_each_core_and_no_more_than_a_round_has_clients(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 3)
    for frac, expected in ((1.0, 3), (0.5, 2)):
        made = Federation(configure("algorithm=fed_avg", f"frac={frac}", "workers=auto"), clients=WorkerClients)
        assert isinstance(made.clients, WorkerClients)
        assert made.clients.count == expected
