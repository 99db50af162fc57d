"""Each method against a bare loop of its own equations: three of five clients a round, three rounds, float64.

The loops use torch alone: they draw cohorts and batches by themselves (`drawing`), step down plain gradients at rates
that fall from round to round, for each part by a factor of its own, and count the loss that is reported.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cutlayer.runtime.rounds.federation import Federation
from tests.algorithms.drawing import Drawn

LR = 0.05
ROUNDS = 3
N = 5
# By what each part's learning rate falls from one round to the next; those that are not refined follow the first.
FALL = {"model": 0.5, "client": 0.5, "body": 0.5, "server": 0.25, "auxiliary": 0.7, "head": 0.3}
SETTING = (
    f"num_clients={N}", "frac=0.5", "optimizer=sgd", f"lr={LR}", "precision=fp64", f"rounds={ROUNDS}", "batch_size=100",
    "dataset.distribution=dirichlet", "dataset.alpha=1.0", "dataset.min_samples=201",
    "scheduler=exponential", f"scheduler.gamma={FALL['model']}",
    *(f"model.{part}.scheduler.gamma={FALL[part]}" for part in ("server", "auxiliary", "head")),
)  # fmt: skip


def rate(part: str, round: int) -> float:
    return LR * FALL[part] ** round


class Bare:
    """What a bare loop starts from: the initial parts, the cohorts and the clients' batches; and what was reported."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.drawn = federation, Drawn(federation)
        names = {*federation.setup.algorithm.layout.client, *federation.setup.algorithm.layout.server}
        self.parts = {name: part.train() for name, part in federation.setup.blueprint.parts(names).items()}
        self.initial = copy.deepcopy(self.parts)
        self.sizes = {client: len(federation.setup.partition.indices(client)) for client in range(N)}
        self.weights: dict[int, float] = dict(self.sizes)
        self.cohorts = [self.drawn.cohort(round) for round in range(ROUNDS)]
        assert {len(cohort) for cohort in self.cohorts} == {3}, "two and a half clients are three"
        assert any(cohort != sorted(cohort) for cohort in self.cohorts), "an order that says something"
        assert set(self.cohorts[1]) - set(self.cohorts[0]), "clients that are new in a later round"
        assert len(set(self.sizes.values())) > 1, "weights that differ"
        self.batches = self.drawn.batches
        self.losses: dict[int, dict[int, list[float]]] = {round: {} for round in range(ROUNDS)}

    def copy(self, *names: str) -> list[nn.Module]:
        return [copy.deepcopy(self.parts[name]) for name in names]

    def average(self, name: str, models: dict[int, nn.Module]) -> None:
        total = sum(self.weights[client] for client in models)
        states = {client: model.state_dict() for client, model in models.items()}
        for key, value in self.parts[name].state_dict().items():
            each = {client: state[key] for client, state in states.items()}
            if value.is_floating_point():
                value.copy_(sum(self.weights[client] / total * tensor for client, tensor in each.items()))
            else:  # a count of batches
                value.copy_(torch.stack([*each.values()]).max())

    def note(self, round: int, client: int, loss: torch.Tensor) -> torch.Tensor:
        """Remember a batch's loss."""
        self.losses[round].setdefault(client, []).append(float(loss.detach()))
        return loss

    def mean_loss(self, round: int, by: str) -> float:
        """The round's loss: each client's mean over its batches weighted by its samples, or the mean of all batches."""
        losses = self.losses[round]
        if by == "batches":
            every = [loss for of_client in losses.values() for loss in of_client]
            return sum(every) / len(every)
        total = sum(self.sizes[client] for client in losses)
        return sum(self.sizes[client] / total * sum(each) / len(each) for client, each in losses.items())

    def check(self, *names: str, loss: str = "clients") -> list[dict[str, float]]:
        """Run the federation and compare it; gives what each round reported beside its loss.

        Args:
            loss: who reports it: the clients, or the server after each of the batches.
        """
        records = [self.federation.step()[0] for _ in range(ROUNDS)]
        moved = self.federation.server.ctx.parts
        for name in names:
            for key, value in self.parts[name].state_dict().items():
                assert torch.allclose(moved[name].state_dict()[key], value, rtol=0, atol=1e-10), f"{name}/{key}"
                assert not torch.equal(value, self.initial[name].state_dict()[key]), "nothing was learnt"
        for round, record in enumerate(records):
            assert record.train_loss == pytest.approx(self.mean_loss(round, loss), rel=1e-8), f"loss of round {round}"
            assert record.clients == 3
        return [record.metrics for record in records]


