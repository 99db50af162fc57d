"""Each method against a bare loop of its own equations: two clients, three rounds, float64, plain gradient steps.

The loops use torch alone. What they share with the platform is its data: the same batches in the same order.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from runtime import rng
from runtime.federation import Federation
from tests.conftest import play

LR = 0.05
ROUNDS = 3
SETTING = ("num_clients=2", "optimizer=sgd", f"lr={LR}", "precision=fp64", f"rounds={ROUNDS}", "batch_size=150",
           "dataset.distribution=dirichlet", "dataset.alpha=1.0", "dataset.min_samples=320")  # fmt: skip


class Bare:
    """What a bare loop starts from: the initial parts, the order of the clients and their batches."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        names = {*federation.algorithm.layout.client, *federation.algorithm.layout.server}
        self.parts = {name: part.train() for name, part in federation.blueprint.parts(names).items()}
        sizes = federation.partition.sizes
        self.share = {client: sizes[client] / sizes.sum() for client in range(2)}

    def batches(self, round: int, client: int):
        stream = rng.torch_generator(self.federation.config.seed, round=round, client=client, stream="batches")
        return list(self.federation.clients.data(client).batches(stream))

    def copy(self, *names: str) -> list[nn.Module]:
        return [copy.deepcopy(self.parts[name]) for name in names]

    def average(self, name: str, models: dict[int, nn.Module]) -> None:
        with torch.no_grad():
            for key, value in self.parts[name].named_parameters():
                value.copy_(sum(self.share[c] * dict(m.named_parameters())[key] for c, m in models.items()))

    def check(self, *names: str) -> None:
        moved = play(self.federation).server.ctx.parts
        for name in names:
            for key, value in self.parts[name].state_dict().items():
                assert torch.allclose(moved[name].state_dict()[key], value, rtol=1e-8, atol=1e-11), f"{name}/{key}"
                assert not torch.equal(value, self.federation.blueprint.initial[name][key]), "nothing was learnt"


def descend(model: nn.Module, gradients) -> None:
    with torch.no_grad():
        for weight, gradient in zip(model.parameters(), gradients, strict=True):
            weight -= LR * gradient


def steps(model: nn.Module, loss: torch.Tensor) -> None:
    descend(model, torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_fed_avg_and_fed_prox(configure, mu: float) -> None:
    bare = Bare(Federation(configure(*SETTING, "algorithm=fed_prox", f"algorithm.mu={mu}")))
    for round in range(ROUNDS):
        models = {}
        for client in bare.federation.cohort(round):
            (model,) = bare.copy("model")
            for x, y in bare.batches(round, client):
                gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
                pulls = [w.detach() - g.detach() for w, g in zip(model.parameters(), bare.parts["model"].parameters())]  # noqa: B905
                descend(model, [g + mu * pull for g, pull in zip(gradients, pulls, strict=True)])
            models[client] = model
        bare.average("model", models)
    bare.check("model")


def test_scaffold(configure) -> None:
    bare = Bare(Federation(configure(*SETTING, "algorithm=scaffold")))
    zeros = [torch.zeros_like(w) for w in bare.parts["model"].parameters()]
    c, own = [z.clone() for z in zeros], {client: [z.clone() for z in zeros] for client in range(2)}
    for round in range(ROUNDS):
        models, changes = {}, []
        for client in bare.federation.cohort(round):
            (model,) = bare.copy("model")
            batches = bare.batches(round, client)
            for x, y in batches:
                gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
                descend(model, [g - ci + cc for g, ci, cc in zip(gradients, own[client], c, strict=True)])
            pairs = zip(own[client], c, bare.parts["model"].parameters(), model.parameters(), strict=True)
            new = [ci - cc + (x - y).detach() / (len(batches) * LR) for ci, cc, x, y in pairs]
            changes.append([n - o for n, o in zip(new, own[client], strict=True)])
            own[client], models[client] = new, model
        bare.average("model", models)
        c = [value + sum(change[i] for change in changes) / 2 for i, value in enumerate(c)]
    bare.check("model")


@pytest.mark.parametrize("name", ["sl", "sl_single_server", "sl_multi_server"])
def test_split_learning(configure, name: str) -> None:
    bare = Bare(Federation(configure(*SETTING, f"algorithm={name}")))
    for round in range(ROUNDS):
        clients, servers = {}, {}
        for number in bare.federation.cohort(round):
            client, server = bare.parts["client"], bare.parts["server"]
            if name != "sl":
                (client,) = bare.copy("client")
            if name == "sl_multi_server":
                (server,) = bare.copy("server")
            for x, y in bare.batches(round, number):
                both = nn.Sequential(client, server)
                steps(both, cross_entropy(both(x), y))
            clients[number], servers[number] = client, server
        if name != "sl":
            bare.average("client", clients)
        if name == "sl_multi_server":
            bare.average("server", servers)
    bare.check("client", "server")


def test_cse_fsl(configure) -> None:
    bare = Bare(Federation(configure(*SETTING, "algorithm=cse_fsl", "algorithm.upload_interval=2")))
    for round in range(ROUNDS):
        clients, auxiliaries = {}, {}
        for number in bare.federation.cohort(round):
            client, auxiliary = bare.copy("client", "auxiliary")
            for k, (x, y) in enumerate(bare.batches(round, number)):
                if k % 2 == 0:
                    steps(bare.parts["server"], cross_entropy(bare.parts["server"](client(x).detach()), y))
                local = nn.Sequential(client, auxiliary)
                steps(local, cross_entropy(local(x), y))
            clients[number], auxiliaries[number] = client, auxiliary
        bare.average("client", clients)
        bare.average("auxiliary", auxiliaries)
    bare.check("client", "auxiliary", "server")


def test_fsl_sage(configure) -> None:
    keys = {"upload_interval": 2, "align_interval": 2, "align_epochs": 3, "buffer_size": 400, "align_batch_size": 1000}
    overrides = [f"algorithm.{key}={value}" for key, value in keys.items()]
    bare = Bare(Federation(configure(*SETTING, "algorithm=fsl_sage", *overrides)))
    own = {number: bare.copy("auxiliary")[0] for number in range(2)}
    buffer = {number: [] for number in range(2)}

    def slope(model: nn.Module, z: torch.Tensor, y: torch.Tensor, **options) -> torch.Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(cross_entropy(model(z), y), z, **options)[0]

    for round in range(ROUNDS):
        clients = {}
        for number in bare.federation.cohort(round):
            (client,) = bare.copy("client")
            server, auxiliary = bare.parts["server"], own[number]
            for k, (x, y) in enumerate(bare.batches(round, number)):
                z = client(x)
                if k % 2 == 0:
                    steps(server, cross_entropy(server(z.detach()), y))
                    buffer[number].append((z.detach(), y))
                if k == 0 and round % 2 == 0:
                    kept, labels = (torch.cat(values)[-400:] for values in zip(*buffer[number], strict=True))
                    target = slope(server, kept, labels)
                    for _ in range(3):
                        estimate = slope(auxiliary, kept, labels, create_graph=True)
                        steps(auxiliary, (estimate - target).square().sum())
                descend(client, torch.autograd.grad(z, list(client.parameters()), slope(auxiliary, z, y)))
            clients[number] = client
        bare.average("client", clients)
    bare.check("client", "server")
    for number, auxiliary in own.items():
        row = bare.federation.stores["clients"].get(number, "auxiliary")
        for key, value in auxiliary.state_dict().items():
            assert torch.allclose(row[key], value, rtol=1e-8, atol=1e-11), key
