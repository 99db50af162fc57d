"""Personalised methods against bare loops of their own equations, as in `test_references`."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from cutlayer.algorithms.mhmd import MHMDConfig
from cutlayer.runtime.rounds.federation import Federation
from tests.algorithms.test_references import ROUNDS, SETTING, Bare, descend, learn, rate, slopes
from tests.conftest import play


def check_rows(bare: Bare, name: str, own: dict[int, torch.nn.Module]) -> None:
    assert own.keys() == {client for cohort in bare.cohorts for client in cohort}
    for client, module in own.items():
        row = bare.federation.stores["clients"].get(client, name)
        for key, value in module.state_dict().items():
            assert torch.allclose(row[key], value, rtol=1e-8, atol=1e-11), f"{client}/{name}/{key}"
            assert not torch.equal(value, bare.federation.setup.blueprint.initial[name][key]), "nothing was learnt"


def test_fed_babu(configure) -> None:
    bare = Bare(Federation(configure(*SETTING, "algorithm=fed_babu")))
    head = bare.parts["head"]
    for round, cohort in enumerate(bare.cohorts):
        bodies = {}
        for client in cohort:
            (body,) = bare.copy("body")
            for x, y in bare.batches(round, client):
                learn(bare.note(round, client, cross_entropy(head(body(x)), y)), (body, rate("body", round)))
            bodies[client] = body
        bare.average("body", bodies)
    bare.check("body")
    moved = bare.federation.server.ctx.part("head").state_dict()
    assert all(torch.equal(moved[key], value) for key, value in bare.federation.setup.blueprint.initial["head"].items())


@pytest.mark.parametrize(("name", "shared", "own"), [("fed_per", "body", "head"), ("lg_fed_avg", "head", "body")])
def test_fed_per_and_lg_fed_avg(configure, name: str, shared: str, own: str) -> None:
    bare = Bare(Federation(configure(*SETTING, f"algorithm={name}")))
    mine: dict[int, torch.nn.Module] = {}
    for round, cohort in enumerate(bare.cohorts):
        uploads = {}
        for client in cohort:
            parts = {shared: bare.copy(shared)[0], own: mine.setdefault(client, bare.copy(own)[0])}
            for x, y in bare.batches(round, client):
                loss = bare.note(round, client, cross_entropy(parts["head"](parts["body"](x)), y))
                learn(loss, *((part, rate(of, round)) for of, part in parts.items()))
            uploads[client] = parts[shared]
        bare.average(shared, uploads)
    bare.check(shared)
    check_rows(bare, own, mine)


@pytest.mark.parametrize("body_epochs", [1, 2])
def test_fed_rep(configure, body_epochs: int) -> None:
    bare = Bare(Federation(configure(*SETTING, "algorithm=fed_rep", f"algorithm.body_epochs={body_epochs}",
                                     "local_epochs=2")))  # fmt: skip
    heads: dict[int, torch.nn.Module] = {}
    for round, cohort in enumerate(bare.cohorts):
        bodies = {}
        for client in cohort:
            (body,), head = bare.copy("body"), heads.setdefault(client, bare.copy("head")[0])
            for x, y in bare.batches(round, client):
                learn(bare.note(round, client, cross_entropy(head(body(x)), y)), (head, rate("head", round)))
            for x, y in bare.batches(round, client, "body batches", body_epochs):
                learn(bare.note(round, client, cross_entropy(head(body(x)), y)), (body, rate("body", round)))
            bodies[client] = body
        bare.average("body", bodies)
    bare.check("body")
    check_rows(bare, "head", heads)


@pytest.mark.parametrize("size", [100, 1000])  # batches of which one has no partner; one batch
def test_per_fed_avg(configure, size: int) -> None:
    alpha = 0.3
    setting = [*SETTING, "algorithm=per_fed_avg", f"algorithm.inner_lr={alpha}", f"batch_size={size}"]
    bare = Bare(Federation(configure(*setting)))
    odd = 0
    for round, cohort in enumerate(bare.cohorts):
        models = {}
        for client in cohort:
            (model,) = bare.copy("model")
            batches = bare.batches(round, client)
            odd += len(batches) % 2
            for k in range(0, len(batches), 2):
                first, second = batches[k], batches[min(k + 1, len(batches) - 1)]
                ahead = copy.deepcopy(model)
                descend(ahead, slopes(cross_entropy(model(first[0]), first[1]), model), alpha)
                loss = bare.note(round, client, cross_entropy(ahead(second[0]), second[1]))
                descend(model, slopes(loss, ahead), rate("model", round))
            models[client] = model
        bare.average("model", models)
    assert odd
    bare.check("model")


def test_ditto(configure) -> None:
    pull = 0.9
    bare = Bare(Federation(configure(*SETTING, "algorithm=ditto", f"algorithm.pull={pull}")))
    own: dict[int, torch.nn.Module] = {}
    personal = {round: {} for round in range(ROUNDS)}
    for round, cohort in enumerate(bare.cohorts):
        models, lr = {}, rate("model", round)
        for client in cohort:
            (model,) = bare.copy("model")
            anchor = [w.detach().clone() for w in model.parameters()]
            v = own.setdefault(client, copy.deepcopy(model))
            for x, y in bare.batches(round, client):
                loss = cross_entropy(v(x), y)
                personal[round].setdefault(client, []).append(float(loss.detach()))
                pulls = [pull * (w.detach() - a) for w, a in zip(v.parameters(), anchor, strict=True)]
                descend(v, [g + p for g, p in zip(slopes(loss, v), pulls, strict=True)], lr)
            for x, y in bare.batches(round, client):
                learn(bare.note(round, client, cross_entropy(model(x), y)), (model, lr))
            models[client] = model
        bare.average("model", models)
    metrics = bare.check("model")
    check_rows(bare, "model", own)
    bare.losses = personal
    for round, found in enumerate(metrics):
        assert found["personal_loss"] == pytest.approx(bare.mean_loss(round, "clients"), rel=1e-8)


def kl(student: torch.Tensor, teacher: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) on what the teacher gets right, over samples and classes."""
    right = teacher.argmax(1) == y
    p, q = student[right].log_softmax(1), teacher[right].log_softmax(1)
    return (q.exp() * (q - p)).mean() if len(p) else p.sum()


