"""The projector of self-supervised methods: from features to where they are compared."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from cutlayer.models.adapting import xavier
from cutlayer.models.features import feature_width, give_features
from cutlayer.models.part_registry import WHOLE, Making, PartConfig, part
from cutlayer.runtime.ground.config import ConfigError

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo


@dataclass(frozen=True)
class ProjectorConfig(PartConfig):
    """The projector: features -> `hidden` -> `width`."""

    hidden: int = 1024
    width: int = 1024

    def __post_init__(self) -> None:
        for key in ("hidden", "width"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "an integer >= 1")


class Projector(nn.Sequential):
    """The two-layer head of MoCo v2 (Chen et al. 2020): features [b, width] -> [b, out]."""

    def __init__(self, width: int, hidden: int = 1024, out: int = 1024) -> None:
        super().__init__(OrderedDict(fc1=nn.Linear(width, hidden), relu=nn.ReLU(), fc2=nn.Linear(hidden, out)))


def _of_features(model: nn.Module, info: DatasetInfo) -> None:
    give_features(model, info.shape)


@part("projector", config=ProjectorConfig, prepare=_of_features)
def build_projector(making: Making) -> nn.Module:
    """A fresh projector; with one the model gives what its classifier takes."""
    own = making.config.part("projector", ProjectorConfig)
    projector = Projector(feature_width(making.parts[WHOLE], making.info.shape), own.hidden, own.width)
    return xavier(projector) if making.config.initialisation == "xavier" else projector
