"""The whole model, and the parts that it is divided into: halves at a cut, thirds at two, body and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from cutlayer.models.building import build_model
from cutlayer.models.folding import folding_models
from cutlayer.models.part_registry import WHOLE, Making, PartConfig, division, part
from cutlayer.models.splitting import body_and_head, split
from cutlayer.models.three import divide
from cutlayer.runtime.ground.config import ConfigError


@dataclass(frozen=True)
class ClientPartConfig(PartConfig):
    """Of the client part: with `freeze` its weights and its running statistics stay as they are at the start."""

    freeze: bool = False

    def ready(self, part: nn.Module) -> None:
        if self.freeze:
            part.requires_grad_(False).eval()

    def absent(self) -> None:
        if self.freeze:
            raise ConfigError("freeze", True, "false, or a method with a client part")


@part(WHOLE)
def whole_model(making: Making) -> nn.Module | Sequence[nn.Module]:
    """The model itself, from which all others are made; of adapters that a method folds one of each of its `ranks`."""
    if not making.options.get("folded"):
        return build_model(making.config, making.info)
    return folding_models(making.config, making.info, making.options["ranks"], making.options["alphas"])


@division("client", "server", client=ClientPartConfig)
def halves(making: Making) -> Sequence[nn.Module]:
    """Client part and server part, at the cut layer."""
    config = making.config
    return split(making.parts[WHOLE], config.cut_after, making.info.shape, compare=making.compare)


@division("client", "server", "tail", client=ClientPartConfig)
def thirds(making: Making) -> Sequence[nn.Module]:
    """Client part, server part, and at the client again the tail."""
    return divide(making.config, making.info, making.parts[WHOLE], compare=making.compare)


@division("body", "head")
def at_the_classifier(making: Making) -> Sequence[nn.Module]:
    """All of the model but its classifier, and the classifier."""
    return body_and_head(making.parts[WHOLE], making.info.shape)
