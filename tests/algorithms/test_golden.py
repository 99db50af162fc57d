"""Four methods against traces that FSL-SAGE's authors' code computed in double precision, by configuration alone.

What the traces are is in the README beside them. Weights agree to 1e-10, accuracies and bytes exactly. The authors
count no labels, and their test loss is the mean over batches of 32, of which the last has 8 samples.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

import cutlayer.datasets.registry as readers
from cutlayer import distributions
from cutlayer.models import part_registry
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.messages.ledger import CONTROL_KINDS
from cutlayer.runtime.rounds.federation import Federation
from tests.algorithms import golden
from tests.places import SHARED

TRACES, IMAGES = SHARED.parent / "golden", SHARED / "cifar10_jpeg.zip"
pytestmark = pytest.mark.skipif(
    not (TRACES.is_dir() and IMAGES.is_file()),
    reason="the shared golden traces and CIFAR-10 are not beside this checkout",
)
SETTING = (
    "dataset=digits", "dataset.name=golden", "dataset.distribution=in_blocks", "dataset.shuffle=false",
    "dataset.normalize=imagenet", "model=import/tests.algorithms.golden.network", f"model.cut='{golden.CUT}'",
    "num_clients=4", "cohort_order=fixed", "rounds=3", "batch_size=32", "precision=fp64", "device=cpu",
    "optimizer=sgd", "lr=0.05", "optimizer.momentum=0.9", "optimizer.weight_decay=0.0001", "optimizer.keep=run",
)  # fmt: skip
AUXILIARY = (
    "model.auxiliary.size=linear",
    "model.auxiliary.optimizer={name:adam,lr:0.001,weight_decay:0,keep:run}",
    "algorithm.upload_interval=5",
)
ALIGNMENT = ("align_interval=10", "align_epochs=10", "buffer_size=1000", "align_batch_size=1000")
METHODS = {
    "fsl_sage": (*AUXILIARY, *(f"algorithm.{key}" for key in ALIGNMENT)),
    "cse_fsl": AUXILIARY,
    "sl_multi_server": (),
    "sl_single_server": (),
}


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for module, name in ((readers, "_READERS"), (distributions, "DISTRIBUTIONS"), (part_registry, "_PARTS")):
        monkeypatch.setattr(module, name, copy.copy(getattr(module, name)))


def begun(trace: dict[str, Any], name: str, init: Path, *overrides: str) -> Federation:
    """A federation on the trace's samples, from the trace's initial weights."""
    readers.register("golden")(lambda _: golden.served(IMAGES, trace["idx"]))
    distributions.register("in_blocks")(golden.in_blocks)
    # The only part whose first weights no key gives.
    part = part_registry._PARTS["auxiliary"]
    part_registry._PARTS["auxiliary"] = replace(part, build=lambda _: golden.auxiliary(trace["init_aux"]))
    save_file(golden.whole(trace["init_client"], trace["init_server"]), init)
    return Federation(load_config([f"algorithm={name}", *SETTING, *METHODS[name], f"model.init={init}", *overrides]))


def training_bytes(federation: Federation) -> int:
    """What has crossed so far, without labels."""
    lines = federation.ledger.totals()
    return sum(count.payload for _, kind, field, count in lines if kind not in CONTROL_KINDS and field != "y")


def mean_over_batches(federation: Federation, size: int) -> float:
    """The test loss as a mean over batches, however many samples each has."""
    state, model = federation.full_model(), golden.network().double().eval()
    assert state is not None
    model.load_state_dict(state)
    test = federation.setup.dataset.test
    with torch.no_grad():
        losses = [cross_entropy(model(x), y) for x, y in test.batches(torch.arange(len(test)), batch_size=size)]
    return float(torch.stack(losses).mean())


def apart(federation: Federation, trace: dict[str, Any], name: str) -> float:
    """The largest difference of a weight, or of a running statistic, from the trace's last."""
    state = federation.full_model()
    assert state is not None
    # In the trace of SplitFed v1 the server part is the one that nobody trained.
    server = {} if name == "sl_multi_server" else trace["final_server"]
    expected = golden.whole(trace["final_client"], server)
    assert len(expected) == (9 if name == "sl_multi_server" else 13)
    return max(float((state[key].double() - tensor.double()).abs().max()) for key, tensor in expected.items())


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("name", METHODS)
def test_a_run_agrees_with_the_authors_code(name: str, tmp_path: Path) -> None:
    trace = torch.load(TRACES / f"{name}_fp64.pt", weights_only=False)
    federation = begun(trace, name, tmp_path / "initial.safetensors")
    for round in range(3):
        record, _ = federation.step()
        assert record.test_acc == trace["test_acc"][round]
        assert mean_over_batches(federation, 32) == pytest.approx(trace["test_loss"][round], rel=1e-10)
        assert training_bytes(federation) == trace["comm_load"][round]
        # 8 bytes for each label that crossed: every sample's, or those of the first and the sixth of eight batches.
        labels = 1000 if name.startswith("sl_") else 4 * 2 * 32
        assert record.comm_load - training_bytes(federation) == 8 * labels * (round + 1)
    assert apart(federation, trace, name) < 1e-10


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("name", "override"),
    [
        *((name, "optimizer.keep=round") for name in METHODS),
        ("fsl_sage", "model.auxiliary.optimizer.weight_decay=0.0001"),
        *((name, "cohort_order=drawn") for name in METHODS if name != "sl_multi_server"),
    ],
)
def test_every_key_that_makes_it_agree_is_needed(name: str, override: str, tmp_path: Path) -> None:
    trace = torch.load(TRACES / f"{name}_fp64.pt", weights_only=False)
    federation = begun(trace, name, tmp_path / "initial.safetensors", override)
    while not federation.done:
        federation.step()
    assert apart(federation, trace, name) > 1e-6
