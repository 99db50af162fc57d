"""Dataset shapes and small instances that the tests of models share."""

from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.datasets.info import DatasetInfo
from cutlayer.models import AuxiliaryConfig, ModelConfig, build_model, names
from cutlayer.models.registry import entry

SHAPES = {
    "digits": (1, 8, 8, 10),
    "mnist": (1, 28, 28, 10),
    "femnist": (1, 28, 28, 62),
    "cifar10": (3, 32, 32, 10),
    "cifar100": (3, 32, 32, 100),
    "tinyimagenet": (3, 64, 64, 200),
    "ham10000": (3, 224, 224, 7),
    "oblong": (2, 13, 21, 3),
    "pixel": (1, 1, 1, 2),
}
# Options that keep the deep networks quick: narrow, but with all of their layers.
NARROW: dict[str, dict[str, Any]] = {
    "resnet18": {"width": 8},
    "resnet50": {"width": 4},
    "resnet152": {"width": 4},
    "resnet110": {"width": 2},
    "resnet1202": {"width": 2},
    "mobilenet_cifar": {"width": 4},
    "cnn4": {"width": 16},
    "vgg": {"width": 4},
    "vit": {"hidden": 16, "heads": 2, "mlp": 32, "depth": 4},
}
MODELS = [name for name in names() if not entry(name).text]
"""Those that take images; `test_language.py` is of the others."""
DEEP = ("resnet110", "resnet1202", "resnet152")
"""They differ from the others of their kind in depth alone."""
QUICK = [name for name in MODELS if name not in DEEP]
SHALLOWER = [name for name in MODELS if name != "resnet1202"]
"""For what would take the deepest ten seconds."""


def info(name: str) -> DatasetInfo:
    channels, height, width, classes = SHAPES[name]
    return DatasetInfo(name, channels, height, width, classes, tuple(str(i) for i in range(classes)))


def config(name: str, *, narrow: bool = True, size: str = "default", cut: str | None = None) -> ModelConfig:
    options = NARROW.get(name, {}) if narrow else {}
    return ModelConfig(name, cut=cut, parts={"auxiliary": AuxiliaryConfig(size)}, options=options)


def built(name: str, dataset: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = build_model(config(name), info(dataset))
    assert isinstance(model, nn.Sequential)
    return model


def images(dataset: str, batch: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *info(dataset).shape, generator=generator, device="cpu")


def megabytes(module: nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values()) / 1e6


def settle(model: nn.Module) -> None:
    """Let BatchNorm take its statistics from the next training batch alone.

    With the statistics that it starts from, the deepest networks overflow in evaluation.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
