"""FSMKD against a bare loop of one graph, its loss by hand, and what crosses the boundary: never labels or bodies."""

import copy
import json
from math import log

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cutlayer.algorithms.base import Flow
from cutlayer.algorithms.fsmkd import FSMKD, FSMKDConfig, mutual_losses
from cutlayer.runtime.after.personalize import personalize
from cutlayer.runtime.costs.traffic import expected_bytes
from cutlayer.runtime.messages.boundary import Message
from cutlayer.runtime.messages.ledger import CONTROL_KINDS
from cutlayer.runtime.parties.blueprint import Layout
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.session import Channel
from cutlayer.runtime.scoring.scores import mean
from cutlayer.runtime.settings import RunConfig
from tests.algorithms.drawing import Drawn
from tests.conftest import play, same, weights
from tests.round_trips import expected_round_trips

TWO_BODIES = "model.personal.variants=[{},{hidden:[128,32,64]}]"


# ------------------------------------------------------------------ the loss


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# At temperature 2 the first sample has probabilities (3/4, 1/4) and (1/5, 4/5), the second (1/2, 1/2) twice; at 1 the
# first has (9/10, 1/10) and (1/17, 16/17).
LOCAL, SHARED, LABELS = logits((2 * log(3), 0), (1, 1)), logits((0, 2 * log(4)), (3, 3)), torch.tensor([0, 1])
OF_LOCAL = (0.2 * log(0.2 / 0.75) + 0.8 * log(0.8 / 0.25)) / 2  # KL(global || local)
OF_SHARED = (0.75 * log(0.75 / 0.2) + 0.25 * log(0.25 / 0.8)) / 2  # KL(local || global)
CE_LOCAL, CE_SHARED = (-log(0.9) + log(2)) / 2, (log(17) + log(2)) / 2


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_the_losses_by_hand(weight: float) -> None:
    local, shared = mutual_losses(LOCAL, SHARED, LABELS, FSMKDConfig(2.0, weight))
    assert local.item() == pytest.approx(CE_LOCAL + weight * OF_LOCAL, abs=1e-12)
    assert shared.item() == pytest.approx(CE_SHARED + weight * OF_SHARED, abs=1e-12)


def test_the_published_defaults() -> None:
    assert FSMKDConfig(2.0, 1.0, "global", 1, False, "step") == FSMKDConfig()


@pytest.mark.parametrize("learns", [False, True])
def test_the_teacher_is_constant_unless_it_learns_too(learns: bool) -> None:
    """d KL(p || q) by q's logits is (q - p) / T, by p's it is p (log p/q - KL) / T; the losses are means of two."""
    local, shared = LOCAL.clone().requires_grad_(), SHARED.clone().requires_grad_()
    losses = mutual_losses(local, shared, LABELS, FSMKDConfig(2.0, 3.0, teacher_gradient=learns))
    probabilities = [logits.detach().div(2).softmax(1) for logits in (local, shared)]
    for loss, (q, own), (p, other) in zip(losses, (pairs := list(zip(probabilities, (local, shared), strict=True))),
                                          reversed(pairs), strict=True):  # fmt: skip
        mine, theirs = torch.autograd.grad(loss, (own, other), allow_unused=True, retain_graph=True)
        ce = own.detach().softmax(1) - F.one_hot(LABELS, 2)
        assert torch.allclose(mine, (ce + 3 * (q - p) / 2) / 2, atol=1e-12)
        ratio = (p / q).log()
        expected = 3 * p * (ratio - (p * ratio).sum(1, keepdim=True)) / 2 / 2
        assert torch.allclose(theirs, expected, atol=1e-12) if learns else theirs is None


# ------------------------------------------------------------------ a bare loop


# By what the rates fall from round to round, in the settings that say so: of the server's body, and of all others.
FALL, SERVER_FALL = 0.5, 0.25
FALLING = ("scheduler=exponential", f"scheduler.gamma={FALL}", f"model.server.scheduler.gamma={SERVER_FALL}")
SOME = ("num_clients=5", "frac=0.5")


