"""Every method that leaves the model whole runs any module by name; those that need its classifier refuse it."""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from cutlayer import algorithms
from cutlayer.algorithms.mixins import TrainsAdapters
from cutlayer.models import body_and_head
from cutlayer.runtime.after.saved import personalize_run
from cutlayer.runtime.costs.traffic import expected_bytes
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import MODEL_FILE
from cutlayer.runtime.job import choose_folder
from cutlayer.runtime.messages.ledger import CONTROL_KINDS
from cutlayer.runtime.parties.optim import PartOptimizer
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder
from cutlayer.runtime.scoring.fine_tuning import fine_tune
from cutlayer.runtime.settings import RunConfig
from tests.conftest import play, same, weights
from tests.contract.elsewhere import Net
from tests.places import ROOT

OWN = "model=import/tests.contract.elsewhere.Net"
WHOLE = [name for name in algorithms.names() if algorithms.get(name).layout.whole == ("model",)]
HEADED = [name for name in algorithms.names() if algorithms.get(name).layout.whole == ("body", "head")]
CUT = [name for name in algorithms.names() if algorithms.get(name).layout.cut]
Configure = Callable[..., RunConfig]


def finished(config: RunConfig, path: Path) -> dict[str, Any]:
    """Run to the end in `path`; gives the results."""
    with RunFolder.claim(path) as folder:
        run(config, folder)
    return json.loads((path / "results.json").read_text(encoding="utf-8"))


def accuracy(model: nn.Module, config: RunConfig) -> float:
    test = Federation(config).setup.dataset.test
    x, y = next(test.batches(torch.arange(len(test)), batch_size=len(test)))
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("name", WHOLE)
def test_a_method_that_leaves_the_model_whole_trains_any_module(configure: Configure, name: str) -> None:
    config = configure(f"algorithm={name}", OWN, "rounds=2", "num_clients=2")
    federation = Federation(config)
    record, _ = federation.step()
    assert record.train_loss is not None
    assert math.isfinite(record.train_loss)
    # Once down and once up for each of two clients; SCAFFOLD's control variates are of the parameters alone.
    model = Net(10, 1)
    sizes = [4 * sum(p.numel() for p in model.parameters()), sum(t.nbytes for t in model.state_dict().values())]
    expected = {"centralized": 0, "local_only": 0, "scaffold": 4 * sum(sizes)}
    projector = federation.setup.blueprint.initial.get("projector", {})  # of features of twelve values
    assert sum(t.numel() for t in projector.values()) in (0, 13 * 16 + 17 * 16)
    sizes[1] += sum(t.nbytes for t in projector.values())
    if issubclass(federation.setup.algorithm, TrainsAdapters):
        expected[name] = sum(expected_bytes(federation.setup, range(1)).values())
    assert record.comm_load == expected.get(name, 4 * sizes[1])


@pytest.mark.parametrize("name", CUT)
def test_a_method_that_cuts_the_model_asks_where_in_one_line(configure: Configure, name: str) -> None:
    with pytest.raises(ConfigError) as error:
        Federation(configure(f"algorithm={name}", OWN))
    assert str(error.value).startswith("model.cut")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", HEADED)
def test_a_method_of_body_and_head_finds_the_classifier(configure: Configure, name: str) -> None:
    """The last layer with weights, and what the model's own code does after the one before it."""
    heads = ("model.auxiliary_heads.blocks=[stem]",) if name == "mhmd" else ()
    federation = Federation(configure(f"algorithm={name}", OWN, *heads, "rounds=2", "num_clients=2"))
    parts = federation.setup.blueprint.initial
    assert list(parts["head"]) == ["scale", "out.weight", "out.bias"]
    assert sorted([*parts["body"], *parts["head"]]) == sorted(Net(10, 1).state_dict())
    play(federation)
    measured = sum(count.payload for _, kind, _, count in federation.ledger.totals() if kind not in CONTROL_KINDS)
    assert measured == sum(expected_bytes(federation.setup, range(2)).values())
    trained = federation.full_model()
    if trained is None:
        assert federation.setup.personal
        return
    Net(10, 1).load_state_dict(trained, strict=True)
    moved = {key for key, value in trained.items() if not torch.equal(value, {**parts["body"], **parts["head"]}[key])}
    assert {"stem.weight", "norm.weight"} <= moved
    if name in ("fed_babu", "mhmd"):
        assert not moved & parts["head"].keys(), "the head stays what it was"


def test_the_saved_model_is_the_plain_module_with_the_recorded_accuracy(configure: Configure, tmp_path: Path) -> None:
    config = configure("algorithm=fed_avg", OWN, "rounds=3", "batch_size=20", "progress=none")
    results = finished(config, tmp_path / "run")
    model = Net(10, 1)
    model.load_state_dict(load_file(tmp_path / "run" / MODEL_FILE), strict=True)
    assert accuracy(model, config) == results["test_acc"][-1]


