"""Personalised methods against bare loops of their own equations, as in `test_references`."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from runtime import rng
from runtime.federation import Federation
from tests.algorithms.test_references import ROUNDS, SETTING, Bare, descend
from tests.conftest import play


def slopes(loss: torch.Tensor, *models: torch.nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [w for model in models for w in model.parameters()]))


def stream(bare: Bare, round: int, client: int, name: str, epochs: int | None = None) -> list:
    generator = rng.torch_generator(bare.federation.config.seed, round=round, client=client, stream=name)
    return list(bare.federation.clients.data(client).batches(generator, epochs))


def check_rows(bare: Bare, name: str, own: dict[int, torch.nn.Module]) -> None:
    for client, module in own.items():
        row = bare.federation.stores["clients"].get(client, name)
        for key, value in module.state_dict().items():
            assert torch.allclose(row[key], value, rtol=1e-8, atol=1e-11), f"{client}/{name}/{key}"
            assert not torch.equal(value, bare.federation.blueprint.initial[name][key]), "nothing was learnt"


def test_fed_babu(configure) -> None:
    bare = Bare(Federation(configure(*SETTING, "algorithm=fed_babu")))
    head = bare.parts["head"]
    for round in range(ROUNDS):
        bodies = {}
        for client in bare.federation.cohort(round):
            (body,) = bare.copy("body")
            for x, y in bare.batches(round, client):
                descend(body, slopes(cross_entropy(head(body(x)), y), body))
            bodies[client] = body
        bare.average("body", bodies)
    bare.check("body")
    moved = bare.federation.server.ctx.part("head").state_dict()
    assert all(torch.equal(moved[key], value) for key, value in bare.federation.blueprint.initial["head"].items())


@pytest.mark.parametrize(("name", "shared", "own"), [("fed_per", "body", "head"), ("lg_fed_avg", "head", "body")])
def test_fed_per_and_lg_fed_avg(configure, name: str, shared: str, own: str) -> None:
    bare = Bare(Federation(configure(*SETTING, f"algorithm={name}")))
    mine = {client: bare.copy(own)[0] for client in range(2)}
    for round in range(ROUNDS):
        uploads = {}
        for client in bare.federation.cohort(round):
            parts = {shared: bare.copy(shared)[0], own: mine[client]}
            for x, y in bare.batches(round, client):
                both = torch.nn.Sequential(parts["body"], parts["head"])
                descend(both, slopes(cross_entropy(both(x), y), both))
            uploads[client] = parts[shared]
        bare.average(shared, uploads)
    bare.check(shared)
    check_rows(bare, own, mine)


@pytest.mark.parametrize("body_epochs", [1, 2])
def test_fed_rep(configure, body_epochs: int) -> None:
    bare = Bare(Federation(configure(*SETTING, "algorithm=fed_rep", f"algorithm.body_epochs={body_epochs}",
                                     "local_epochs=2")))  # fmt: skip
    heads = {client: bare.copy("head")[0] for client in range(2)}
    for round in range(ROUNDS):
        bodies = {}
        for client in bare.federation.cohort(round):
            (body,), head = bare.copy("body"), heads[client]
            for x, y in bare.batches(round, client):
                descend(head, slopes(cross_entropy(head(body(x)), y), head))
            for x, y in stream(bare, round, client, "body batches", body_epochs):
                descend(body, slopes(cross_entropy(head(body(x)), y), body))
            bodies[client] = body
        bare.average("body", bodies)
    bare.check("body")
    check_rows(bare, "head", heads)


@pytest.mark.parametrize("size", [150, 1000])  # five batches, so that one has no partner; one batch
def test_per_fed_avg(configure, size: int) -> None:
    alpha = 0.3
    setting = [*SETTING, "algorithm=per_fed_avg", f"algorithm.inner_lr={alpha}", f"batch_size={size}"]
    bare = Bare(Federation(configure(*setting)))
    odd = 0
    for round in range(ROUNDS):
        models = {}
        for client in bare.federation.cohort(round):
            (model,) = bare.copy("model")
            batches = bare.batches(round, client)
            odd += len(batches) % 2
            for k in range(0, len(batches), 2):
                first, second = batches[k], batches[min(k + 1, len(batches) - 1)]
                ahead = copy.deepcopy(model)
                inner = slopes(cross_entropy(model(first[0]), first[1]), model)
                with torch.no_grad():
                    for w, g in zip(ahead.parameters(), inner, strict=True):
                        w -= alpha * g
                descend(model, slopes(cross_entropy(ahead(second[0]), second[1]), ahead))
            models[client] = model
        bare.average("model", models)
    assert odd
    bare.check("model")


def test_ditto(configure) -> None:
    pull = 0.9
    bare = Bare(Federation(configure(*SETTING, "algorithm=ditto", f"algorithm.pull={pull}")))
    own: dict[int, torch.nn.Module] = {}
    for round in range(ROUNDS):
        models = {}
        for client in bare.federation.cohort(round):
            (model,) = bare.copy("model")
            anchor = [w.detach().clone() for w in model.parameters()]
            v = own.setdefault(client, copy.deepcopy(model))
            for x, y in stream(bare, round, client, "personal batches"):
                pulls = [pull * (w.detach() - a) for w, a in zip(v.parameters(), anchor, strict=True)]
                descend(v, [g + p for g, p in zip(slopes(cross_entropy(v(x), y), v), pulls, strict=True)])
            for x, y in bare.batches(round, client):
                descend(model, slopes(cross_entropy(model(x), y), model))
            models[client] = model
        bare.average("model", models)
    bare.check("model")
    check_rows(bare, "model", own)


def test_a_client_that_never_trained_uses_what_the_server_has(configure) -> None:
    federation = play(Federation(configure("algorithm=ditto", "frac=0.5", "rounds=1")))
    absent = next(c for c in range(4) if c not in federation.cohort(0))
    states = federation.client_states(absent)["model"]
    served = federation.server.ctx.part("model").state_dict()
    assert all(torch.equal(states[key], served[key]) for key in served)
    assert not torch.equal(states["fc1.weight"], federation.blueprint.initial["model"]["fc1.weight"])


@pytest.mark.parametrize(("key", "value"), [("fed_rep.body_epochs", 0), ("per_fed_avg.inner_lr", 0), ("ditto.pull", -1),
                                            ("mhmd.temperature", 0), ("mhmd.auxiliary_weight", -1)])  # fmt: skip
def test_bad_values_are_refused(configure, key: str, value: int) -> None:
    name, _, field = key.partition(".")
    with pytest.raises(ValueError, match=rf"algorithm\.{field}={value}(\.0)?: expected"):
        configure(f"algorithm={name}", f"algorithm.{field}={value}")
