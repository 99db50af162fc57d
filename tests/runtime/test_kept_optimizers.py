"""How long an optimizer's state lives: a round or the run, at a client, at its copies at the server, at the server."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cutlayer import algorithms
from cutlayer.runtime.costs.metering import measure_costs
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.parties.optim import load_optimizer, make_optimizer, optimizer_config, optimizer_tensors
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.settings import RunConfig
from tests.algorithms.drawing import Drawn
from tests.conftest import play
from tests.contract.test_contract import quick

Configure = Callable[..., RunConfig]
KINDS = {
    "sgd": ("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.weight_decay=0.001"),
    "adam": ("optimizer=adam", "optimizer.amsgrad=true"),
    "adafactor": ("optimizer.name=adafactor",),
}
# What goes on by itself.
OWN_CHOICE = {
    "local_only": {"model"},
    "centralized": {"model"},
    "ressfl": {"client", "server", "attacker"},
    "moco_sfl": {"client"},
    "fl_moco": {"model", "projector"},
}


def rows(federation: Federation, store: str) -> set[tuple[int, str]]:
    return {(client, row) for client, row in federation.stores[store].all() if row.endswith(".optimizer")}


@pytest.mark.parametrize("keep", ["run", "round", "null"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_against_a_loop_with_one_optimizer_or_with_many(configure: Configure, kind: str, keep: str) -> None:
    """Clients that take part now and then, at falling rates: the optimizer goes on from its last step."""
    federation = Federation(
        configure(
            "algorithm=fed_avg", *KINDS[kind], f"optimizer.keep={keep}", "precision=fp64", "frac=0.5", "rounds=5",
            "lr=0.01", "scheduler=exponential", "scheduler.gamma=0.5", "local_epochs=2",
        )
    )  # fmt: skip
    drawn, model = Drawn(federation), federation.setup.blueprint.parts(["model"])["model"].train()
    optimizers: dict[int, tuple[nn.Module, torch.optim.Optimizer]] = {}
    for round in range(5):
        states, total = [], 0
        for client in drawn.cohort(round):
            if client not in optimizers or keep != "run":
                own = copy.deepcopy(model)
                config = federation.setup.config.optimizer_for("model")
                optimizers[client] = own, make_optimizer(config, own.parameters())
            own, optimizer = optimizers[client]
            own.load_state_dict(model.state_dict())
            optimizer.param_groups[0]["lr"] = 0.01 * 0.5**round
            for x, y in drawn.batches(round, client):
                optimizer.zero_grad()
                cross_entropy(own(x), y).backward()
                optimizer.step()
            size = len(federation.setup.partition.indices(client))
            states.append((size, copy.deepcopy(own.state_dict())))
            total += size
        model.load_state_dict({key: sum(n / total * s[key] for n, s in states) for key in model.state_dict()})
    play(federation)
    for key, value in federation.server.ctx.part("model").state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-10, atol=1e-12)
    seen = {client for round in range(5) for client in drawn.cohort(round)}
    assert rows(federation, "clients") == {(client, "model.optimizer") for client in seen if keep == "run"}


@pytest.mark.parametrize("keep", ["run", "round"])
@pytest.mark.parametrize("name", algorithms.names())
def test_every_part_of_every_method(configure: Configure, name: str, keep: str) -> None:
    """A key for all, refined for one part after another: what the methods do not say themselves."""
    setting = (f"algorithm={name}", *quick(name), "num_clients=2", "dataset.fraction=0.25")
    layout = algorithms.get(name).layout
    plain = _kept_parts(configure(*setting))
    assert plain == OWN_CHOICE.get(name, set())
    everything = _kept_parts(configure(*setting, f"optimizer.keep={keep}"))
    assert everything <= {*layout.client, *layout.server}
    if keep == "round":
        assert not everything
        return
    assert {part for part in layout.client if part in everything} or name in ("sl_single_server",)
    for part in {*layout.parts} - {"model"}:
        if part.endswith("_momentum"):
            continue
        refined = configure(*setting, "optimizer.keep=run", f"model.{part}.optimizer.keep=round")
        assert _kept_parts(refined) == everything - {part}


def _kept_parts(config: RunConfig) -> set[str]:
    federation = play(Federation(config), 1)
    kept = rows(federation, "clients") | rows(federation, "server")
    return {row.removesuffix(".optimizer") for _, row in kept}


@pytest.mark.parametrize("keep", ["run", "round"])
def test_a_server_that_trains_for_all(configure: Configure, keep: str) -> None:
    """Its optimizer lives for the run, unless it is said to live for a round: then its momentum is gone at the next."""
    config = configure("algorithm=sl", "optimizer=sgd", "optimizer.momentum=0.9", f"model.server.optimizer.keep={keep}")
    federation = play(Federation(config), 1)
    ctx = federation.server.ctx
    assert optimizer_tensors(ctx.optimizer("server").of(0))
    ctx.open_round(1)
    assert bool(optimizer_tensors(ctx.optimizer("server").of(0))) == (keep == "run")


def test_a_copy_at_the_server_goes_on_from_its_own_clients_last(configure: Configure) -> None:
    """SplitFed v1 with all optimizers kept is FedAvg with its own kept, to rounding."""
    setting = ("precision=fp64", "optimizer.keep=run", "rounds=4", "frac=0.75", "lr=0.01")
    split, whole = (
        play(Federation(configure(f"algorithm={name}", *setting))) for name in ("sl_multi_server", "fed_avg")
    )
    halves = [split.server.ctx.part(name) for name in ("client", "server")]
    learnt = [value for part in halves for value in part.state_dict().values()]
    fresh = play(Federation(configure("algorithm=fed_avg", *setting, "optimizer.keep=round")))
    kept, renewed = ([*each.server.ctx.part("model").state_dict().values()] for each in (whole, fresh))
    for ours, other in zip(learnt, kept, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-11)
    apart = max(float((a - b).abs().max()) for a, b in zip(learnt, renewed, strict=True))
    assert apart > 1e-3


@pytest.mark.parametrize("name", ["fed_avg", "sl_multi_server"])
def test_a_client_that_drops_out_has_not_taken_its_steps(configure: Configure, name: str) -> None:
    federation = play(Federation(configure(f"algorithm={name}", "optimizer.keep=run", "rounds=2")), 1)
    before = {key: federation.stores[key[0]].get(*key[1]) for key in _all(federation)}
    ctx = federation.server.ctx
    if name == "sl_multi_server":
        ctx.open_round(1)
        model, optimizer = ctx.replica("server", 0)
        optimizer.update(sum(p.square().sum() for p in model.parameters()))
        ctx.forget(0)
        ctx.leave(0)
    for store in federation.stores.values():
        store.put(0, "model.optimizer", {"0/step": torch.zeros(())})
    federation._discard(0)
    for store in federation.stores.values():
        store.commit()
    after = {key: federation.stores[key[0]].get(*key[1]) for key in _all(federation)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key][entry], after[key][entry]) for key in before for entry in before[key])


def _all(federation: Federation) -> list[tuple[str, tuple[int, str]]]:
    return [(name, row) for name in ("clients", "server") for row in sorted(rows(federation, name))]


def _state(name: str, shape: tuple[int, ...] = (3, 2), **options: float) -> dict[str, torch.Tensor]:
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = make_optimizer(optimizer_config({"name": name, "lr": 0.1, **options}), [parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer_tensors(optimizer)


@pytest.mark.parametrize(
    ("kept", "reason"),
    {
        "another optimizer": (_state("adam"), "SGD keeps momentum_buffer"),
        "none of its own": (_state("sgd", nesterov=False), None),
        "another part": (_state("sgd", (2, 2), momentum=0.9), r"momentum_buffer \[3, 2\] of a parameter here"),
        "a longer part": ({"4/momentum_buffer": torch.zeros(3, 2)}, "more than the 1 parameters"),
        "its own": (_state("sgd", momentum=0.9), None),
    }.values(),
)
def test_state_that_does_not_fit_is_refused(kept: dict[str, torch.Tensor], reason: str | None) -> None:
    config = optimizer_config({"name": "sgd", "lr": 0.1, "momentum": 0.9})
    optimizer = make_optimizer(config, [nn.Parameter(torch.zeros(3, 2))])
    if reason is None:
        load_optimizer(optimizer, kept)
        assert optimizer_tensors(optimizer).keys() == kept.keys()
        return
    with pytest.raises(ValueError, match=reason):
        load_optimizer(optimizer, kept)


def test_a_run_that_finds_such_state_ends_in_one_line(configure: Configure) -> None:
    federation = Federation(configure("algorithm=fed_avg", "optimizer.keep=run"))
    for client in range(4):
        federation.stores["clients"].put(client, "model.optimizer", _state("sgd", momentum=0.9))
    with pytest.raises(ConfigError, match=r"^optimizer=adam: expected .*Adam keeps exp_avg"):
        federation.step()


@pytest.mark.parametrize("value", ["always", "3", "true", "[run]"])
@pytest.mark.parametrize("key", ["optimizer.keep", "model.client.optimizer.keep"])
def test_another_word_is_refused(configure: Configure, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}=.*\(choices: round, run\)$"):
        configure("algorithm=sl", f"{key}={value}")


def test_what_it_costs_on_disk(configure: Configure) -> None:
    """Two moments and a count for each tensor, at the client and at its copy; nothing where nothing is kept."""
    setting = ("algorithm=sl_multi_server", "optimizer=adam", "num_clients=7")
    assert set(measure_costs(configure(*setting)).kept.values()) == {0}
    config = configure(*setting, "optimizer.keep=run")
    found, parts = measure_costs(config), Federation(config).setup.blueprint.parts(["client", "server"])
    closed = [sum(2 * p.numel() * 4 + 4 for p in parts[part].parameters()) for part in ("client", "server")]
    assert [found.kept["clients"], found.kept["server"]] == closed
    assert found.population == 7
