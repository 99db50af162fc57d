"""Starting from saved weights: what fits loads exactly, what does not is reported in one line."""

from pathlib import Path

import pytest
import torch
from model_cases import built, info
from safetensors.torch import save_file

from cutlayer.models import ModelConfig, build_model, check_model
from cutlayer.runtime.ground.config import ConfigError


def _saved(folder: Path, **changes: torch.Tensor | None) -> Path:
    """resnet20's weights in `folder`, with tensors replaced, added (`__` for a dot) or, where None, left out."""
    state = built("resnet20", "cifar10", seed=7).state_dict()
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def _error(path: Path) -> str:
    texts: list[str] = []
    for use in (build_model, check_model):
        with pytest.raises(ConfigError) as error:
            use(ModelConfig("resnet20", init=path), info("cifar10"))
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert "\n" not in texts[0]
    assert texts[0].startswith(f"model.init={path}: expected"[:60])
    return texts[0]


@pytest.mark.parametrize("whole_folder", [True, False])
def test_saved_weights_come_back(tmp_path: Path, whole_folder: bool) -> None:
    file = _saved(tmp_path)
    config = ModelConfig("resnet20", init=tmp_path if whole_folder else file)
    check_model(config, info("cifar10"))
    loaded = build_model(config, info("cifar10")).state_dict()
    expected = built("resnet20", "cifar10", seed=7).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_loading_leaves_the_generator_as_fresh_weights_do(tmp_path: Path) -> None:
    file, draws = _saved(tmp_path), []
    for init in (None, file):
        torch.manual_seed(11)
        build_model(ModelConfig("resnet20", init=init), info("cifar10"))
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    text = _error(_saved(tmp_path, fc__weight=torch.zeros(100, 64), fc__bias=None, extra=torch.zeros(1)))
    assert "missing fc.bias; unexpected extra; wrong shape fc.weight [100, 64] instead of [10, 64]" in text


def test_only_the_first_of_many_are_named(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "model.safetensors")
    text = _error(tmp_path / "model.safetensors")
    assert "missing bn1.weight, bn1.bias, bn1.running_mean and " in text
    assert "layer3" not in text


def test_files_that_are_not_there_or_not_safetensors(tmp_path: Path) -> None:
    assert "found none" in _error(tmp_path / "nothing.safetensors")
    assert "model.safetensors" in _error(tmp_path)
    (tmp_path / "text.safetensors").write_text("no tensors in here")
    assert "a readable safetensors file" in _error(tmp_path / "text.safetensors")
