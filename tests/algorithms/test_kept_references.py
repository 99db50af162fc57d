"""The five methods of FSL-SAGE's comparison against bare loops whose optimizers have momenta, kept or begun anew.

As in `test_references`: three of five clients a round, falling rates, double precision; here two local epochs, weight
decay, and torch's optimizers. Each owner of a part - a client, a client's copy at the server, the server - has a module
and an optimizer of its own, which live for the run; where optimizers live for a round, it gets a new one in each.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cutlayer.runtime.rounds.federation import Federation
from tests.algorithms.test_references import ROUNDS, SETTING, Bare, rate, slope

KINDS = {
    "sgd": ("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.weight_decay=0.001"),
    "adam": ("optimizer=adam", "optimizer.weight_decay=0.001"),
}
MAKE = {
    "sgd": lambda weights, decay: torch.optim.SGD(weights, lr=1.0, momentum=0.9, weight_decay=decay),
    "adam": lambda weights, decay: torch.optim.Adam(weights, lr=1.0, weight_decay=decay),
}
RATE = 0.01
AUXILIARY = ("model.auxiliary.size=linear", "model.auxiliary.optimizer.weight_decay=0", "algorithm.upload_interval=2")
NORMALISED = ("model=cnn4", "model.options.width=4", "model.auxiliary.size=linear")
# BatchNorm in all three parts, and no bias before it: its gradient is zero but for rounding, which Adam enlarges.
THROUGHOUT = ("model=resnet18", "model.options.width=4", "model.auxiliary.size=default")
Party = tuple[nn.Module, torch.optim.Optimizer]

every_way = pytest.mark.parametrize(
    ("kind", "keep", "more"),
    [
        ("sgd", "run", ()),
        ("adam", "run", ("cohort_order=fixed",)),
        ("adam", "null", ()),
        ("adam", "round", ()),
        ("sgd", "run", NORMALISED),
        ("adam", "run", THROUGHOUT),
    ],
    ids=[
        "sgd kept",
        "adam kept, in a fixed order",
        "adam as by default",
        "adam for a round",
        "with BatchNorm, kept",
        "adam, BatchNorm throughout",
    ],
)


class Learning:
    """A federation's parties in bare torch: who holds which part, and by which optimizer it learns."""

    def __init__(self, configure, kind: str, keep: str, *overrides: str) -> None:
        setting = (*SETTING, *KINDS[kind], f"lr={RATE}", f"optimizer.keep={keep}", "local_epochs=2", *overrides)
        self.bare = Bare(Federation(configure(*setting)))
        if "cohort_order=fixed" in overrides:
            self.bare.cohorts = [sorted(cohort) for cohort in self.bare.cohorts]
        self.kind, self.keep = kind, keep
        self.parties: dict[tuple[str, object], Party] = {}

    def party(self, part: str, owner: object, round: int, state: dict[str, torch.Tensor]) -> Party:
        """The owner's module, loaded with this state, and its optimizer at the round's rate."""
        found = self.parties.get((part, owner))
        module = copy.deepcopy(self.bare.initial[part]) if found is None else found[0]
        # By default what the server trains for all goes on, and all else begins anew.
        begins = self.keep == "round" or (self.keep == "null" and owner != "server")
        if found is None or begins:
            decay = 0.0 if part == "auxiliary" else 0.001
            self.parties[part, owner] = module, MAKE[self.kind](module.parameters(), decay)
        module.load_state_dict(state)
        _, optimizer = self.parties[part, owner]
        optimizer.param_groups[0]["lr"] = rate(part, round) * RATE / rate(part, 0)
        return module, optimizer

    def of_client(self, part: str, client: int, round: int) -> Party:
        """The client's own, from the global state."""
        return self.party(part, client, round, self.bare.parts[part].state_dict())

    def of_server(self, round: int) -> Party:
        """The server part that all clients share; the loops change it in place."""
        module, optimizer = self.party("server", "server", round, self.bare.parts["server"].state_dict())
        self.bare.parts["server"] = module
        return module, optimizer


def descend(loss: torch.Tensor, *parties: Party) -> None:
    for _, optimizer in parties:
        optimizer.zero_grad()
    loss.backward()
    for _, optimizer in parties:
        optimizer.step()


@every_way
def test_fed_avg(configure, kind: str, keep: str, more: tuple[str, ...]) -> None:
    """Each client has a copy of the whole model; the authors' clients share one server part (docs/algorithms.md)."""
    learning = Learning(configure, kind, keep, "algorithm=fed_avg", *more)
    bare = learning.bare
    for round, cohort in enumerate(bare.cohorts):
        models = {}
        for client in cohort:
            party = learning.of_client("model", client, round)
            for x, y in bare.batches(round, client):
                descend(bare.note(round, client, cross_entropy(party[0](x), y)), party)
            models[client] = party[0]
        bare.average("model", models)
    bare.check("model")