class Bare:
    """The equations in one graph for both parties, with torch's optimizers; cohorts and batches are drawn here."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.config = federation, federation.setup.config
        self.drawn, self.falls = Drawn(federation), federation.setup.config.scheduler is not None
        self.clients = range(federation.setup.population)
        self.head, self.server, self.tail = self._parts(0, "client", "server", "tail")
        self.bodies = [self._parts(client, "personal")[0] for client in self.clients]
        self.optimizer, self.momenta = self._optimizer(self.server), dict[int, dict]()
        self.own: dict[int, tuple[nn.Module, nn.Module]] = {}
        self.averagings, self.averaged = 0, dict[int, int]()
        self.losses: dict[int, dict[int, list[tuple[float, float]]]] = {}

    def reported(self, round: int) -> tuple[float, float]:
        """The round's losses of the global and the local path: clients' means, weighted by their samples."""
        sizes, losses = self.federation.setup.partition.sizes, self.losses[round]
        total = sum(sizes[client] for client in losses)
        means = {
            client: [sum(each) / len(each) for each in zip(*found, strict=True)] for client, found in losses.items()
        }
        whole, local = (sum(sizes[c] / total * means[c][path] for c in means) for path in (0, 1))
        return whole, local

    def _parts(self, client: int, *names: str) -> list[nn.Module]:
        return list(self.federation.setup.blueprint.for_client(client).parts(names).values())

    def _optimizer(self, *modules: nn.Module) -> torch.optim.Optimizer:
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[self.config.optimizer.name]
        return kind([weight for module in modules for weight in module.parameters()], lr=self.config.lr)

    def play(self) -> None:
        config: FSMKDConfig = self.config.algorithm
        for round in range(self.config.rounds):
            cohort = self.drawn.cohort(round)
            for client in cohort:
                if self.averaged.get(client) != self.averagings:  # in the first round after each averaging
                    self.own[client] = copy.deepcopy(self.head), copy.deepcopy(self.tail)
                    self.averaged[client] = self.averagings
                self._train(client, round, *self.own[client], config)
            if round % config.aggregate_interval == 0:
                self._average(cohort)
                self.averagings += 1

    def _train(self, client: int, round: int, head: nn.Module, tail: nn.Module, config: FSMKDConfig) -> None:
        body, server = self.bodies[client], self.server
        keep = [self.config.optimizer_for(part).keep for part in ("client", "server")]
        optimizer = self._optimizer(head, body, tail)
        if keep[0] == "run" and client in self.momenta:
            optimizer.load_state_dict(self.momenta[client])
        if keep[1] == "round":
            self.optimizer = self._optimizer(self.server)
        if self.falls:
            optimizer.param_groups[0]["lr"] = self.config.lr * FALL**round
            self.optimizer.param_groups[0]["lr"] = self.config.lr * SERVER_FALL**round
        losses = self.losses.setdefault(round, {}).setdefault(client, [])
        batches = self.drawn.batches(round, client)
        for k, (x, y) in enumerate(batches):
            h = head(x)
            if config.shared_gradient == "both":
                local = tail(body(h))
            else:  # through copies, which learn nothing
                if config.local_path == "step" or k % (len(batches) // self.config.local_epochs) == 0:
                    early, late = copy.deepcopy(head), copy.deepcopy(tail)
                local = late(body(early(x)))
            shared = tail(server(h))
            tau, w = config.temperature, config.distillation_weight
            teachers = (shared, local) if config.teacher_gradient else (shared.detach(), local.detach())
            of_local, of_shared = (
                F.kl_div(F.log_softmax(student / tau, 1), F.softmax(teacher / tau, 1), reduction="batchmean")
                for student, teacher in zip((local, shared), teachers, strict=True)
            )
            local_loss = F.cross_entropy(local, y) + w * of_local
            global_loss = F.cross_entropy(shared, y) + w * of_shared
            losses.append((float(global_loss.detach()), float(local_loss.detach())))
            optimizer.zero_grad()
            self.optimizer.zero_grad()
            (local_loss + global_loss).backward()
            optimizer.step()
            self.optimizer.step()
        self.momenta[client] = copy.deepcopy(optimizer.state_dict())

    def _average(self, cohort: list[int]) -> None:
        """Of those that take part in the round; others keep what they hold until they do again."""
        sizes = self.federation.setup.partition.sizes
        for at, shared in enumerate((self.head, self.tail)):
            states = {client: parts[at].state_dict() for client, parts in ((c, self.own[c]) for c in cohort)}
            for key, value in shared.state_dict().items():
                if value.is_floating_point():
                    share = sum(float(sizes[client]) for client in states)
                    value.copy_(sum(sizes[client] / share * state[key] for client, state in states.items()))
        for client in cohort:
            del self.own[client]


def check(found: dict[str, torch.Tensor], module: nn.Module, initial: dict[str, torch.Tensor], what: str) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(found[key], value, rtol=1e-10, atol=1e-12), f"{what}/{key}"
    assert any(not torch.allclose(initial[key], value) for key, value in module.named_parameters()), f"{what} is as new"


PATHS = {
    "global": ("algorithm.shared_gradient=global",),
    "both": ("algorithm.shared_gradient=both",),
    "both, teachers learn": ("algorithm.shared_gradient=both", "algorithm.teacher_gradient=true"),
    "as published": ("algorithm.local_path=epoch", "algorithm.teacher_gradient=true", "local_epochs=2"),
}


@pytest.mark.parametrize("gradient", PATHS)
@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize(
    "setting",
    [
        ("optimizer=adam", "rounds=2", TWO_BODIES),
        ("optimizer=sgd", "lr=0.05", "rounds=1", "model=vgg", "model.options.width=2"),
        ("optimizer=sgd", "lr=0.05", "rounds=4", "algorithm.aggregate_interval=2", TWO_BODIES, *SOME, *FALLING),
        (*SOME, *FALLING, "optimizer=adam", "rounds=3", TWO_BODIES),
        (*SOME, *FALLING, "optimizer=adam", "rounds=4", "optimizer.keep=run", "algorithm.aggregate_interval=2"),
        (*SOME, *FALLING, "optimizer=adam", "rounds=3", "model.server.optimizer.keep=round"),
    ],
    ids=[
        "adam, two bodies",
        "normalisation",
        "some clients, averaged every other round",
        "some clients, adam",
        "kept optimizers",
        "the server's begins anew with each client",
    ],
)
def test_all_parts_against_one_graph(configure, setting: tuple[str, ...], weight: int, gradient: str) -> None:
    federation = Federation(configure("algorithm=fsmkd", "num_clients=2", "precision=fp64", "batch_size=150",
                                      "dataset.fraction=0.5", "dataset.distribution=dirichlet", "dataset.alpha=1.0",
                                      f"algorithm.distillation_weight={weight}",
                                      *PATHS[gradient], *setting))  # fmt: skip
    bare = Bare(federation)
    bare.play()
    records = [federation.step()[0] for _ in range(federation.setup.config.rounds)]
    for round, record in enumerate(records):
        found = record.train_loss, record.metrics["local_loss"]
        assert found == pytest.approx(bare.reported(round), rel=1e-9)
    trained = {client for losses in bare.losses.values() for client in losses}
    for name, module in {"client": bare.head, "server": bare.server, "tail": bare.tail}.items():
        found = federation.server.ctx.part(name).state_dict()
        check(found, module, federation.setup.blueprint.initial[name], name)
    for client in sorted(trained):
        initial = federation.setup.blueprint.for_client(client).initial
        states = federation.learnt.client_states(client, ("client", "personal", "tail"))
        check(states["personal"], bare.bodies[client], initial["personal"], f"{client}/personal")
        for name, module in zip(("client", "tail"), bare.own.get(client, ()), strict=False):
            check(states[name], module, initial[name], f"{client}/{name}")
    assert bool(bare.own) == (federation.setup.config.algorithm.aggregate_interval > 1)


@pytest.mark.parametrize("model", [("model=mlp",), ("model=resnet20", "model.options.width=4", "batch_size=400")])
def test_one_client_without_distillation_is_centralized_training(configure, model: tuple[str, ...]) -> None:
    one = ("num_clients=1", "optimizer=sgd", "lr=0.05", "rounds=1", "precision=fp64", *model)
    ours = play(Federation(configure("algorithm=fsmkd", "algorithm.distillation_weight=0", *one))).full_model()
    reference = play(Federation(configure("algorithm=centralized", *one))).full_model()
    assert ours is not None
    assert reference is not None
    assert ours.keys() == reference.keys()
    for key, tensor in reference.items():
        assert torch.allclose(ours[key], tensor, rtol=1e-9, atol=1e-12), key


def test_only_distillation_brings_the_personal_bodies_to_the_others(configure) -> None:
    """Without it the global path does not depend on what the personal bodies are."""

    def learnt(weight: float, *more: str) -> dict[str, torch.Tensor]:
        setting = ("algorithm=fsmkd", "rounds=1", f"algorithm.distillation_weight={weight}")
        model = play(Federation(configure(*setting, *more))).full_model()
        assert model is not None
        return model

    assert same(learnt(0), learnt(0, TWO_BODIES))
    assert not same(learnt(1), learnt(1, TWO_BODIES))


# ------------------------------------------------------------------ what crosses


def leaks(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Fields of clients' messages in a round that are, or could be, labels: integers, or one number a sample."""
    found: set[str] = set()
    original = Channel.up

    def up(self, client, kind, payload):
        for field, value in payload.items():
            if isinstance(value, torch.Tensor):
                is_labels = not value.is_floating_point() or (kind != "model" and value.dim() < 2)
                found.update([f"{kind}/{field}"] if is_labels else [])
        return original(self, client, kind, payload)

    with monkeypatch.context() as patch:
        patch.setattr(Channel, "up", up)
        federation.step()
    return found


