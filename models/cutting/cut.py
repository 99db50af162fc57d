"""Cuts a module in parts: records a pass through it, builds the parts from that, and compares them with the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from cutlayer.models.cutting.parts import Part
from cutlayer.models.cutting.recording import bound
from cutlayer.models.cutting.splitter import CutError, build_parts, record_modes
from cutlayer.models.cutting.together import known_recording
from cutlayer.models.cutting.verify import verify


def split_module(
    model: nn.Module, cuts: Sequence[str], inputs: Mapping[str, Any], *, untie: bool = False, check: bool = True
) -> list[Part]:
    """Cut ``model`` at the end of each module in ``cuts``: len(cuts) + 1 parts, made of its own tensors.

    ``parts[1](parts[0](x))`` and so on is ``model(x)``: outputs and gradients, in training and in evaluation mode, for
    any batch size. What an earlier layer gave and a later part uses (a skip connection) crosses as a further tensor.

    Args:
        inputs: an example of the model's inputs by name, two or more samples; constants stay what they are.
        untie: a tensor that two parts own is copied, and each has its own from then on.
        check: compare the parts with the whole model, on other weights and inputs.

    Raises:
        CutError: it cannot be cut there, and why.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    for cut in cuts:
        if not cut or cut not in named:
            raise CutError(cut, "the model has no such module")
    inputs = bound(model, (), inputs)
    recording = known_recording(cuts) or record_modes(model, cuts, inputs)
    parts = build_parts(model, recording, untie=untie)
    for part in parts:
        part.train(model.training)
    if check:
        verify(model, recording, inputs)
    return parts
