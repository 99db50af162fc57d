"""Every part's optimizer and schedule can be refined on the command line, and follows the top level where it is not."""

import pytest

from cutlayer.models import refinable
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.parties.schedules import learning_options

REFINED = refinable()


@pytest.mark.parametrize("part", REFINED)
def test_a_part_s_optimizer_and_schedule(part: str) -> None:
    config = load_config(
        [
            *("optimizer=sgd", "lr=0.5", "scheduler=exponential", "scheduler.gamma=0.5", "rounds=4"),
            *(f"model.{part}.optimizer.lr=0.25", f"model.{part}.optimizer.momentum=0.75"),
            f"model.{part}.scheduler.gamma=0.125",
        ]
    )
    for each in REFINED:
        own = each == part
        optimizer, scheduler = config.optimizer_for(each), config.scheduler_for(each)
        decay = {"weight_decay": 0} if each == "auxiliary" else {}  # what it does not inherit
        assert optimizer.options == ({"lr": 0.25, "momentum": 0.75} if own else {"lr": 0.5}) | decay
        for round in range(4):
            expected = 0.25 * 0.125**round if own else 0.5 * 0.5**round
            assert learning_options(optimizer, scheduler, round)["lr"] == pytest.approx(expected, rel=1e-12)


def test_another_kind_by_its_name() -> None:
    kinds = [f"model.{part}.optimizer=sgd" for part in REFINED]
    schedules = [f"model.{part}.scheduler=StepLR" for part in REFINED]
    config = load_config([*kinds, *schedules, *(f"model.{part}.scheduler.step_size=2" for part in REFINED)])
    for part in REFINED:
        scheduler = config.scheduler_for(part)
        assert scheduler is not None
        assert (config.optimizer_for(part).name, scheduler.name, scheduler.options["step_size"]) == ("sgd", "steplr", 2)
    assert config.optimizer.name == "adam"
    assert config.scheduler is None