def descend(model: nn.Module, gradients, lr: float) -> None:
    with torch.no_grad():
        for weight, gradient in zip(model.parameters(), gradients, strict=True):
            weight -= lr * gradient


def slopes(loss: torch.Tensor, *models: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [w for model in models for w in model.parameters()], retain_graph=True))


def learn(loss: torch.Tensor, *parts: tuple[nn.Module, float]) -> None:
    """One step of each part at its own rate."""
    gradients = [slopes(loss, model) for model, _ in parts]
    for (model, lr), along in zip(parts, gradients, strict=True):
        descend(model, along, lr)


@pytest.mark.parametrize(
    ("mu", "weights"), [(0.0, "samples"), (0.7, "samples"), (0.0, "uniform"), (0.0, "[1,4,0,2,3]")]
)
def test_fed_avg_and_fed_prox(configure, mu: float, weights: str) -> None:
    setting = (f"algorithm.mu={mu}", f"aggregate.weights={weights}")
    bare = Bare(Federation(configure(*SETTING, "algorithm=fed_prox", *setting)))
    if weights != "samples":
        bare.weights = dict(enumerate([1] * N if weights == "uniform" else [1, 4, 0, 2, 3]))
    for round, cohort in enumerate(bare.cohorts):
        models = {}
        for client in cohort:
            (model,) = bare.copy("model")
            for x, y in bare.batches(round, client):
                gradients = slopes(bare.note(round, client, cross_entropy(model(x), y)), model)
                pulls = [w.detach() - g.detach() for w, g in zip(model.parameters(), bare.parts["model"].parameters())]  # noqa: B905
                along = [g + mu * pull for g, pull in zip(gradients, pulls, strict=True)]
                descend(model, along, rate("model", round))
            models[client] = model
        bare.average("model", models)
    bare.check("model")


def test_scaffold(configure) -> None:
    bare = Bare(Federation(configure(*SETTING, "algorithm=scaffold")))
    zeros = [torch.zeros_like(w) for w in bare.parts["model"].parameters()]
    c, own = [z.clone() for z in zeros], {client: [z.clone() for z in zeros] for client in range(N)}
    for round, cohort in enumerate(bare.cohorts):
        models, changes, lr = {}, [], rate("model", round)
        for client in cohort:
            (model,) = bare.copy("model")
            batches = bare.batches(round, client)
            for x, y in batches:
                gradients = slopes(bare.note(round, client, cross_entropy(model(x), y)), model)
                descend(model, [g - ci + cc for g, ci, cc in zip(gradients, own[client], c, strict=True)], lr)
            pairs = zip(own[client], c, bare.parts["model"].parameters(), model.parameters(), strict=True)
            new = [ci - cc + (x - y).detach() / (len(batches) * lr) for ci, cc, x, y in pairs]
            changes.append([n - o for n, o in zip(new, own[client], strict=True)])
            own[client], models[client] = new, model
        bare.average("model", models)
        c = [value + sum(change[i] for change in changes) / N for i, value in enumerate(c)]
    bare.check("model")
    for value, found in zip(c, bare.federation.server._control.values(), strict=True):
        assert torch.allclose(found, value, rtol=1e-8, atol=1e-11)


def check_split(bare: Bare, name: str, train: Callable[[nn.Module, nn.Module, int, int], None]) -> None:
    """Split learning, SplitFed v1 or v2: ``train(client part, server part, round, number)`` is a client's turn."""
    for round, cohort in enumerate(bare.cohorts):
        clients, servers = {}, {}
        for number in cohort:
            client, server = bare.parts["client"], bare.parts["server"]
            if name != "sl":
                (client,) = bare.copy("client")
            if name == "sl_multi_server":
                (server,) = bare.copy("server")
            train(client, server, round, number)
            clients[number], servers[number] = client, server
        if name != "sl":
            bare.average("client", clients)
        if name == "sl_multi_server":
            bare.average("server", servers)
    bare.check("client", "server", loss="batches")