def test_labels_never_leave_the_client(configure, monkeypatch) -> None:
    federation = Federation(configure("algorithm=fsmkd", "local_epochs=2"))
    assert leaks(federation, monkeypatch) == set()
    fields = {(way, kind, field) for way, kind, field, _ in federation.ledger.totals() if kind not in CONTROL_KINDS}
    assert fields == {
        *((way, "model", part) for way in ("up", "down") for part in ("client", "tail")),
        ("up", "smashed", "z"),
        ("down", "smashed", "output"),
        ("up", "gradient", "grad"),
        ("down", "gradient", "grad"),
    }


def test_the_test_of_labels_sees_them(configure, monkeypatch) -> None:
    """In a method that sends them, and in this one if it did, as integers or as floats."""
    assert leaks(Federation(configure("algorithm=sl_single_server")), monkeypatch) == {"smashed/y"}
    for kind in (torch.int64, torch.float32):
        federation = Federation(configure("algorithm=fsmkd"))
        original = federation.setup.algorithm.client

        def careless(ctx, down, kind=kind, original=original):
            seen: list[torch.Tensor] = []
            batches = ctx.batches
            ctx.batches = lambda: ((x, seen.append(y) or y) for x, y in batches())
            program, reply = original(ctx, down), None
            try:
                while True:
                    message = program.send(reply)
                    extra = {"y": seen[-1].to(kind)} if message.kind == "smashed" else {}
                    reply = yield Message(message.kind, {**message.fields, **extra}, message.expects_reply)
            except StopIteration as end:
                return end.value

        monkeypatch.setattr(
            federation.setup, "algorithm", type("Careless", (FSMKD,), {"client": staticmethod(careless)})
        )
        assert leaks(federation, monkeypatch) == {"smashed/y"}


