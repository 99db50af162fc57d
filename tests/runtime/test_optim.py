"""Optimizers and schedules by name: a client's fresh optimizer sees the rates of an uninterrupted one."""

import pytest
import torch
from torch import nn

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.parties import optim
from cutlayer.runtime.parties.optim import (
    PartOptimizer,
    load_optimizer,
    make_optimizer,
    optimizer_config,
    optimizer_tensors,
)
from cutlayer.runtime.parties.schedules import check_schedule, learning_options, scheduler_config


@pytest.mark.parametrize("name", ["SGD", "adam", "AdamW", "RMSprop", "adagrad", "NAdam", "RAdam", "Adamax"])
def test_any_torch_optimizer_by_name(name: str) -> None:
    made = make_optimizer(optimizer_config({"name": name, "lr": 0.25}), [nn.Parameter(torch.zeros(2))])
    assert type(made).__name__.lower() == name.lower()
    assert made.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "adamm"}, "did you mean adam"),
        (
            {"name": "sgd", "lr": 0.1, "momentun": 0.9},
            "optimizer.momentun: no such key; did you mean optimizer.momentum",
        ),
        ({"name": "sgd", "lr": -1.0}, "Invalid learning rate"),
        ({"name": "lbfgs", "lr": 1.0}, "optimizer.name=lbfgs"),
    ],
)
def test_bad_optimizers_are_one_line(values, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        optimizer_config(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "CosineAnnealingLR", "T_max": 20},
        {"name": "StepLR", "step_size": 7, "gamma": 0.5},
        {"name": "MultiStepLR", "milestones": [3, 9]},
        {"name": "OneCycleLR", "max_lr": 0.3, "total_steps": 20},
        {"name": "ExponentialLR", "gamma": 0.9},
    ],
)
def test_schedule_equals_torch_stepped_without_interruption(schedule) -> None:
    optimizer, scheduler = optimizer_config({"name": "sgd", "lr": 0.1, "momentum": 0.9}), scheduler_config(schedule)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    options = {key: value for key, value in schedule.items() if key != "name"}
    stepper = getattr(torch.optim.lr_scheduler, schedule["name"])(reference, **options)
    for round in range(20):
        expected = reference.param_groups[0]
        fresh = make_optimizer(optimizer, [nn.Parameter(torch.zeros(1))])
        PartOptimizer([fresh]).set([learning_options(optimizer, scheduler, round)])
        assert fresh.param_groups[0]["lr"] == expected["lr"]
        assert fresh.param_groups[0]["momentum"] == expected["momentum"]
        reference.step()
        if round < 19:
            stepper.step()


@pytest.mark.parametrize("name", ["adam", "sgd", "rmsprop", "nadam", "radam", "adamax"])
def test_kept_momenta_continue_exactly(name: str) -> None:
    options = {"name": name, "lr": 0.01} | ({"momentum": 0.9} if name == "sgd" else {})
    config = optimizer_config(options)

    def run(steps: list[int]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = PartOptimizer([make_optimizer(config, model.parameters())])
        for step, restart in enumerate(steps):
            if restart:
                kept = optimizer_tensors(optimizer.of(0))
                optimizer = PartOptimizer([make_optimizer(config, model.parameters())])
                load_optimizer(optimizer.of(0), kept)
            optimizer.update(model(torch.full((4, 3), float(step))).square().mean())
        return [p.detach() for p in model.parameters()]

    for a, b in zip(run([0, 0, 0, 0]), run([0, 1, 0, 1]), strict=True):
        assert torch.equal(a, b)


def test_no_schedule_is_a_constant_rate() -> None:
    assert scheduler_config(None) is None
    assert learning_options(optimizer_config({"name": "adam", "lr": 0.1}), None, 5) == {}


def test_schedules_that_need_a_metric_are_refused() -> None:
    with pytest.raises(ConfigError, match="scheduler.name=reducelronplateau"):
        scheduler_config({"name": "reducelronplateau"})


def test_a_persistent_optimizer_gets_every_option_that_the_schedule_moves() -> None:
    """CyclicLR moves the momentum too, and back to where it began."""
    optimizer = optimizer_config({"name": "sgd", "lr": 0.01, "momentum": 0.9})
    scheduler = scheduler_config({"name": "CyclicLR", "base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2})
    kept = make_optimizer(optimizer, [nn.Parameter(torch.zeros(1))])
    seen = []
    for round in range(6):
        PartOptimizer([kept]).set([learning_options(optimizer, scheduler, round)])
        seen.append(kept.param_groups[0]["momentum"])
    assert seen[2] < seen[1] < seen[0] == 0.9
    assert seen[4] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "rounds"),
    [
        ({"name": "sgd", "lr": 0.1}, {"name": "StepLR", "step_size": 0}, 3),
        ({"name": "sgd", "lr": 0.1}, {"name": "OneCycleLR", "max_lr": 0.3, "total_steps": 5}, 20),
        ({"name": "adagrad", "lr": 0.1}, {"name": "CyclicLR", "base_lr": 0.01, "max_lr": 0.1}, 3),
    ],
)
def test_schedules_that_would_fail_later_are_refused_now(optimizer, scheduler, rounds: int) -> None:
    with pytest.raises(ConfigError, match="scheduler="):
        check_schedule(optimizer_config(optimizer), scheduler_config(scheduler), rounds, "scheduler")


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_gpu_takes_a_step_at_once_unless_told_otherwise(name: str) -> None:
    plain = optimizer_config({"name": name, "lr": 0.1})
    assert optim._options_on(plain, {"cuda"}) == {"lr": 0.1, "fused": True}
    assert optim._options_on(plain, {"cpu"}) == plain.options
    assert optim._options_on(plain, set()) == plain.options
    for way in ("fused", "foreach"):
        own = optimizer_config({"name": name, "lr": 0.1, way: False})
        assert optim._options_on(own, {"cuda"}) == {"lr": 0.1, way: False}
    assert optim._options_on(optimizer_config({"name": "rmsprop", "lr": 0.1}), {"cuda"}) == {"lr": 0.1}


def test_a_schedule_leaves_how_a_step_is_computed() -> None:
    options = optimizer_config({"name": "sgd", "lr": 0.1, "momentum": 0.9})
    part = PartOptimizer([torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9, fused=True)])
    part.set([learning_options(options, scheduler_config({"name": "ExponentialLR", "gamma": 0.5}), 3)])
    (group,) = part.of(0).param_groups
    assert group["fused"]
    assert group["lr"] == pytest.approx(0.0125)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_fused_steps_go_on_from_what_lay_in_another_order(name: str) -> None:
    """Gradients and kept momenta lie as their parameters do, as a GPU's fused steps need."""
    values = {"name": name, "lr": 0.1, **({"momentum": 0.9} if name == "sgd" else {})}
    ends = []
    for fused in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
        config = optimizer_config({**values, "fused": fused})
        kept: dict[str, torch.Tensor] = {}
        for _ in range(3):
            part = PartOptimizer([make_optimizer(config, [weight])])
            load_optimizer(part.of(0), kept)
            for value in part.of(0).state[weight].values():
                assert value.dim() == 0 or value.stride() == weight.stride()
            weight.grad = torch.randn(2, 3, 4, 4)
            part.step()
            assert weight.grad.stride() == weight.stride() or not fused
            kept = {key: value.contiguous() for key, value in optimizer_tensors(part.of(0)).items()}
        ends.append(weight.detach())
    assert torch.allclose(*ends, rtol=1e-4, atol=1e-6)