@pytest.mark.parametrize("name", ["sl", "sl_single_server", "sl_multi_server"])
def test_split_learning(configure, name: str) -> None:
    bare = Bare(Federation(configure(*SETTING, f"algorithm={name}")))

    def train(client: nn.Module, server: nn.Module, round: int, number: int) -> None:
        for x, y in bare.batches(round, number):
            loss = bare.note(round, number, cross_entropy(server(client(x)), y))
            learn(loss, (client, rate("client", round)), (server, rate("server", round)))

    check_split(bare, name, train)


def test_the_optimizer_of_a_server_goes_on_from_round_to_round_and_a_clients_begins_anew(configure) -> None:
    """With momentum, at falling rates."""
    momentum = 0.9
    bare = Bare(Federation(configure(*SETTING, "algorithm=sl_single_server", f"optimizer.momentum={momentum}")))
    server = bare.parts["server"]
    velocity = [torch.zeros_like(w) for w in server.parameters()]
    for round, cohort in enumerate(bare.cohorts):
        clients = {}
        for number in cohort:
            (client,) = bare.copy("client")
            own = [torch.zeros_like(w) for w in client.parameters()]
            for x, y in bare.batches(round, number):
                loss = bare.note(round, number, cross_entropy(server(client(x)), y))
                both = [slopes(loss, model) for model in (client, server)]
                for model, kept, along, part in zip((client, server), (own, velocity), both, ("client", "server"),
                                                    strict=True):  # fmt: skip
                    for v, g in zip(kept, along, strict=True):
                        v.mul_(momentum).add_(g)
                    descend(model, kept, rate(part, round))
            clients[number] = client
        bare.average("client", clients)
    bare.check("client", "server", loss="batches")


def test_cse_fsl(configure) -> None:
    bare = Bare(Federation(configure(*SETTING, "algorithm=cse_fsl", "algorithm.upload_interval=2")))
    server, local = bare.parts["server"], {round: {} for round in range(ROUNDS)}
    for round, cohort in enumerate(bare.cohorts):
        clients, auxiliaries = {}, {}
        for number in cohort:
            client, auxiliary = bare.copy("client", "auxiliary")
            losses = []
            for k, (x, y) in enumerate(bare.batches(round, number)):
                if k % 2 == 0:
                    loss = bare.note(round, number, cross_entropy(server(client(x).detach()), y))
                    learn(loss, (server, rate("server", round)))
                loss = cross_entropy(auxiliary(client(x)), y)
                losses.append(float(loss.detach()))
                learn(loss, (client, rate("client", round)), (auxiliary, rate("auxiliary", round)))
            clients[number], auxiliaries[number] = client, auxiliary
            local[round][number] = losses
        bare.average("client", clients)
        bare.average("auxiliary", auxiliaries)
    metrics = bare.check("client", "auxiliary", "server", loss="batches")
    bare.losses = local
    for round, found in enumerate(metrics):
        assert found == {"auxiliary_loss": pytest.approx(bare.mean_loss(round, "clients"), rel=1e-8)}


def slope(model: nn.Module, z: torch.Tensor, y: torch.Tensor, **options) -> torch.Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(cross_entropy(model(z), y), z, **options)[0]


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """What is reported of a round's alignments."""
    names = {name: name for name in ("error_before", "error_after", "target")}
    values = {f"align/{name}": [row[name] for row in rows] for name in names}
    for when in ("before", "after"):
        values[f"align/normalised_{when}"] = [row[f"error_{when}"] / row["target"] for row in rows]
    return {name: pytest.approx(sum(each) / len(each), rel=1e-6) for name, each in values.items() if each}