# ------------------------------------------------------------------ personal bodies


def test_clients_have_bodies_of_their_own_and_keep_them(configure) -> None:
    federation = play(Federation(configure("algorithm=fsmkd", TWO_BODIES, "frac=0.75", "rounds=1")))
    present = federation.cohort(0)
    assert {client % 2 for client in present} == {0, 1}
    shapes = {0: ["fc2.weight", "fc2.bias"], 1: ["fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias"]}
    for client in range(4):
        row = federation.stores["clients"].get(client, "personal")
        assert (row is not None) == (client in present), "memory follows those that took part"
        if row is not None:
            assert list(row) == shapes[client % 2]
            assert row["fc2.weight"].shape == ((64, 128) if client % 2 == 0 else (32, 128))
        initial = federation.setup.blueprint.for_client(client).initial["personal"]
        used = federation.learnt.client_states(client, ("client", "personal", "tail"))["personal"]
        assert same(dict(used), dict(row or initial))
        assert not same(dict(row), initial) if row is not None else True
    assert "personal" not in {field for _, _, field, _ in federation.ledger.totals()}
    assert len(federation.clients.seats) == 1, "one client at a time is in memory"


@pytest.mark.parametrize("interval", [1, 2])
def test_bodies_survive_an_interruption_to_the_same_bits(configure, tmp_path, interval: int) -> None:
    # Rows beyond a few hundred bytes go to disk, so that what is read back is tested too.
    config = configure("algorithm=fsmkd", TWO_BODIES, f"algorithm.aggregate_interval={interval}", "rounds=4",
                       "state_memory_mb=0.0001", "frac=0.75", "dataset.local_test=true")  # fmt: skip
    whole = play(Federation(config))
    for stop in (1, 2, 3):
        folder = tmp_path / str(stop)
        broken = play(Federation(config, folder), rounds=stop)
        broken.checkpoint({})
        broken.step()
        resumed = Federation(config, folder)
        resumed.resume()
        play(resumed)
        for client in range(4):
            for path in (("client", "server", "tail"), ("client", "personal", "tail")):
                ours, theirs = (f.learnt.client_states(client, path) for f in (whole, resumed))
                assert all(same(dict(ours[name]), dict(theirs[name])) for name in path)
        assert whole.ledger.state_dict() == resumed.ledger.state_dict()
        assert whole.evaluate() == resumed.evaluate()


