"""Schedules: the same messages in another order give the same result, and a lost client harms nobody else."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cutlayer.algorithms.base import Algorithm, Server
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import ClientDroppedError, Message, ask, tell
from cutlayer.runtime.messages.crossing import tensor
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.rounds.federation import Federation, make_server
from cutlayer.runtime.rounds.local_clients import LocalClients
from cutlayer.runtime.rounds.schedule import RoundReport
from cutlayer.runtime.rounds.session import Session
from cutlayer.runtime.rounds.setup import Setup
from tests.conftest import play, same, weights


class Echo(Server):
    """Adds noise of its own to what it is sent."""

    def on_draw(self, client, message):
        return {"value": tensor(message, "value") + torch.rand(3)}

    def on_note(self, client, message):
        self.ctx.state(client).put("buffer", {"value": tensor(message, "value")})


class Noisy(Algorithm):
    """Draws random numbers between messages: wrong at once if clients share a random stream."""

    layout = Layout(client=("model",), server=("model",))
    shared = ("model",)
    Server = Echo

    @staticmethod
    def client(ctx, down):
        ctx.load(down)
        total = torch.rand(3)
        for _ in range(3):
            reply = yield ask("draw", value=total + torch.rand(3))
            total = tensor(reply, "value") + torch.rand(3)
            yield tell("note", value=total)
        ctx.state.put("buffer", {"value": total})
        return {}


class CohortEcho(Echo):
    """Sees the cohort's messages together."""

    def on_draw_cohort(self, inbox):
        together = torch.stack([tensor(message, "value") for message in inbox.values()]).sum(0)
        return {client: {"value": together} for client in inbox}


def federation_of(
    config, algorithm: type[Algorithm], clients: Callable[[Setup, Store], LocalClients] = LocalClients
) -> Federation:
    federation = Federation(config, clients=clients)
    federation.setup.algorithm = algorithm
    federation.server = make_server(federation.setup, federation.stores["server"])
    return federation


def client_rows(federation: Federation) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights(federation).items() if key.startswith("clients/")}


def variant(algorithm: type[Algorithm], **attributes) -> type[Algorithm]:
    return type(algorithm.__name__, (algorithm,), attributes)


def test_a_clients_randomness_does_not_depend_on_who_runs_between(configure) -> None:
    config = configure("algorithm=fed_avg", "rounds=1")
    silent = type("Silent", (Echo,), {"on_draw": lambda self, client, message: {"value": tensor(message, "value")}})
    alone = federation_of(config, variant(Noisy, Server=silent))
    together = federation_of(config, variant(Noisy, Server=silent, schedule="lockstep"))
    rows = client_rows(play(alone))
    assert len(rows) == 4
    assert same(rows, client_rows(play(together)))


def test_splitfed_v1_is_the_same_in_lockstep(configure) -> None:
    config = configure("algorithm=sl_multi_server", "dataset.distribution=dirichlet")
    sequential = Federation(config)
    algorithm = variant(sequential.setup.algorithm, schedule="lockstep")
    lockstep = federation_of(config, algorithm)
    play(sequential)
    play(lockstep)
    assert sequential.ledger.training().payload == lockstep.ledger.training().payload
    for key, value in weights(sequential).items():
        assert torch.allclose(weights(lockstep)[key], value, atol=1e-6), key


def test_a_lockstep_handler_sees_the_whole_cohort(configure) -> None:
    federation = federation_of(configure("algorithm=fed_avg"), variant(Noisy, Server=CohortEcho, schedule="lockstep"))
    seen = []
    original = CohortEcho.on_draw_cohort

    def watch(self, inbox):
        seen.append(set(inbox))
        return original(self, inbox)

    federation.server.on_draw_cohort = watch.__get__(federation.server)
    federation.step()
    assert seen == [{0, 1, 2, 3}] * 3


