"""Schedules by step and with a warm-up: transformers' values, and each optimizer's own steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cutlayer.algorithms as algorithms
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.parties.blueprint import Blueprint
from cutlayer.runtime.parties.optim import PartOptimizer, optimizer_config
from cutlayer.runtime.parties.schedules import Pace, learning_options, scheduler_config
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.workers.clients import WorkerClients
from tests.conftest import play, same, weights
from tests.contract.test_contract import quick
from tests.runtime.test_together import apart_by
from tests.runtime.test_updates import OPTIMIZERS, Pair

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
Configure = Callable[..., RunConfig]
# Two epochs of unequal clients, of whom a round has a part.
UNEVEN = (
    *("local_epochs=2", "batch_size=40", "num_clients=4", "frac=0.6", "rounds=3", "dataset.fraction=0.3"),
    *("dataset.distribution=dirichlet", "dataset.alpha=1.0", "eval_interval=3"),
)
OFF = "model.auxiliary.scheduler={name: null}"  # FSL-SAGE's alignment, whose steps are not known ahead


def published(name: str, warmup: int, total: int, lr: float = 1.0) -> list[float]:
    """The rates of each step by transformers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    make = getattr(transformers, f"get_{name}_schedule_with_warmup")
    scheduler, found = make(optimizer, warmup, total), list[float]()
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("name", "ours"), [("linear", "linear"), ("cosine", "CosineAnnealingLR")])
@pytest.mark.parametrize("per", ["round", "step"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 40), (1, 9), (5, 40), (300, 2000)])
def test_the_values_are_those_of_transformers(name: str, ours: str, per: str, warmup: int, total: int) -> None:
    optimizer = optimizer_config({"name": "adamw", "lr": 2.0})
    scheduler = scheduler_config({"name": ours, "per": per, "warmup": warmup})
    found = [learning_options(optimizer, scheduler, at, total)["lr"] for at in range(total)]
    assert found == pytest.approx(published(name, warmup, total, 2.0), rel=0, abs=1e-12)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each time that an optimizer is told where its schedules are: itself, the places by part, the steps so far."""
    seen: list[Any] = []
    taken: dict[int, int] = {}
    own, step = Blueprint.schedule, PartOptimizer._begin_step

    def schedule(self: Any, optimizer: Any, names: Any, progress: Any) -> None:
        seen.append((optimizer, {name: progress(name) for name in names}, taken.get(id(optimizer), 0)))
        own(self, optimizer, names, progress)

    def begin(self: Any) -> None:
        taken[id(self)] = taken.get(id(self), 0) + 1
        step(self)

    monkeypatch.setattr(Blueprint, "schedule", schedule)
    monkeypatch.setattr(PartOptimizer, "_begin_step", begin)
    seen.append(taken)
    return seen


@pytest.mark.parametrize("name", algorithms.names())
@pytest.mark.parametrize(
    "keys", [(), UNEVEN, (*UNEVEN, "frac=1", "cohort.together=4")], ids=["all", "some", "together"]
)
def test_every_method_says_how_many_steps_it_takes(
    name: str, keys: tuple[str, ...], configure: Configure, places: list[Any]
) -> None:
    if algorithms.get(name).pooled or name == "sl":
        keys = tuple(key for key in keys if not key.startswith("cohort."))
    off = (OFF,) if name == "fsl_sage" else ()
    federation = play(Federation(configure(f"algorithm={name}", *quick(name), "scheduler=linear", *keys, *off)))
    taken, *told = places
    by_step, rounds, moved = federation.setup.blueprint.by_step, federation.setup.config.rounds, set[str]()
    for number, (optimizer, now, before) in enumerate(told):
        after = next((each for each in told[number + 1 :] if each[0] is optimizer), None)
        steps = (taken.get(id(optimizer), 0) if after is None else after[2]) - before
        for part in by_step & now.keys() if steps else ():
            at, of = now[part]
            moved.add(part)
            if (
                part not in federation.setup.algorithm.layout.client
                and optimizer in federation.server.ctx._optimizers.values()
            ):
                end = of if after is None else after[1][part].at
                assert at + steps == end, (part, now)
            else:
                assert (at % steps, of) == (0, rounds * steps), (part, now)
    assert moved


def test_the_server_part_goes_down_the_whole_schedule_once(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever clients there are in a round, it takes each rate of transformers' schedule, one after the other."""
    found: list[float] = []
    own = PartOptimizer._take

    def take(self: Any) -> None:
        if "momentum" in self.of(0).defaults:  # the server's
            found.append(self.lr)
        own(self)

    monkeypatch.setattr(PartOptimizer, "_take", take)
    server = (
        "model.server.optimizer={name: sgd, lr: 0.1}",
        "model.server.scheduler={name: linear, per: step, warmup: 4}",
    )
    play(Federation(configure("algorithm=sl_single_server", *UNEVEN, *server)))
    assert found == pytest.approx(published("linear", 4, len(found), 0.1), rel=0, abs=1e-12)
    assert found[0] == 0 < found[-1] < 0.01