def accuracy(modules: list[nn.Module], federation: Federation, samples: torch.Tensor | None = None) -> float:
    test = federation.setup.dataset.test
    chosen = torch.arange(len(test)) if samples is None else samples
    x, y = next(test.batches(chosen, batch_size=len(chosen)))
    with torch.no_grad():
        return float((nn.Sequential(*modules).eval()(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("interval", [1, 2])
def test_both_paths_are_tested(configure, interval: int) -> None:
    federation = play(Federation(configure("algorithm=fsmkd", TWO_BODIES, "rounds=3", "dataset.local_test=true",
                                           "dataset.distribution=class_major", "lr=0.01",
                                           f"algorithm.aggregate_interval={interval}")))  # fmt: skip
    found = federation.evaluate()
    expected: dict[str, list[float]] = {}
    for client in range(4):
        blueprint, own = federation.setup.blueprint.for_client(client), federation.evaluator.local_test
        assert own is not None
        for prefix, path in (("", ("client", "server", "tail")), ("personal_", ("client", "personal", "tail"))):
            modules = blueprint.parts(path)
            for name, state in federation.learnt.client_states(client, path).items():
                modules[name].load_state_dict(state)
            score = accuracy(list(modules.values()), federation)
            local = accuracy(list(modules.values()), federation, own.indices(client))
            expected.setdefault(f"{prefix}acc", []).append(score)
            expected.setdefault(f"{prefix}local_acc", []).append(local)
    rows = {metric: [a for m, _, _, a in found.clients if m == metric] for metric, *_ in found.clients}
    assert rows["personal_acc"] == expected["personal_acc"]
    assert rows["personal_local_acc"] == expected["personal_local_acc"]
    assert rows["local_acc"] == expected["local_acc"]
    assert rows.get("client_acc", expected["acc"]) == expected["acc"]
    assert found.accuracy == pytest.approx(mean(expected["acc"]))
    assert len(set(expected["acc"])) == 1 or interval == 2, "averaged in each round, all have one global path"
    assert len(set(expected["personal_acc"])) > 1
    for metric in ("personal_acc", "personal_local_acc"):
        assert found.metrics[f"{metric}/mean"] == pytest.approx(mean(expected[metric]))
        assert found.metrics[f"{metric}/worst_decile"] == min(expected[metric])


def test_clients_that_never_trained_are_tested_with_the_body_that_they_start_from(configure) -> None:
    federation = play(Federation(configure("algorithm=fsmkd", TWO_BODIES, "frac=0.25", "rounds=1", "lr=0.01")))
    parts = federation.server.ctx.parts
    found = {client: score for metric, client, _, score in federation.evaluate().clients if metric == "personal_acc"}
    untrained = [client for client in range(4) if client not in federation.cohort(0)]
    assert len(untrained) == 3
    expected = {}
    for client in untrained:
        (body,) = federation.setup.blueprint.for_client(client).parts(["personal"]).values()
        expected[client] = accuracy([parts["client"], body, parts["tail"]], federation)
    assert {client: found[client] for client in untrained} == expected
    assert len(set(expected.values())) == 2, "two architectures"


def test_local_test_only_tests_both_paths_on_shares(configure) -> None:
    setting = ("algorithm=fsmkd", "rounds=1", "dataset.distribution=class_major")
    whole, own = (
        play(Federation(configure(*setting, f"dataset.local_test={value}"))).evaluate() for value in ("true", "only")
    )
    assert [row for row in whole.clients if row[0] in ("local_acc", "personal_local_acc")] == own.clients
    assert own.accuracy == pytest.approx(whole.metrics["local_acc/mean"])


@pytest.mark.parametrize("interval", [1, 2])
def test_personalisation_starts_from_the_global_path(configure, tmp_path, interval: int) -> None:
    federation = play(Federation(configure("algorithm=fsmkd", TWO_BODIES, "rounds=3", "dataset.local_test=true",
                                           "personalize.part=full", "personalize.epochs=[0,1]",
                                           f"algorithm.aggregate_interval={interval}")))  # fmt: skip
    before = weights(federation)
    found = personalize(federation, federation.setup.config.personalize, tmp_path)
    assert found.mean[0] == pytest.approx(federation.evaluate().metrics["local_acc/mean"])
    assert found.mean[1] != found.mean[0]
    assert same(weights(federation), before)


def test_a_run_is_made_again_from_its_configuration(configure) -> None:
    config = configure("algorithm=fsmkd", TWO_BODIES, "model.cut=[relu1,relu2]", "model.tail.optimizer.lr=0.01",
                       "model.personal.optimizer.lr=0.02")  # fmt: skip
    again = RunConfig.from_mapping(json.loads(json.dumps(config.to_mapping())))
    assert again == config
    assert again.identity() == config.identity()
    rates = {part: config.optimizer_for(part).options["lr"] for part in ("client", "tail", "personal")}
    assert rates == {"client": 0.001, "tail": 0.01, "personal": 0.02}


# ------------------------------------------------------------------ averaging


def test_client_parts_and_tails_are_averaged_in_the_first_of_every_three_rounds(configure) -> None:
    federation = Federation(configure("algorithm=fsmkd", "algorithm.aggregate_interval=3", "rounds=7"))
    sent: dict[str, list[int]] = {"up": [], "down": []}
    moved: list[int] = []
    kept: list[int] = []
    while not federation.done:
        before = {name: copy.deepcopy(federation.server.ctx.part(name).state_dict()) for name in ("client", "tail")}
        _, lines = federation.step()
        for way in {line.direction for line in lines if line.kind == "model"}:
            sent[way].append(federation.round)
        if not all(same(before[name], federation.server.ctx.part(name).state_dict()) for name in before):
            moved.append(federation.round)
        if federation.stores["clients"].get(0, "client") is not None:
            kept.append(federation.round)
    assert sent == {"down": [1, 2, 5], "up": [1, 4, 7]}
    assert moved == [1, 4, 7]
    assert kept == [2, 3, 5, 6]


@pytest.mark.parametrize("frac", [1.0, 0.5, 0.25])
def test_bytes_between_two_averagings_equal_the_closed_form(configure, frac: float) -> None:
    """A client gets the averaged parts in its first round after each averaging, whenever that is."""
    setting = ("algorithm.aggregate_interval=3", f"frac={frac}", "rounds=8", "batch_size=200")
    federation = play(Federation(configure("algorithm=fsmkd", *setting)))
    measured: dict[tuple[str, str], int] = {}
    for way, kind, _, count in federation.ledger.totals():
        if kind not in CONTROL_KINDS:
            measured[way, kind] = measured.get((way, kind), 0) + count.payload
    assert measured == expected_bytes(federation.setup, range(8))
    assert federation.ledger.round_trips == expected_round_trips(federation.setup, range(8))
    rounds = [set(federation.cohort(round)) for round in range(8)]
    joins = sum(len(set.union(*rounds[start:end])) for start, end in ((0, 1), (1, 4), (4, 7), (7, 8)))
    part = sum(tensor.numel() * 4 for name in ("client", "tail") for tensor in
               federation.setup.blueprint.initial[name].values())  # fmt: skip
    assert measured["down", "model"] == joins * part


def test_when_an_arrow_crosses() -> None:
    config = FSMKDConfig(aggregate_interval=3)
    join, start = (Flow("down", "model", ("tail",), rounds="aggregate_interval", when=w) for w in ("join", "start"))
    assert [start.crosses(config, round, before=None) for round in range(6)] == [True, False, False] * 2
    for round, before, expected in ((0, None, True), (1, 0, True), (1, None, True), (3, 2, False), (4, 3, True),
                                    (6, 4, False), (8, 5, True)):  # fmt: skip
        assert join.crosses(config, round, before=before) is expected


def test_the_layout_is_in_three() -> None:
    assert FSMKD.layout.whole == ("client", "server", "tail")
    assert Layout(client=("client",), server=("client", "server")).whole == ("client", "server")
    assert FSMKD.layout.cut


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("algorithm.temperature=0", r"algorithm\.temperature=0\.0: expected a finite number > 0"),
        ("algorithm.distillation_weight=-1", r"algorithm\.distillation_weight=-1\.0: expected a finite number >= 0"),
        ("algorithm.aggregate_interval=0", r"algorithm\.aggregate_interval=0: expected an integer >= 1"),
        ("algorithm.shared_gradient=local", r"algorithm\.shared_gradient=local: expected one of the choices"),
        (
            "algorithm.shared_gradient=both algorithm.local_path=epoch",
            r"algorithm\.shared_gradient=both: expected global, as with local_path=epoch the local path has",
        ),
        ("model.cut=relu1", r"model\.cut=relu1: expected \[first,second\].*two of fc1, relu1, fc2, relu2$"),
        ("model.cut=[relu1]", r"model\.cut=\[relu1\]: expected null, one child of the model, or two"),
        ("model.cut=[relu2,relu1]", r"model\.cut=\[relu2,relu1\]: expected two children of the model, in its order"),
        ("model.personal.variants=[]", r"model\.personal\.variants=\[\]: expected null or a list of one or more"),
        ("model.personal.variants=[{hiden:[3]}]", r"model\.personal\.variants\.0\.hiden: no such key; did you mean"),
        (
            "model.personal.variants=[{},{hidden:[128,60]}]",
            r"model\.personal\.variants\.1=\{hidden:\[128,60\]\}: expected a body with weights from \[128\] to \[64\]",
        ),
    ],
)
def test_mistakes_are_one_line(configure, override: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        Federation(configure("algorithm=fsmkd", *override.split()))
    assert "\n" not in str(error.value)


def test_two_cuts_are_for_methods_that_cut_in_three(configure) -> None:
    with pytest.raises(ValueError, match=r"model\.cut=\[relu1,relu2\]: expected one child of the model"):
        Federation(configure("algorithm=sl_single_server", "model.cut=[relu1,relu2]"))
    Federation(configure("algorithm=fed_avg", "model.cut=[relu1,relu2]"))  # does not cut it at all
    with pytest.raises(ValueError, match=r"model\.cut=relux: "):
        Federation(configure("algorithm=fed_avg", "model.cut=[relu1,relux]"))
