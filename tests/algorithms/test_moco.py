"""Momentum contrast: MocoSFL and FL-MoCo against bare loops, a cohort computed as one, bytes, saving, resuming."""

import copy
from collections import deque
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cutlayer.algorithms.byte_saving import NO_GRADIENTS, OFF, SILENT
from cutlayer.algorithms.contrastive import Queue, info_nce
from cutlayer.runtime.costs.traffic import expected_bytes
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.ledger import CONTROL_KINDS, Traffic
from cutlayer.runtime.rounds.federation import Federation
from tests.algorithms.drawing import Drawn
from tests.conftest import play, same, weights
from tests.round_trips import expected_round_trips

LR, TEMPERATURE, MOMENTUM, CLIENT_MOMENTUM, KEYS = 0.05, 0.2, 0.9, 0.8, 64
SMALL = ("model.projector.hidden=12", "model.projector.width=8", f"algorithm.queue={KEYS}")
SETTING = (
    "algorithm=moco_sfl", "optimizer=sgd", f"lr={LR}", "precision=fp64", "rounds=3", "batch_size=5", "num_clients=4",
    "aggregate.weights=uniform", "algorithm.client_copy=shared", "algorithm.client_gradient=own",
    "model.client.optimizer.keep=round",
    f"algorithm.temperature={TEMPERATURE}", f"algorithm.momentum={MOMENTUM}",
    f"algorithm.client_momentum={CLIENT_MOMENTUM}", *SMALL,
)  # fmt: skip

FALL, SERVER_FALL = 0.5, 0.25
SOME = ("num_clients=7", "frac=0.5", "scheduler=exponential", f"scheduler.gamma={FALL}",
        *(f"model.{part}.scheduler.gamma={SERVER_FALL}" for part in ("server", "projector")))  # fmt: skip


def ledger(federation: Federation) -> list[Traffic]:
    """Every line of the communication of all rounds."""
    lines: list[Traffic] = []
    while not federation.done:
        lines += federation.step()[1]
    return lines


def payloads(federation: Federation) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for direction, kind, _, count in federation.ledger.totals():
        if kind not in CONTROL_KINDS:
            found[direction, kind] = found.get((direction, kind), 0) + count.payload
    return found


# ------------------------------------------------------------------ against bare loops