@every_way
@pytest.mark.parametrize("name", ["sl_single_server", "sl_multi_server"])
def test_splitfed(configure, name: str, kind: str, keep: str, more: tuple[str, ...]) -> None:
    learning = Learning(configure, kind, keep, f"algorithm={name}", *more)
    bare = learning.bare
    for round, cohort in enumerate(bare.cohorts):
        clients, servers = {}, {}
        shared = learning.of_server(round) if name == "sl_single_server" else None
        for number in cohort:
            client = learning.of_client("client", number, round)
            server = shared or learning.of_client("server", number, round)
            for x, y in bare.batches(round, number):
                descend(bare.note(round, number, cross_entropy(server[0](client[0](x)), y)), client, server)
            clients[number], servers[number] = client[0], server[0]
        bare.average("client", clients)
        if name == "sl_multi_server":
            bare.average("server", servers)
    bare.check("client", "server", loss="batches")


@every_way
def test_cse_fsl(configure, kind: str, keep: str, more: tuple[str, ...]) -> None:
    learning = Learning(configure, kind, keep, "algorithm=cse_fsl", *AUXILIARY, *more)
    for round in range(ROUNDS):
        local_losses(learning, round)
    learning.bare.check("client", "auxiliary", "server", loss="batches")


def local_losses(learning: Learning, round: int) -> None:
    """A round in which clients train by an auxiliary model of their own, and the server on every second batch."""
    bare, server = learning.bare, learning.of_server(round)
    clients, auxiliaries = {}, {}
    for number in bare.cohorts[round]:
        client, auxiliary = (learning.of_client(part, number, round) for part in ("client", "auxiliary"))
        for step, (x, y) in enumerate(bare.batches(round, number)):
            z = client[0](x)
            if step % 2 == 0:
                descend(bare.note(round, number, cross_entropy(server[0](z.detach()), y)), server)
            descend(cross_entropy(auxiliary[0](z), y), client, auxiliary)
        clients[number], auxiliaries[number] = client[0], auxiliary[0]
    bare.average("client", clients)
    bare.average("auxiliary", auxiliaries)


@every_way
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_fsl_sage(configure, warm: bool, kind: str, keep: str, more: tuple[str, ...]) -> None:
    """With buffers that overflow; after a warm start the buffers are empty and rounds of alignment count anew."""
    keys = {"align_interval": 2, "align_epochs": 3, "buffer_size": 350, "warm_start": str(warm).lower()}
    overrides = (*AUXILIARY, *(f"algorithm.{key}={value}" for key, value in keys.items()))
    learning = Learning(configure, kind, keep, "algorithm=fsl_sage", *overrides, *more)
    bare, aligned = learning.bare, dict[int, nn.Module]()
    buffers: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for round, cohort in enumerate(bare.cohorts):
        if warm and round == 0:
            local_losses(learning, round)
            continue
        server, clients = learning.of_server(round), {}
        for number in cohort:
            client = learning.of_client("client", number, round)
            for step, (x, y) in enumerate(bare.batches(round, number)):
                z = client[0](x)
                if step % 2 == 0:
                    descend(bare.note(round, number, cross_entropy(server[0](z.detach()), y)), server)
                    buffers.setdefault(number, []).append((z.detach(), y))
                if step == 0 and ((round - warm) % 2 == 0 or number not in aligned):
                    before = aligned.get(number, bare.parts["auxiliary"]).state_dict()
                    own = learning.party("auxiliary", ("aligned", number), round, before)
                    kept, labels = (torch.cat(each)[-350:] for each in zip(*buffers[number], strict=True))
                    align(own, copy.deepcopy(server[0]), kept, labels)
                    aligned[number] = own[0]
                client[1].zero_grad()
                z.backward(slope(copy.deepcopy(aligned[number]), z, y))
                client[1].step()
            clients[number] = client[0]
        bare.average("client", clients)
    assert any(sum(len(y) for _, y in each) > 350 for each in buffers.values())
    bare.check("client", "server", loss="batches")
    for number, auxiliary in aligned.items():
        row = bare.federation.stores["clients"].get(number, "auxiliary")
        for key, value in auxiliary.state_dict().items():
            assert torch.allclose(row[key], value, rtol=0, atol=1e-10), key


def align(auxiliary: Party, server: nn.Module, z: torch.Tensor, y: torch.Tensor) -> None:
    """Three passes over the buffer as one batch; the server is a copy, so that no running statistic moves."""
    target = slope(server, z, y)
    for _ in range(3):
        descend((slope(auxiliary[0], z, y, create_graph=True) - target).square().sum(), auxiliary)
