"""Nested state (dicts, lists, tensors, numbers, text) in one safetensors file, without pickle.

Tensors are stored under their path; the rest, with the shape of the nesting, goes as JSON into the file's metadata, and
so does a sum over all of it, by which a flipped bit is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cutlayer.runtime.ground.files import DamagedError, Mark, replace_file

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


def save_state(path: Path, state: Any) -> Mark:
    """Write nested state to ``path``, durably and whole: the bytes are on the disk when this returns."""
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_strip(state, "", tensors))
    return save_tensors(path, tensors, {"state": skeleton, "sha256": _sum_of(tensors, skeleton)})


def load_state(path: Path) -> Any:
    """What ``save_state`` wrote, tensors on the CPU.

    Raises:
        DamagedError: it cannot be read, or is not what was written; files of earlier versions have no sum to compare.
    """
    try:
        tensors, metadata = open_tensors(path)
        skeleton = metadata["state"]
        if metadata.get("sha256") not in (None, _sum_of(tensors, skeleton)):
            raise DamagedError.of(path, "has other bytes than were written")
        return _restore(json.loads(skeleton), tensors)
    except DamagedError:
        raise
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedError.unreadable(path, error) from None


def _sum_of(tensors: Mapping[str, Tensor], skeleton: str) -> str:
    digest = hashlib.sha256(skeleton.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(cast(Any, tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def open_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors and the metadata of a safetensors file, on the CPU."""
    safe_open: Any = safetensors.safe_open  # untyped
    with safe_open(path, framework="pt") as file:
        return {str(name): file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file.

    Each is copied, as the format refuses tensors that share memory (tied weights, views of one buffer).
    """
    module: Any = safetensors.torch  # partly untyped
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    return module.save(copies, dict(metadata) if metadata else None)


def decode_tensors(content: bytes) -> dict[str, Tensor]:
    """What ``encode_tensors`` made bytes of, on the CPU."""
    module: Any = safetensors.torch
    return module.load(content)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Mark:
    """Write a safetensors file, whole or not at all; its bytes are on the disk when this returns."""
    content = encode_tensors(tensors, metadata)
    replace_file(path, content)
    return Mark(path.name, len(content), hashlib.sha256(content).hexdigest())