@pytest.mark.parametrize("keep", ["run", "round"])
def test_training_is_that_of_a_plain_loop(keep: str, configure: Configure) -> None:
    """One client's rounds are one run of torch with transformers' schedule, to the bit."""
    keys = ("optimizer=sgd", "optimizer.momentum=0.9", "lr=0.1", "scheduler=linear", "scheduler.warmup=3", "rounds=3")
    config = configure("algorithm=centralized", "model=mlp", *keys, f"optimizer.keep={keep}", "batch_size=200")
    federation = Federation(config)
    setup = federation.setup
    (model,) = setup.blueprint.parts(["model"]).values()
    steps, total = len(setup.steps(0)), 3 * len(setup.steps(0))
    rates = iter(published("linear", 3, total, 0.1))
    for round in range(3):
        if round == 0 or keep == "round":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = rng.torch_generator(config.seed, round=round, client=0, stream="batches")
        for x, y in setup.data(0).batches(generator):
            optimizer.param_groups[0]["lr"] = next(rates)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert next(rates, None) is None
    play(federation)
    kept = federation.stores["clients"].get(0, "model")
    assert kept is not None
    assert steps > 3
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


METHODS = ("fed_avg", "sl_single_server", "sl_multi_server", "cse_fsl")
STEPS = ("scheduler=linear", "scheduler.warmup=3", *UNEVEN, "optimizer.keep=run")


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_is_resumed_ends_in_the_same_bits(name: str, configure: Configure, tmp_path: Path) -> None:
    config = configure(f"algorithm={name}", *STEPS)
    expected = weights(play(Federation(config)))
    stopped = Federation(config, tmp_path)
    stopped.step()
    stopped.checkpoint({})
    resumed = Federation(config, tmp_path)
    assert resumed.resume() == {}
    assert same(weights(play(resumed)), expected)


@pytest.mark.parametrize("name", ["sl_single_server", "sl_multi_server"])
def test_workers_give_the_same_bits(name: str, configure: Configure) -> None:
    expected = weights(play(Federation(configure(f"algorithm={name}", *STEPS))))
    made = Federation(configure(f"algorithm={name}", *STEPS, "workers=2"), clients=WorkerClients)
    try:
        assert same(weights(play(made)), expected)
    finally:
        assert isinstance(made.clients, WorkerClients)
        made.clients.close()


@pytest.mark.parametrize("name", ["fed_avg", "sl_multi_server", "cse_fsl", "scaffold", "per_fed_avg", "fed_rep"])
def test_clients_together_come_to_what_each_comes_to(name: str, configure: Configure) -> None:
    even = ("dataset.distribution=iid",) if name in ("scaffold", "per_fed_avg") else ()
    own = ("optimizer=sgd", "lr=0.1", *STEPS, "frac=1", "precision=fp64", *even)
    alone = play(Federation(configure(f"algorithm={name}", *own)))
    several = play(Federation(configure(f"algorithm={name}", *own, "cohort.together=4")))
    assert several.clients.groups > 0  # type: ignore[attr-defined]
    assert apart_by(weights(several), weights(alone)) < 1e-9