@pytest.mark.parametrize("batch", [1000, 150])  # the buffer of 400 at once, or in three batches of nearly equal size
def test_fsl_sage(configure, batch: int) -> None:
    keys = {"upload_interval": 2, "align_interval": 2, "align_epochs": 3, "buffer_size": 400, "align_batch_size": batch}
    overrides = [f"algorithm.{key}={value}" for key, value in keys.items()]
    bare = Bare(Federation(configure(*SETTING, "algorithm=fsl_sage", "local_epochs=2", *overrides)))
    own: dict[int, nn.Module] = {}
    buffer = {number: [] for number in range(N)}
    reports: list[list[dict[str, float]]] = []
    for round, cohort in enumerate(bare.cohorts):
        clients, lr = {}, rate("auxiliary", round)
        reports.append([])
        for number in cohort:
            (client,) = bare.copy("client")
            # In every second round, and in a client's first.
            due = round % 2 == 0 or number not in own
            server, auxiliary = bare.parts["server"], own.setdefault(number, bare.copy("auxiliary")[0])
            for k, (x, y) in enumerate(bare.batches(round, number)):
                z = client(x)
                if k % 2 == 0:
                    loss = bare.note(round, number, cross_entropy(server(z.detach()), y))
                    learn(loss, (server, rate("server", round)))
                    buffer[number].append((z.detach(), y))
                if k == 0 and due:
                    kept, labels = (torch.cat(values)[-400:] for values in zip(*buffer[number], strict=True))
                    pieces = -(-len(kept) // batch)
                    parts = list(zip(kept.tensor_split(pieces), labels.tensor_split(pieces), strict=True))
                    targets = [slope(server, *part) for part in parts]

                    def error(model, parts=parts, targets=targets):
                        return sum(float((slope(model, *p) - t).square().sum())
                                   for p, t in zip(parts, targets, strict=True))  # fmt: skip

                    report = {"error_before": error(auxiliary)}
                    for _ in range(3):
                        for part, target in zip(parts, targets, strict=True):
                            estimate = slope(auxiliary, *part, create_graph=True)
                            learn((estimate - target).square().sum(), (auxiliary, lr))
                    report |= {"error_after": error(auxiliary)}
                    report |= {"target": sum(float(target.square().sum()) for target in targets)}
                    reports[-1].append(report)
                along = torch.autograd.grad(z, list(client.parameters()), slope(auxiliary, z, y))
                descend(client, along, rate("client", round))
            clients[number] = client
        bare.average("client", clients)
    metrics = bare.check("client", "server", loss="batches")
    assert 0 < len(reports[1]) < 3, "late-comers alone are aligned in the second round"
    for found, expected in zip(metrics, reports, strict=True):
        assert found == mean_of(expected)
    for number, auxiliary in own.items():
        row = bare.federation.stores["clients"].get(number, "auxiliary")
        for key, value in auxiliary.state_dict().items():
            assert torch.allclose(row[key], value, rtol=1e-8, atol=1e-11), key


def test_local_only_and_centralized(configure) -> None:
    """Each client resumes from its own model and its own optimizer; pooled, one client has all data."""
    momentum = 0.9
    for name in ("local_only", "centralized"):
        federation = Federation(configure(*SETTING, f"algorithm={name}", f"optimizer.momentum={momentum}"))
        drawn = Drawn(federation)
        models, velocities, reported = {}, {}, []
        for round in range(ROUNDS):
            losses = {}
            for client in drawn.cohort(round) if name == "local_only" else [0]:
                model = models.setdefault(client, federation.setup.blueprint.parts(["model"])["model"])
                kept = velocities.setdefault(client, [torch.zeros_like(w) for w in model.parameters()])
                losses[client] = []
                for x, y in drawn.batches(round, client):
                    loss = cross_entropy(model(x), y)
                    losses[client].append(float(loss.detach()))
                    for v, g in zip(kept, slopes(loss, model), strict=True):
                        v.mul_(momentum).add_(g)
                    descend(model, kept, rate("model", round))
            sizes = {client: len(federation.setup.partition.indices(client)) for client in losses}
            means = {client: sum(each) / len(each) for client, each in losses.items()}
            reported.append(sum(sizes[c] * means[c] for c in means) / sum(sizes.values()))
        for round in range(ROUNDS):
            assert federation.step()[0].train_loss == pytest.approx(reported[round], rel=1e-8)
        for client, model in models.items():
            row = federation.stores["clients"].get(client, "model")
            for key, value in model.state_dict().items():
                assert torch.allclose(row[key], value, rtol=1e-8, atol=1e-11), f"{name}/{client}/{key}"