def test_mhmd(configure) -> None:
    """The body under the final and the auxiliary heads, none of which moves; the published terms."""
    bare = Bare(Federation(configure(*SETTING, "algorithm=mhmd", "model.auxiliary_heads.blocks=[relu1,fc2]")))
    assert bare.federation.setup.config.algorithm == MHMDConfig()
    head, (first, second) = bare.parts["head"], bare.parts["auxiliary_heads"].children()
    terms = {name: {round: {} for round in range(ROUNDS)} for name in ("auxiliary_loss", "distillation")}
    for round, cohort in enumerate(bare.cohorts):
        bodies = {}
        for client in cohort:
            (body,) = bare.copy("body")
            for x, y in bare.batches(round, client):
                inner = {}
                for name, module in body.named_children():
                    x = inner[name] = module(x)
                outputs = [first(inner["relu1"]), second(inner["fc2"])]
                logits = [each[:, :-1] / each[:, -1:].sigmoid() for each in outputs]
                final = head(x)
                loss = bare.note(round, client, cross_entropy(final, y))
                auxiliary = sum(cross_entropy(each, y) for each in logits)
                distilled = sum(kl(each, final, y) + kl(final, each, y) for each in logits)
                for name, term in (("auxiliary_loss", auxiliary), ("distillation", distilled)):
                    terms[name][round].setdefault(client, []).append(float(term.detach()))
                learn(loss + 10 * auxiliary + distilled, (body, rate("body", round)))
            bodies[client] = body
        bare.average("body", bodies)
    metrics = bare.check("body")
    for name, losses in terms.items():
        bare.losses = losses
        for round, found in enumerate(metrics):
            assert found[name] == pytest.approx(bare.mean_loss(round, "clients"), rel=1e-8), name


def test_a_client_that_never_trained_uses_what_the_server_has(configure) -> None:
    federation = play(Federation(configure("algorithm=ditto", "frac=0.5", "rounds=1")))
    absent = next(c for c in range(4) if c not in federation.cohort(0))
    states = federation.learnt.client_states(absent)["model"]
    served = federation.server.ctx.part("model").state_dict()
    assert all(torch.equal(states[key], served[key]) for key in served)
    assert not torch.equal(states["fc1.weight"], federation.setup.blueprint.initial["model"]["fc1.weight"])


@pytest.mark.parametrize(("key", "value"), [("fed_rep.body_epochs", 0), ("per_fed_avg.inner_lr", 0), ("ditto.pull", -1),
                                            ("mhmd.temperature", 0), ("mhmd.auxiliary_weight", -1)])  # fmt: skip
def test_bad_values_are_refused(configure, key: str, value: int) -> None:
    name, _, field = key.partition(".")
    with pytest.raises(ValueError, match=rf"algorithm\.{field}={value}(\.0)?: expected"):
        configure(f"algorithm={name}", f"algorithm.{field}={value}")
