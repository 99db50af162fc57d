"""The attacker that a method trains against: it makes images of what the client part gives."""

from __future__ import annotations

from torch import nn

from cutlayer.models.decoder import WIDTH, build_attacker
from cutlayer.models.part_registry import Making, part


@part("attacker", needs=("client",))
def _attacker(making: Making) -> nn.Module:
    """The method says the `width`, by its `part_options`."""
    return build_attacker(making.info, making.parts["client"], making.options.get("width", WIDTH))
