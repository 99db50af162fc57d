"""A finished run's model.safetensors is one whole model, whatever the method cut, with the recorded accuracy."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from cutlayer import algorithms
from cutlayer.algorithms.mixins import TrainsAdapters
from cutlayer.models import build_model
from cutlayer.runtime.experiment import MODEL_FILE, run
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder
from cutlayer.runtime.settings import RunConfig
from tests.contract.test_contract import quick

WHOLE = [n for n in algorithms.names() if not algorithms.get(n).personal or algorithms.get(n).pooled]


@pytest.mark.parametrize("name", WHOLE)
def test_it_loads_into_the_whole_model_with_the_recorded_accuracy(configure, tmp_path: Path, name: str) -> None:
    small = ("model=cnn4", "model.options.width=4", "batch_size=100", *quick(name))
    config = configure(f"algorithm={name}", *small, "progress=none", "threads=1")
    with RunFolder.claim(tmp_path / "run") as folder:
        run(config, folder)
    mapping = config.to_mapping()
    mapping["model"]["init"] = str(tmp_path / "run")
    again = RunConfig.from_mapping(mapping)
    recorded = json.loads((tmp_path / "run" / "results.json").read_text())["test_acc"][-1]
    if algorithms.get(name).evaluates_features:
        build_model(again.model, Federation(config).setup.dataset.info)  # the classifier is among its weights
        assert Federation(again).evaluate().accuracy == recorded
        return
    if issubclass(algorithms.get(name), TrainsAdapters):  # on frozen weights, which are drawn by the seed
        assert Federation(again).evaluate().accuracy == recorded
        return
    test = Federation(config).setup.dataset.test
    x, y = next(test.batches(torch.arange(len(test)), batch_size=len(test)))
    with torch.no_grad():
        accuracy = (
            (build_model(again.model, Federation(config).setup.dataset.info).eval()(x).argmax(1) == y).double().mean()
        )
    assert accuracy.item() == recorded


def test_a_split_resnet_loads_into_torchvisions(configure, tmp_path: Path) -> None:
    few = [
        f"dataset.options.{key}={size}" for key, size in {"n_train": 20, "n_test": 10, "height": 8, "width": 8}.items()
    ]
    setting = ("model=resnet18", "rounds=1", "num_clients=1", "batch_size=20", "dataset=synthetic", *few)
    config = configure("algorithm=sl_single_server", *setting)
    with RunFolder.claim(tmp_path / "run") as folder:
        run(config, folder)
    state = load_file(tmp_path / "run" / MODEL_FILE)
    assert state["conv1.weight"].shape[1] == 1, "the images are grey"
    network = torchvision.models.resnet18(num_classes=10)
    network.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    network.load_state_dict(state)