class Bare:
    """MoCo as its equations say, on the federation's parts, images and first keys; plain gradient steps."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.config = federation, federation.setup.config.algorithm
        self.parts = {
            name: federation.setup.blueprint.parts([name])[name] for name in federation.setup.algorithm.layout.server
        }
        self.keys = federation.server._queue.keys.clone()
        lines = 1 if self.config.feature_sharing else federation.setup.config.num_clients
        assert self.keys.shape == (lines, KEYS // lines, 8)
        self.place = [0] * len(self.keys)
        self.drawn, self.rates = Drawn(federation), {"client": LR, "server": LR}
        self.losses: list[float] = []

    def features(self, suffix: str, z: torch.Tensor) -> torch.Tensor:
        h = self.parts["projector" + suffix](self.parts["server" + suffix](z))
        return h / h.norm(dim=1, keepdim=True)

    def loss(self, zq, zk, owners) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.features("", zq)
        with torch.no_grad():
            k = self.features("_momentum", zk)
        lines = self.keys[[0 if self.config.feature_sharing else owner for owner in owners]]
        positive = torch.exp((q * k).sum(1) / TEMPERATURE)
        others = torch.exp((lines @ q[:, :, None]).squeeze(2) / TEMPERATURE).sum(1)
        return -torch.log(positive / (positive + others)).mean(), k

    def push(self, keys, owners) -> None:
        for key, owner in zip(keys, owners, strict=True):
            line = 0 if self.config.feature_sharing else owner
            self.keys[line, self.place[line]] = key
            self.place[line] = (self.place[line] + 1) % self.keys.shape[1]

    def descend(self, part: str, modules: list[nn.Module], loss_or_gradient, inputs=None) -> None:
        parameters = [p for module in modules for p in module.parameters()]
        gradients = torch.autograd.grad(loss_or_gradient, parameters, inputs, retain_graph=True, allow_unused=True)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                if g is not None:  # the classifier's
                    p -= self.rates[part] * g

    def follow(self, average: nn.Module, module: nn.Module, momentum: float) -> None:
        with torch.no_grad():
            for a, p in zip(average.parameters(), module.parameters(), strict=True):
                a.copy_(momentum * a + (1 - momentum) * p)

    def round(self, number: int) -> None:
        self.losses.clear()
        cohort = self.drawn.cohort(number)
        own = {c: [copy.deepcopy(self.parts[name]) for name in ("client", "client_momentum")] for c in cohort}
        sizes = [self.drawn.config.batch_size] * self.config.local_steps
        steps = {c: list(views(self.federation, self.drawn, c, number, sizes)) for c in cohort}
        for step in range(self.config.local_steps):
            query = {c: own[c][0](steps[c][step][0]) for c in cohort}
            key = {c: own[c][1](steps[c][step][1]).detach() for c in cohort}
            owners = [c for c in cohort for _ in query[c]]
            zq = torch.cat([query[c] for c in cohort]).detach().requires_grad_()
            zk = torch.cat([key[c] for c in cohort])
            loss, keys = self.loss(zq, zk, owners)
            down = dict(
                zip(
                    cohort,
                    torch.autograd.grad(loss, zq, retain_graph=True)[0].split(len(query[cohort[0]])),
                    strict=True,
                )
            )
            both, keys, owners = loss, [keys], [owners]
            if self.config.symmetric:
                other, more = self.loss(zk, zq.detach(), owners[0])
                both, keys, owners = loss + other, [more, *keys], owners * 2
            self.losses.append(float(both.detach()))
            self.descend("server", [self.parts["server"], self.parts["projector"]], both)
            for name in ("server", "projector"):
                self.follow(self.parts[f"{name}_momentum"], self.parts[name], MOMENTUM)
            for each, whose in zip(keys, owners, strict=True):
                self.push(each, whose)
            for c in cohort:
                # Of the mean over the cohort each has a share: its own mean's gradient is that many times as long.
                self.descend("client", [own[c][0]], query[c], down[c] * len(cohort))
                self.follow(own[c][1], own[c][0], CLIENT_MOMENTUM)
        with torch.no_grad():
            for key, value in self.parts["client"].named_parameters():
                value.copy_(sum(dict(own[c][0].named_parameters())[key] for c in cohort) / len(cohort))
        self.follow(self.parts["client_momentum"], self.parts["client"], CLIENT_MOMENTUM**self.config.local_steps)


def views(federation: Federation, drawn: Drawn, client: int, number: int, sizes: list[int]):
    """Two views of each step's samples, on which the client goes on through its data by the clock of the rounds."""
    source, indices = federation.setup.dataset.train, drawn.partition.indices(client)
    draws, at = drawn.generator(number, client, "batches"), number * sum(sizes)
    orders: dict[int, torch.Tensor] = {}
    for size in sizes:
        samples = []
        for place in range(at, at + size):
            epoch, within = divmod(place, len(indices))
            if epoch not in orders:
                orders[epoch] = torch.randperm(len(indices), generator=drawn.generator(epoch, client, "order"))
            samples.append(int(indices[orders[epoch][within]]))
        yield source.take(torch.tensor(samples), [source.draw(size, draws) for _ in range(2)])
        at += size


@pytest.mark.parametrize("sharing", ["true", "false"])
@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize(("together", "steps"), [("auto", 1), ("never", 1), ("never", 3)])
def test_moco_sfl_is_its_equations(configure, sharing: str, symmetric: str, together: str, steps: int) -> None:
    """Of four of seven clients a round, at rates that fall, a client's samples being gone through more than once."""
    options = (f"algorithm.feature_sharing={sharing}", f"algorithm.symmetric={symmetric}", *SOME, "batch_size=30")
    federation = Federation(
        configure(*SETTING, *options, f"algorithm.together={together}", f"algorithm.local_steps={steps}")
    )
    assert federation.clients.compute_together == (together == "auto")
    bare = Bare(federation)
    for number in range(3):
        bare.rates = {"client": LR * FALL**number, "server": LR * SERVER_FALL**number}
        bare.round(number)
        record, _ = federation.step()
        assert record.train_loss == pytest.approx(sum(bare.losses) / len(bare.losses), rel=1e-9)
        assert record.clients == 4
    for name, part in bare.parts.items():
        found = federation.server.ctx.parts[name].state_dict()
        for key, value in part.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-11, msg=f"{name}/{key}")
    # As sets: in which place of its line a key lies says nothing.
    found, expected = (
        [line[line[:, 0].argsort()] for line in keys] for keys in (federation.server._queue.keys, bare.keys)
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)
    moved = {key for key, value in bare.parts["server"].state_dict().items()
             if not torch.equal(value, federation.setup.blueprint.initial["server"][key])}  # fmt: skip
    assert moved == {key for key in bare.parts["server"].state_dict() if not key.startswith("fc3.")}, (
        "all but the classifier"
    )