@pytest.mark.parametrize("name", ["momentum", "adam, fused"])
def test_a_rate_that_changes_with_each_step_is_in_no_recording(name: str) -> None:
    """Passes are replayed; steps are computed, to the bits of computing all."""
    pair, (kind, options) = Pair(), OPTIMIZERS[name]
    optimizers, plain = pair.optimizers(kind, **options), optimizer_config({"name": "sgd", "lr": 0.1})
    scheduler = scheduler_config({"name": "linear", "per": "step", "warmup": 3})
    for each in optimizers:
        each.go_by([lambda step: {"lr": learning_options(plain, scheduler, step, 12)["lr"]}])
    assert [pair.steps(optimizers, 1) for _ in range(12)][4:] == [2] * 8
    assert optimizers[1].lr == pytest.approx(0.1 / 9)
    for each in optimizers:
        each.go_by([None])
    assert pair.steps(optimizers) == 3


def test_what_a_client_drops_moves_nothing(configure: Configure) -> None:
    """The clock is the run's: a round begins where it would if all had ended theirs."""
    pace = Pace(4, {"server": [3, 5]}, {"server": [0, 8, 16, 24, 32]})
    assert [pace("server", round) for round in (0, 3, 9)] == [(0, 32), (24, 32), (32, 32)]
    assert [pace("server", 2, client) for client in (0, 1)] == [(6, 12), (10, 20)]
    assert pace("client", 2) == (2, 4)
    sgd, linear = optimizer_config({"name": "sgd", "lr": 1.0}), scheduler_config({"name": "linear", "per": "step"})
    assert learning_options(sgd, linear, 50, 4) == learning_options(sgd, linear, 3, 4) == pytest.approx({"lr": 0.25})


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("scheduler=linear", "scheduler.per=epoch"), r"scheduler\.per=epoch: .*round, step"),
        (("scheduler=linear", "scheduler.warmup=-1"), r"scheduler\.warmup=-1: .*integer >= 0"),
        (("scheduler=linear", "scheduler.warmup=0.5"), r"scheduler\.warmup=0\.5: .*integer >= 0"),
        (
            ("scheduler=linear", "scheduler.warmup=5000"),
            r"scheduler\.warmup=5000: .*fewer than the \d+ steps of the run",
        ),
        (("scheduler=cosine", "scheduler.warmup=3", "rounds=3"), r"scheduler\.warmup=3: .*fewer than the 3 rounds"),
        (("scheduler=multistep", "scheduler.per=step"), r"scheduler\.milestones=.*numbers of steps"),
        (("scheduler=linear", "algorithm=fsl_sage"), r"scheduler\.per=step: .*round, as fsl_sage .* auxiliary part"),
        (
            ("scheduler=linear", "algorithm=fed_rep", "algorithm.one_optimizer=true"),
            r"scheduler\.per=step: .*round, as fed_rep",
        ),
        (
            ("scheduler=linear", "algorithm=moco_sfl", "algorithm.client_schedule=step"),
            r"scheduler\.per=step: .*round, as moco_sfl .* client part",
        ),
        (
            ("model.client.scheduler={name: OneCycleLR, max_lr: 0.3, total_steps: 2, per: step}", "algorithm=cse_fsl"),
            r"model\.client\.scheduler=.*over \d+ steps",
        ),
        (
            ("scheduler=cosine", "model.client.scheduler.per=step"),
            r"scheduler\.per=step: expected a scheduler to go with",
        ),
    ],
)
def test_refusals(keys: tuple[str, ...], line: str, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        Federation(configure("algorithm=fed_avg", *keys))
    assert "\n" not in str(caught.value)


def test_what_is_set_without_the_new_keys_is_as_it_was(configure: Configure) -> None:
    """The configuration of a run that was begun before, and so its folder and its checkpoint."""
    plain = {"name": "cosineannealinglr", "T_max": 3}
    assert configure("scheduler=cosine", "rounds=3").to_mapping()["scheduler"] == plain
    several = configure("scheduler=multistep", "rounds=8").to_mapping()["scheduler"]
    assert several == {"name": "multisteplr", "milestones": [4, 6], "gamma": 0.1}
    linear = configure("scheduler=linear", "scheduler.warmup=2")
    assert linear.to_mapping()["scheduler"] == {"name": "linear", "per": "step", "warmup": 2}
    assert len({linear.identity(), configure("scheduler=linear").identity(), configure().identity()}) == 3
    warm = configure("scheduler=cosine", "rounds=9", "scheduler.warmup=2")
    rates = [learning_options(warm.optimizer, warm.scheduler, at, 9)["lr"] for at in range(9)]
    assert rates == pytest.approx(published("cosine", 2, 9, warm.lr), rel=0, abs=1e-12)
