"""Weights that a model has under several names, as an embedding and the head behind it: its state has them once."""

from __future__ import annotations

from typing import Any

from torch import nn


def further_names(model: nn.Module) -> dict[str, str]:
    """The further names of parameters, each with the first one of the same parameter."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: kept for name, each in named if (kept := first.setdefault(id(each), name)) != name}


def state_once(model: nn.Module) -> None:
    """Let a model's state have tied weights under their first name alone, and be loaded from such a state."""
    if further_names(model):
        model.register_state_dict_post_hook(_leave_out)
        model.register_load_state_dict_pre_hook(_put_in)


def _leave_out(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in further_names(model):
        state.pop(f"{prefix}{name}", None)


def _put_in(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, first in further_names(model).items():
        if f"{prefix}{first}" in state:
            state[f"{prefix}{name}"] = state[f"{prefix}{first}"]