# ------------------------------------------------------------------ a cohort computed as one


@pytest.mark.parametrize("more", [
    (),
    ("frac=0.5", "num_clients=10", "batch_size=1"),
    ("aggregate.weights=samples", "dataset.distribution=dirichlet", "dataset.alpha=0.5"),
    ("optimizer.momentum=0.9", "optimizer.weight_decay=0.01", "optimizer.nesterov=true"),
    ("algorithm.rich_share=0.5", "algorithm.rich_batch_size=40"),
    ("model=cnn2", "model.cut=relu1"),
    ("model=cnn2", "model.cut=relu1", "model.client.freeze=true"),
    ("model=import/tests.contract.elsewhere.Skipping", "model.cut=inner", "model.options.dropout=0"),
])  # fmt: skip
def test_a_cohort_computed_as_one_is_its_clients(configure, more: tuple[str, ...]) -> None:
    one, each = (Federation(configure(*SETTING, *more, f"algorithm.together={value}")) for value in ("auto", "never"))
    assert one.clients.compute_together
    assert not each.clients.compute_together
    assert sorted(ledger(one)) == sorted(ledger(each)), "every client's bytes, payload and framed"
    assert one.ledger.round_trips == each.ledger.round_trips
    found, expected = weights(one), weights(each)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-11, msg=key)


@pytest.mark.parametrize("more", [
    ("algorithm.local_steps=2",),
    ("optimizer=adam",),
    ("model=resnet20", "model.options.width=2", "model.cut=bn1"),
])  # fmt: skip
def test_what_is_not_the_same_is_not_computed_as_one(configure, more: tuple[str, ...]) -> None:
    """Clients apart from each other, a step that is not linear in the gradient, samples that see each other."""
    assert not Federation(configure("algorithm=moco_sfl", *SMALL, *more)).clients.compute_together


# ------------------------------------------------------------------ bytes


@pytest.mark.parametrize("more", [
    (),
    ("algorithm.local_steps=3",),
    ("frac=0.5", "batch_size=1", "algorithm.rich_share=0.25", "algorithm.rich_batch_size=7"),
])  # fmt: skip
def test_bytes_and_round_trips_equal_the_closed_form(configure, more: tuple[str, ...]) -> None:
    federation = play(Federation(configure(*SETTING, *more)))
    assert payloads(federation) == expected_bytes(federation.setup, range(3))
    assert federation.ledger.round_trips == expected_round_trips(federation.setup, range(3))


def test_no_label_crosses(configure) -> None:
    federation = Federation(configure(*SETTING, "algorithm.together=never"))
    fields = {(line.direction, line.kind, line.field) for line in ledger(federation) if line.kind not in CONTROL_KINDS}
    assert fields == {
        ("down", "model", "client"), ("down", "model", "client_momentum"), ("up", "smashed", "query"),
        ("up", "smashed", "key"), ("down", "smashed", "grad"), ("up", "model", "client"),
    }  # fmt: skip


# ------------------------------------------------------------------ saving


def test_bytes_are_saved_in_three_states(configure) -> None:
    """A threshold that no loss can fall by: full for two intervals, then no gradients, then silence."""
    setting = (*SETTING, "rounds=12", "algorithm.loss_threshold=1000", "algorithm.loss_interval=2")
    federation = Federation(configure(*setting))
    levels, crossed, clients = [], [], []
    while not federation.done:
        before = {key: value.clone() for key, value in federation.server.ctx.part("client").state_dict().items()}
        server = {key: value.clone() for key, value in federation.server.ctx.part("server").state_dict().items()}
        _, lines = federation.step()
        levels.append(federation.server._saving.level)
        crossed.append({(line.direction, line.kind) for line in lines if line.kind not in CONTROL_KINDS})
        clients.append(same(before, federation.server.ctx.part("client").state_dict()))
        assert not same(server, federation.server.ctx.part("server").state_dict()), "the server always learns"
    assert levels == [OFF] * 4 + [NO_GRADIENTS] * 2 + [SILENT] * 6
    everything = {("down", "model"), ("up", "smashed"), ("down", "smashed"), ("up", "model")}
    assert crossed == [everything] * 4 + [{("down", "model"), ("up", "smashed")}] * 2 + [set()] * 6
    assert clients == [False] * 4 + [True] * 8


