"""Methods in the settings of public code: SplitFed's scripts, and PFLlib's SCAFFOLD, Per-FedAvg and Ditto.

Bare loops as in `test_references`, of what that code does: uniform weights, a server's Adam that begins anew on every
batch, several local epochs.
"""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from cutlayer.runtime.rounds.federation import Federation
from tests.algorithms.test_personal_references import check_rows
from tests.algorithms.test_references import SETTING, Bare, check_split, descend, learn, rate, slopes

UNIFORM = "aggregate.weights=uniform"
SLOW = 0.02  # of the rates of `test_references`, for Adam


def uniform(configure, *overrides: str) -> Bare:
    bare = Bare(Federation(configure(*SETTING, UNIFORM, *overrides)))
    bare.weights = dict.fromkeys(bare.sizes, 1.0)
    return bare


def adam(module: torch.nn.Module, part: str, round: int) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=SLOW * rate(part, round))


@pytest.mark.parametrize("name", ["sl", "sl_single_server", "sl_multi_server"])
def test_splitfeds_scripts(configure, name: str) -> None:
    """A client's Adam lives for its round, the server's for a batch; averages count each client once."""
    bare = uniform(configure, f"algorithm={name}", "optimizer=adam", f"lr={SLOW * rate('client', 0)}",
                   "model.server.optimizer.betas=[0.0,0.0]", "local_epochs=2")  # fmt: skip

    def train(client: torch.nn.Module, server: torch.nn.Module, round: int, number: int) -> None:
        own = adam(client, "client", round)
        for x, y in bare.batches(round, number):
            first = adam(server, "server", round)
            own.zero_grad()
            first.zero_grad()
            bare.note(round, number, loss := cross_entropy(server(client(x)), y))
            loss.backward()
            first.step()
            own.step()

    check_split(bare, name, train)


def test_pfllibs_scaffold(configure) -> None:
    """Each client counts once; over several epochs K is their batches together."""
    bare = uniform(configure, "algorithm=scaffold", "local_epochs=2")
    zeros = [torch.zeros_like(w) for w in bare.parts["model"].parameters()]
    c, own = zeros, dict.fromkeys(bare.sizes, zeros)
    for round, cohort in enumerate(bare.cohorts):
        models, deltas, lr = {}, [], rate("model", round)
        for client in cohort:
            (model,) = bare.copy("model")
            start, batches = [w.detach().clone() for w in model.parameters()], bare.batches(round, client)
            for x, y in batches:
                gradients = slopes(bare.note(round, client, cross_entropy(model(x), y)), model)
                descend(model, [g + cc - ci for g, cc, ci in zip(gradients, c, own[client], strict=True)], lr)
            moved = [(x - y.detach()) / len(batches) / lr for x, y in zip(start, model.parameters(), strict=True)]
            own[client] = [ci - cc + m for ci, cc, m in zip(own[client], c, moved, strict=True)]
            deltas.append([m - cc for cc, m in zip(c, moved, strict=True)])
            models[client] = model
        bare.average("model", models)
        c = [value + sum(delta[i] for delta in deltas) / len(bare.sizes) for i, value in enumerate(c)]
    bare.check("model")
    for value, found in zip(c, bare.federation.server._control.values(), strict=True):
        assert torch.allclose(found, value, rtol=1e-10, atol=1e-12)


def test_pfllibs_per_fed_avg(configure) -> None:
    """The first rate for the inner step too, two passes: there a client trains twice in a round."""
    bare = uniform(configure, "algorithm=per_fed_avg", f"algorithm.inner_lr={rate('model', 0)}", "local_epochs=2")
    for round, cohort in enumerate(bare.cohorts):
        models = {}
        for client in cohort:
            (model,), batches = bare.copy("model"), bare.batches(round, client)
            for first, second in zip(batches[::2], batches[1::2] + batches[-1:] * (len(batches) % 2), strict=True):
                ahead = copy.deepcopy(model)
                learn(cross_entropy(ahead(first[0]), first[1]), (ahead, rate("model", 0)))
                loss = bare.note(round, client, cross_entropy(ahead(second[0]), second[1]))
                descend(model, slopes(loss, ahead), rate("model", round))
            models[client] = model
        bare.average("model", models)
    bare.check("model")


def test_pfllibs_ditto(configure) -> None:
    """The personal model first, against the global one as it came, then the global one; two passes each."""
    bare = uniform(configure, "algorithm=ditto", "algorithm.pull=0.4", "local_epochs=2")
    own: dict[int, torch.nn.Module] = {}
    for round, cohort in enumerate(bare.cohorts):
        models, lr = {}, rate("model", round)
        for client in cohort:
            (model,) = bare.copy("model")
            v = own.setdefault(client, copy.deepcopy(model))
            for x, y in bare.batches(round, client):
                gradients = slopes(cross_entropy(v(x), y), v)
                with torch.no_grad():
                    for p, w, g in zip(v.parameters(), model.parameters(), gradients, strict=True):
                        p -= lr * (g + 0.4 * (p - w))
            for x, y in bare.batches(round, client):
                learn(bare.note(round, client, cross_entropy(model(x), y)), (model, lr))
            models[client] = model
        bare.average("model", models)
    bare.check("model")
    check_rows(bare, "model", own)
