"""How every registered algorithm computes: bf16 learns what fp32 learns, and the order in memory decides nothing."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cutlayer import algorithms
from cutlayer.attacks.model_inversion import InversionConfig
from cutlayer.attacks.running import attack
from cutlayer.runtime.after.personalize import personalize
from cutlayer.runtime.parties.blueprint import Blueprint
from cutlayer.runtime.parties.optim import PartOptimizer
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from tests.conftest import play, weights
from tests.contract.test_contract import CONVOLUTIONS, quick

# Many local steps in a round, at a rate at which two rounds learn the digits.
STEPS = ("num_clients=2", "batch_size=20", "optimizer=sgd", "lr=0.2")
# Contrast over a low temperature amplifies any rounding.
GENTLE = {
    "fl_moco": ("lr=0.02", "algorithm.temperature=0.5"),
    "fsl_sage": ("model.auxiliary.size=full",),
    "fed_sa_lora": ("model.lora.r=32", "model.lora.alpha=32", "local_epochs=2"),
}
FURTHEST, ACCURACY = 0.3, 0.03


def moves(start: dict[str, Tensor], end: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """How far training moved each tensor of each part or row, by part or row; what was not there began at zero."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in end.items():
        owner, _, name = key.rpartition("/")
        if tensor.is_floating_point():
            found.setdefault(owner, {})[name] = tensor - start.get(key, torch.zeros_like(tensor))
    return found


def furthest(exact: dict[str, dict[str, Tensor]], rough: dict[str, dict[str, Tensor]]) -> float:
    """The largest distance between two moves of the same part, relative to the exact one's length."""

    def length(move: dict[str, Tensor]) -> float:
        return float(sum(tensor.square().sum() for tensor in move.values())) ** 0.5

    assert exact.keys() == rough.keys()
    return max(
        length({name: rough[owner][name] - tensor for name, tensor in move.items()}) / length(move)
        for owner, move in exact.items()
        if length(move)
    )


@pytest.mark.parametrize("name", algorithms.names())
def test_bf16_learns_what_fp32_learns(configure, name: str) -> None:
    """Steps on stale weights leave both bounds: casts of weights must not outlive the step that made them."""
    reached, accuracy = {}, {}
    for precision in ("fp32", "bf16"):
        setting = (*quick(name), *STEPS, *GENTLE.get(name, ()), f"precision={precision}")
        federation = Federation(configure(f"algorithm={name}", *setting))
        start = weights(federation)
        reached[precision] = moves(start, weights(play(federation)))
        accuracy[precision] = federation.evaluate().accuracy
    assert accuracy["fp32"] > 0.5
    assert abs(accuracy["bf16"] - accuracy["fp32"]) <= ACCURACY
    assert furthest(reached["fp32"], reached["bf16"]) <= FURTHEST


def test_stale_weights_leave_the_bounds(configure, monkeypatch) -> None:
    """The test above can fail: with autocast's own cache, one step in a turn is of the present weights."""
    monkeypatch.setattr(Blueprint, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    stale, exact = (
        Federation(configure("algorithm=fed_avg", *STEPS, f"precision={precision}")) for precision in ("bf16", "fp64")
    )
    monkeypatch.setattr(exact.setup.blueprint, "autocast", nullcontext)
    assert play(exact).evaluate().accuracy > 0.5 + play(stale).evaluate().accuracy


def test_fine_tuning_and_an_attack_learn_in_bf16(configure, tmp_path: Path) -> None:
    """What trains after a run has many steps in one turn too."""
    gained, error = {}, {}
    for precision in ("fp32", "bf16"):
        cut = ("algorithm=sl_single_server", "dataset.distribution=shards", "dataset.classes_per_client=3")
        federation = play(Federation(configure(*cut, "optimizer=sgd", "lr=0.1", f"precision={precision}")))
        tuned = personalize(federation, PersonalizeConfig("full", (0, 3), 0.05), tmp_path / precision)
        gained[precision] = tuned.mean[1] - tuned.mean[0]
        config = InversionConfig(20, 0.003, 32, samples=200, width=8, blocks=1)
        found, _ = attack("model_inversion", federation, config, tmp_path)
        error[precision] = found.to_json()["mse"]
    assert gained["fp32"] > 0.2
    assert gained["bf16"] == pytest.approx(gained["fp32"], abs=ACCURACY)
    assert error["bf16"] == pytest.approx(error["fp32"], rel=0.05)


def test_steps_are_computed_outside_of_autocast() -> None:
    """Adafactor's and Muon's steps hold matrix products, which autocast would round."""
    torch.manual_seed(0)
    gradient = torch.randn(32, 16)
    moved = []
    for enabled in (False, True):
        weight = nn.Parameter(torch.zeros(32, 16))
        optimizer = PartOptimizer([torch.optim.Adafactor([weight], lr=0.1)])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.update((weight * gradient).sum())
        moved.append(weight.detach())
    assert torch.equal(*moved)


@pytest.mark.parametrize("name", algorithms.names())
def test_the_order_of_values_in_memory_changes_nothing_but_rounding(configure, name: str) -> None:
    """Weights and images lie channel by channel, what crosses as it would come over a network."""
    setting = (f"algorithm={name}", *quick(name), *CONVOLUTIONS, "precision=fp64", "rounds=2", "num_clients=2")
    setting += ("optimizer=sgd", "lr=0.05")  # Adam would make steps of the rounding of gradients that are zero
    ends = {}
    for order in ("contiguous", "channels_last"):
        federation = Federation(configure(*setting, f"memory_format={order}"))
        start = weights(federation)
        ends[order] = moves(start, weights(play(federation)))
    assert furthest(ends["contiguous"], ends["channels_last"]) < 1e-6
    for part in federation.setup.blueprint.parts(federation.setup.algorithm.layout.parts).values():
        for parameter in part.parameters():
            if parameter.dim() == 4 and min(parameter.shape[1:]) > 1:
                assert parameter.is_contiguous(memory_format=torch.channels_last)
    x, _ = next(federation.setup.epoch(0, torch.Generator().manual_seed(0)))
    assert x.is_contiguous(memory_format=torch.channels_last)