def test_a_loss_that_falls_enough_ends_the_saving(configure) -> None:
    setting = (*SETTING, "rounds=8", "algorithm.loss_threshold=1000", "algorithm.loss_interval=2")
    federation = play(Federation(configure(*setting)), 5)
    assert federation.server._saving.level == NO_GRADIENTS
    federation.server._saving._threshold = -1000.0
    play(federation, 2)
    assert federation.server._saving.level == OFF


@pytest.mark.parametrize("rounds", [1, 3, 5, 7])
@pytest.mark.parametrize("together", ["auto", "never"])
def test_an_interrupted_run_resumes_to_the_same_bits(configure, tmp_path: Path, rounds: int, together: str) -> None:
    config = configure(*SETTING, "rounds=9", "algorithm.loss_threshold=1000", "algorithm.loss_interval=2",
                       "precision=fp32", f"algorithm.together={together}")  # fmt: skip
    through = play(Federation(config))
    first = play(Federation(config, tmp_path), rounds)
    first.checkpoint({})
    second = Federation(config, tmp_path)
    assert second.resume() is not None
    assert same(weights(play(second)), weights(through))
    assert torch.equal(second.server._queue.keys, through.server._queue.keys)


# ------------------------------------------------------------------ the pieces


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 7)), max_size=12), st.integers(1, 5))
def test_a_queue_holds_the_latest_keys_of_each_line(pushes: list[tuple[int, int]], size: int) -> None:
    queue = Queue(torch.randn(3, size, 2))
    expected = [deque(map(tuple, line.tolist()), maxlen=size) for line in queue.keys]
    for line, count in pushes:
        keys = F.normalize(torch.randn(count, 2), dim=1)
        queue.push(keys, torch.full((count,), line))
        expected[line].extend(map(tuple, keys.tolist()))
        for found, wanted in zip(queue.keys, expected, strict=True):
            assert sorted(map(tuple, found.tolist())) == sorted(wanted)


def test_info_nce_of_equal_cosines_is_the_logarithm_of_their_number() -> None:
    query = F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1)
    other = (query * query).sum(1, keepdim=True).expand(6, 11)
    torch.testing.assert_close(info_nce(query, query, other, 0.1), torch.tensor(12.0, dtype=torch.float64).log())


def test_info_nce_has_the_gradient_of_finite_differences() -> None:
    torch.manual_seed(0)
    query, key = (F.normalize(torch.randn(3, 4, dtype=torch.float64), dim=1) for _ in range(2))
    keys = F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1)
    assert torch.autograd.gradcheck(lambda q: info_nce(q, key, q @ keys.T, 0.2), (query.requires_grad_(),))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("algorithm.temperature=0", r"algorithm\.temperature=0\.0: expected a finite number > 0"),
        ("algorithm.momentum=1", r"algorithm\.momentum=1\.0: expected a number >= 0 and < 1"),
        ("algorithm.local_steps=0", r"algorithm\.local_steps=0: expected an integer >= 1"),
        ("algorithm.rich_share=0.5", r"algorithm\.rich_batch_size=null: expected an integer >= 1, where rich_share"),
        ("algorithm.together=maybe", r"algorithm\.together=maybe: expected one of the choices"),
        (
            "model=resnet18 model.options.width=2 model.cut=conv1 num_clients=1 batch_size=1",
            r"batch_size=1: expected at least 2: resnet18",
        ),
        ("model.projector.width=0", r"model\.projector\.width=0: expected an integer >= 1"),
    ],
)
def test_mistakes_are_one_line(configure, override: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        Federation(configure("algorithm=moco_sfl", *override.split(" ")))
    assert "\n" not in str(error.value)


def test_a_queue_has_a_key_for_each_client(configure) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.queue=3: expected at least a key for each of 4 clients"):
        Federation(configure("algorithm=moco_sfl", "algorithm.queue=3", "algorithm.feature_sharing=false"))