def test_a_model_of_torchvision_loads_into_torchvisions(configure: Configure, tmp_path: Path) -> None:
    shape = ("dataset=synthetic", "dataset.options.n_train=24", "dataset.options.n_test=8", "dataset.options.height=8")
    more = ("dataset.options.width=8", "dataset.options.classes=4", "dataset.resize=32", "batch_size=8", "rounds=1")
    config = configure(
        "algorithm=fed_avg", "model=torchvision/resnet18", *shape, *more, "num_clients=2", "progress=none"
    )
    results = finished(config, tmp_path / "run")
    model = torchvision.models.resnet18(num_classes=4)
    model.load_state_dict(load_file(tmp_path / "run" / MODEL_FILE), strict=True)
    assert accuracy(model, config) == results["test_acc"][-1]
    assert Federation(config).setup.dataset.info.shape == (3, 32, 32), "grey images of 8x8, as the model sees them"
    parts = choose_folder(config, []).relative_to(config.save_dir.absolute()).parts
    assert parts[:3] == ("fed_avg", "torchvision-resnet18", "synthetic-iid")
    again = RunConfig.from_mapping(
        {**config.to_mapping(), "model": {"name": "torchvision/resnet18", "init": str(tmp_path / "run")}}
    )
    started = Federation(again).full_model()
    assert started is not None
    assert same(started, load_file(tmp_path / "run" / MODEL_FILE))


def test_an_interrupted_run_resumes_to_the_same_bits(configure: Configure, tmp_path: Path) -> None:
    config = configure("algorithm=fed_avg", OWN, "rounds=4")
    through = play(Federation(config))
    first = play(Federation(config, tmp_path), 2)
    first.checkpoint({})
    second = Federation(config, tmp_path)
    assert second.resume() is not None
    assert second.round == 2
    assert same(weights(play(second)), weights(through))


def test_the_same_seed_gives_the_same_weights_and_another_one_others(configure: Configure) -> None:
    states = [Federation(configure("algorithm=fed_avg", OWN, f"seed={seed}")).full_model() for seed in (1, 1, 2)]
    assert states[0] is not None
    assert states[1] is not None
    assert states[2] is not None
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_batches_of_one_are_refused_where_the_model_normalises_over_them(configure: Configure) -> None:
    own = Federation(configure("algorithm=fed_avg", OWN, "batch_size=1"))  # 64 pixels are enough for a variance
    assert own.setup.has_batches(0)
    options = ("dataset=synthetic", "dataset.options.height=32", "dataset.options.width=32")
    with pytest.raises(ConfigError, match=r"batch_size=1: expected at least 2: torchvision/resnet18 normalises"):
        Federation(configure("algorithm=fed_avg", "model=torchvision/resnet18", "batch_size=1", *options))


@pytest.mark.parametrize(("name", "part"), [("fed_avg", "full"), ("fed_avg", "head"), ("fed_babu", "head")])
def test_such_a_model_is_personalised(configure: Configure, tmp_path: Path, name: str, part: str) -> None:
    given = (f"algorithm={name}", OWN, "rounds=1", "num_clients=2", "progress=none", "threads=1")
    finished(configure(*given, f"personalize.part={part}", "personalize.epochs=1"), tmp_path / "full")
    (summary,) = (tmp_path / "full").glob("personalized/*/summary.json")
    losses = json.loads(summary.read_text(encoding="utf-8"))["loss"]
    assert losses[1] < losses[0], "an epoch on its own data lowers a client's loss"


def test_the_body_of_such_a_model_is_fine_tuned_as_by_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = Net(10, 1)
    plain = copy.deepcopy(model)
    batches = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(3)]
    body, head = body_and_head(model, (1, 8, 8))
    head.requires_grad_(False)
    optimizer = PartOptimizer([torch.optim.SGD(body.parameters(), 0.1)])
    tuning = fine_tune(body, head, "body", optimizer, lambda: batches, keep_statistics=True, criterion=F.cross_entropy)
    assert [next(tuning), next(tuning)] == [0, 1]
    own = torch.optim.SGD([*plain.stem.parameters(), *plain.norm.parameters()], 0.1)
    for x, y in batches:
        own.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        own.step()
    assert same(model.state_dict(), plain.state_dict())


def test_parts_that_are_no_sequences_are_personalised_whole(configure: Configure, tmp_path: Path) -> None:
    given = ("algorithm=sl_single_server", OWN, "model.cut=stem", "rounds=1", "num_clients=2", "progress=none")
    with (
        pytest.raises(ConfigError, match=r"personalize\.part=head: expected full"),
        RunFolder.claim(tmp_path / "head", save_dir=tmp_path) as folder,
    ):
        run(configure(*given, "personalize.part=head"), folder)
    assert not (tmp_path / "head").exists(), "it is refused before training"
    finished(configure(*given, "personalize.part=full"), tmp_path / "full")
    with pytest.raises(ConfigError, match=r"personalize\.part=body: expected full"):
        personalize_run(tmp_path / "full", {"personalize.part": "body", "model": OWN.partition("=")[2]})


def test_hydra_learns_the_names_without_importing_a_library_of_models() -> None:
    code = "import sys, hydra_plugins.cutlayer_models; print({'torch', 'torchvision', 'timm'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
