"""FL-MoCo against a bare loop: momentum copies, queues and momenta that stay with a client, or begin each round."""

import copy

import pytest
import torch
from torch.nn import functional as F

from cutlayer.runtime.rounds.federation import Federation
from tests.algorithms.drawing import Drawn
from tests.algorithms.test_moco import FALL, LR, MOMENTUM, SERVER_FALL, SMALL, TEMPERATURE, views

KEYS, VELOCITY, ROUNDS = 450, 0.9, 4
SETTING = (
    "algorithm=fl_moco", "optimizer=sgd", f"lr={LR}", "precision=fp64", f"rounds={ROUNDS}", "num_clients=3",
    f"algorithm.temperature={TEMPERATURE}", f"algorithm.momentum={MOMENTUM}", "batch_size=200", *SMALL,
    f"algorithm.queue={KEYS}", "frac=0.5", "scheduler=exponential", f"scheduler.gamma={FALL}",
    f"model.projector.scheduler.gamma={SERVER_FALL}", "dataset.distribution=dirichlet", "dataset.alpha=1.0",
    "dataset.min_samples=301", f"optimizer.momentum={VELOCITY}",
)  # fmt: skip


class Client:
    """What a client has for itself."""

    def __init__(self, parts, keys: torch.Tensor) -> None:
        self.average = [copy.deepcopy(part) for part in parts]
        self.line = list(keys)
        self.place = 0
        self.velocity: dict[tuple[int, str], torch.Tensor] = {}

    def push(self, keys: torch.Tensor) -> None:
        for key in keys:
            self.line[self.place] = key
            self.place = (self.place + 1) % len(self.line)

    def train(self, online, batches, rates: tuple[float, float], symmetric: bool) -> list[float]:
        losses: list[float] = []
        for one, two in batches:
            with torch.no_grad():
                for mean, module in zip(self.average, online, strict=True):
                    for m, p in zip(mean.parameters(), module.parameters(), strict=True):
                        m.copy_(MOMENTUM * m + (1 - MOMENTUM) * p)
            total, new = torch.zeros((), dtype=torch.float64), []
            for a, b in ((one, two), (two, one))[: 2 if symmetric else 1]:
                q = F.normalize(online[1](online[0](a)), dim=1)
                with torch.no_grad():
                    k = F.normalize(self.average[1](self.average[0](b)), dim=1)
                logits = torch.cat([(q * k).sum(1, keepdim=True), q @ torch.stack(self.line).T], 1) / TEMPERATURE
                total = total - logits.log_softmax(1)[:, 0].mean()
                new.append(k)
            losses.append(float(total.detach()))
            names = [(at, name, p) for at, part in enumerate(online) for name, p in part.named_parameters()]
            slopes = torch.autograd.grad(total, [p for _, _, p in names], allow_unused=True)
            with torch.no_grad():
                for (at, name, p), slope in zip(names, slopes, strict=True):
                    if slope is not None:
                        before = self.velocity.get((at, name))
                        self.velocity[at, name] = slope if before is None else VELOCITY * before + slope
                        p -= rates[at] * self.velocity[at, name]
            for keys in reversed(new):  # those of what was the query come first
                self.push(keys)
        return losses


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("copies", ["own", "shared"])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_fl_moco_is_its_equations(configure, symmetric: str, copies: str, kept: bool) -> None:
    """Two of three clients a round, at rates that fall; the queue turns unevenly."""
    keep = f"optimizer.keep={'run' if kept else 'round'}"
    federation = Federation(
        configure(*SETTING, f"algorithm.symmetric={symmetric}", f"algorithm.client_copy={copies}", keep)
    )
    drawn = Drawn(federation)
    shared = list(federation.setup.blueprint.parts(["model", "projector"]).values())
    first = [copy.deepcopy(part) for part in shared]
    clients: dict[int, Client] = {}
    for number in range(ROUNDS):
        uploads, losses = {}, {}
        for client in drawn.cohort(number):
            online = [copy.deepcopy(part) for part in shared]
            if client not in clients:
                random = torch.randn(KEYS, 8, generator=drawn.generator(number, client, "queue"))
                clients[client] = Client(first, (random / random.norm(dim=1, keepdim=True)).double())
            own = clients[client]
            if copies == "shared":
                own.average = [copy.deepcopy(part) for part in online]
            if not kept:
                own.velocity = {}
            sizes = [len(x) for x, _ in drawn.batches(number, client)]
            rates = (LR * FALL**number, LR * SERVER_FALL**number)
            batches = views(federation, drawn, client, number, sizes)
            losses[client] = own.train(online, batches, rates, symmetric == "true")
            uploads[client] = online
        sizes = {client: len(drawn.partition.indices(client)) for client in uploads}
        with torch.no_grad():
            for at, part in enumerate(shared):
                for key, value in part.named_parameters():
                    states = {client: dict(modules[at].named_parameters())[key] for client, modules in uploads.items()}
                    value.copy_(sum(sizes[c] / sum(sizes.values()) * state for c, state in states.items()))
        record, _ = federation.step()
        reported = sum(sizes[c] / sum(sizes.values()) * sum(each) / len(each) for c, each in losses.items())
        assert record.train_loss == pytest.approx(reported, rel=1e-9)
    for client, own in clients.items():
        row = federation.stores["clients"].get(client, "queue")
        assert row is not None
        torch.testing.assert_close(row["keys"][0], torch.stack(own.line), rtol=1e-9, atol=1e-11)
        for name, average in zip(("model_momentum", "projector_momentum"), own.average, strict=True):
            row = federation.stores["clients"].get(client, name)
            assert (row is not None) == (copies == "own")
            for key, value in average.state_dict().items() if row is not None else ():
                torch.testing.assert_close(row[key], value, rtol=1e-10, atol=1e-11, msg=f"{name}/{key}")
    for name, part in zip(("model", "projector"), shared, strict=True):
        found = federation.server.ctx.parts[name].state_dict()
        for key, value in part.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-11, msg=f"{name}/{key}")
            assert key.startswith("fc3.") or not torch.equal(value, federation.setup.blueprint.initial[name][key])
