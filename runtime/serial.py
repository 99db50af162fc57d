"""Nested state (dicts, lists, tensors, numbers, text) in one safetensors file, without pickle.

Tensors are stored under their path; the rest, with the shape of the nesting, goes as JSON into the file's metadata.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from runtime.codec import open_tensors

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_ITEMS = "__items__"


def _strip(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # A copy: the file format refuses tensors that share memory (tied weights, views of one buffer).
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, dict):
        pairs = [[key, _strip(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        return dict(pairs) if all(isinstance(key, str) for key, _ in pairs) else {_ITEMS: pairs}
    if isinstance(value, list | tuple):
        items = [_strip(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: cannot store a {type(value).__name__}")


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restore(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
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
    save_file(tensors, path, {"state": json.dumps(skeleton)})
    sync_file(path)


def load_state(path: Path) -> Any:
    """What ``save_state`` wrote, tensors on the CPU."""
    tensors, metadata = open_tensors(str(path))
    return _restore(json.loads(metadata["state"]), tensors)


def replace_file(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees either the old content or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and new files in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