@pytest.mark.parametrize("schedule", ["sequential", "lockstep"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_client_that_drops_out_leaves_no_trace(configure, schedule: str, after: int) -> None:
    """The survivors' average is that of a run in which the lost client never took part."""
    config = configure("algorithm=sl_multi_server", "rounds=1")
    base = Federation(config).setup.algorithm

    def losing(ctx, down):
        program = base.client(ctx, down)
        message = next(program)
        sent = 0
        while True:
            if ctx.id == 2 and sent == after:
                ctx.state.put("buffer", {"value": torch.ones(1)})
                raise ClientDroppedError
            assert isinstance(message, Message)
            reply = yield message
            sent += 1
            try:
                message = program.send(reply)
            except StopIteration as end:
                return end.value

    lossy = federation_of(config, variant(base, client=staticmethod(losing), schedule=schedule))
    record, _ = lossy.step()
    assert record.clients == 3
    assert record.metrics["dropped"] == 1
    assert lossy.stores["clients"].get(2, "buffer") is None
    without = federation_of(config, variant(base, schedule=schedule))
    everyone = without.cohort(0)
    without.cohort = lambda round: [client for client in everyone if client != 2]  # type: ignore[method-assign]
    without.step()
    assert same(weights(lossy), weights(without))


@pytest.mark.parametrize("schedule", ["sequential", "lockstep"])
@pytest.mark.parametrize("place", [0, 3])
def test_a_client_that_has_left_before_its_turn_is_lost_alone(configure, schedule: str, place: int) -> None:
    config = configure("algorithm=sl_multi_server", "rounds=1")
    algorithm = variant(Federation(config).setup.algorithm, schedule=schedule)
    without = federation_of(config, algorithm)
    cohort = without.cohort(0)
    absent = cohort[place]

    class Leaving(LocalClients):
        def open(self, client: int, round: int) -> Session:
            if client == absent:
                raise ClientDroppedError
            return super().open(client, round)

    lossy = federation_of(config, algorithm, Leaving)
    record, lines = lossy.step()
    assert record.clients == 3
    assert record.metrics["dropped"] == 1
    without.cohort = lambda round: [client for client in cohort if client != absent]  # type: ignore[method-assign]
    assert without.step()[1] == lines
    assert same(weights(lossy), weights(without))


@pytest.mark.parametrize("schedule", ["sequential", "lockstep"])
@pytest.mark.parametrize("what", ["serve", "absorb"])
def test_a_client_whose_message_the_server_refuses_is_lost_alone(configure, schedule: str, what: str) -> None:
    def client(ctx, down):
        yield ask("other" if ctx.id == 2 else "draw", value=torch.ones(3))
        return {}

    algorithm = variant(Noisy, client=staticmethod(client), schedule=schedule)

    class Refusing(LocalClients):
        def train(self, cohort, round, drop, server, ledger) -> RoundReport:
            def refuse(first, *rest):
                if first == ("other" if what == "serve" else 2):
                    raise ClientDroppedError
                return getattr(server, what)(first, *rest)

            methods = {name: getattr(server, name) for name in ("down", "serve", "absorb", "forget")}
            stricter: Any = SimpleNamespace(**{**methods, what: refuse})
            return super().train(cohort, round, drop, stricter, ledger)

    federation = federation_of(configure("algorithm=fed_avg", "rounds=1"), algorithm, Refusing)
    federation.server.on_other = federation.server.on_draw
    record, _ = federation.step()
    assert record.clients == 3
    assert record.metrics["dropped"] == 1


def test_a_cohort_that_does_not_fit_in_memory_is_refused(configure, monkeypatch) -> None:
    federation = federation_of(configure("algorithm=fed_avg"), variant(Noisy, schedule="lockstep"))
    monkeypatch.setattr("cutlayer.runtime.rounds.local_clients._available_memory", lambda device: 1000)
    with pytest.raises(
        ConfigError, match="frac=1.0: expected a cohort that fits in memory: 4 clients in lockstep need"
    ):
        federation.step()


def test_a_message_without_a_handler_is_an_error(configure) -> None:
    federation = federation_of(configure("algorithm=fed_avg"), variant(Noisy, Server=Server))
    with pytest.raises(ValueError, match="Server has no handler for messages of kind 'draw'"):
        federation.step()


def test_cohorts_follow_the_fraction_and_the_seed(configure) -> None:
    federation = Federation(configure("algorithm=fed_avg", "num_clients=30", "frac=0.1"))
    cohorts = [federation.cohort(round) for round in range(200)]
    assert {len(cohort) for cohort in cohorts} == {3}, "0.1 of 30 is 3, whatever floating point makes of it"
    assert all(len(set(cohort)) == 3 for cohort in cohorts)
    assert {client for cohort in cohorts for client in cohort} == set(range(30))
    assert len({tuple(cohort) for cohort in cohorts}) > 150
    assert cohorts == [federation.cohort(round) for round in range(200)]


def test_clients_with_too_little_data_are_skipped(configure) -> None:
    """An empty client always; one with a single sample only where normalisation needs two."""
    setting = ("num_clients=60", "dataset.distribution=quantity_skew", "dataset.alpha=0.2", "dataset.min_samples=0")
    plain = Federation(configure("algorithm=fed_avg", *setting, "rounds=1"))
    # The stem for ImageNet leaves one pixel of an 8x8 image: one sample has no variance there.
    tiny = ("model=resnet18", "model.options.width=2", "rounds=1")
    normed = Federation(configure("algorithm=fed_avg", *setting, *tiny))
    split = Federation(configure("algorithm=sl_single_server", *setting, *tiny, "model.cut=conv1"))
    sizes = plain.setup.partition.sizes
    assert (sizes == 0).any()
    assert (sizes == 1).any()
    assert sorted(plain.cohort(0)) == [client for client in range(60) if sizes[client] > 0]
    for federation in (normed, split):
        assert sorted(federation.cohort(0)) == [client for client in range(60) if sizes[client] > 1]
    for federation in (plain, normed, split):
        record, _ = federation.step()
        assert record.train_loss is not None
        assert record.train_loss == record.train_loss


def test_batches_of_one_that_cannot_be_normalised_are_refused(configure) -> None:
    model = ("algorithm=fed_avg", "model=resnet18", "model.options.width=2")
    with pytest.raises(ConfigError, match="batch_size=1: expected at least 2"):
        Federation(configure(*model, "batch_size=1"))
    with pytest.raises(ConfigError, match="dataset.drop_last=never: expected auto or always"):
        Federation(configure(*model, "dataset.drop_last=never", "batch_size=2", "num_clients=7"))
    record, _ = Federation(configure("algorithm=fed_avg", "batch_size=1", "num_clients=100", "frac=0.01")).step()
    assert record.clients == 1


def test_clients_without_a_full_batch_are_skipped_when_only_full_ones_count(configure) -> None:
    setting = ("dataset.drop_last=always", "dataset.distribution=quantity_skew", "dataset.alpha=0.3", "num_clients=20")
    federation = Federation(configure("algorithm=scaffold", *setting, "batch_size=64"))
    assert sorted(federation.cohort(0)) == [c for c in range(20) if federation.setup.partition.sizes[c] >= 64]
    assert len(federation.cohort(0)) < 20
