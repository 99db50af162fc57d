"""Nested state (dicts, lists, tensors, numbers, text) in one safetensors file, without pickle.

Tensors are stored under their path; the rest, with the shape of the nesting, goes as JSON into the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from torch import Tensor

from runtime.files import sync_file

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_ITEMS = "__items__"


def _strip(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, dict):
        pairs = [(key, _strip(item, f"{path}/{key}", tensors)) for key, item in cast(dict[Any, Any], value).items()]
        if all(isinstance(key, str) for key, _ in pairs):
            return dict(pairs)
        return {_ITEMS: pairs}
    if isinstance(value, list | tuple):
        items = [_strip(item, f"{path}/{index}", tensors) for index, item in enumerate(cast(list[Any], value))]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: cannot store a {type(value).__name__}")


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restore(item, tensors) for item in cast(list[Any], value)]
    if not isinstance(value, dict):
        return value
    value = cast(dict[str, Any], value)
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_restore(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {key: _restore(item, tensors) for key, item in value[_ITEMS]}
    return {key: _restore(item, tensors) for key, item in value.items()}


def save_state(path: Path, state: Any) -> None:
    """Write nested state to ``path``, durably: the bytes are on the disk when this returns."""
    tensors: dict[str, Tensor] = {}
    skeleton = _strip(state, "", tensors)
    save_tensors(path, tensors, {"state": json.dumps(skeleton)})


def load_state(path: Path) -> Any:
    """What ``save_state`` wrote, tensors on the CPU."""
    tensors, metadata = open_tensors(path)
    return _restore(json.loads(metadata["state"]), tensors)


def open_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors and the metadata of a safetensors file, on the CPU."""
    safe_open: Any = safetensors.safe_open  # untyped
    with safe_open(path, framework="pt") as file:
        return {str(name): file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; its bytes are on the disk when this returns.

    Each tensor is copied, as the format refuses tensors that share memory (tied weights, views of one buffer).
    """
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    module: Any = safetensors.torch  # partly untyped
    module.save_file(copies, path, dict(metadata) if metadata else None)
    sync_file(path)
