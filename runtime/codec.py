"""Payloads as bytes: the safetensors format, which holds tensors and text and cannot run code.

The frame of a message is one safetensors file: 8 bytes of header length, a JSON header with the name, dtype, shape and
place of each tensor, then the raw data. Plain numbers travel as 0-dimensional 64-bit tensors, marked in the header's
metadata so that the receiver gets numbers back.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache

import safetensors.torch
import torch
from torch import Tensor

from runtime.boundary import Payload, Reply, Value, field_of

# In the order of the format, which lays tensors out by descending dtype, then by name.
_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


def _kind_of_number(value: bool | int | float) -> str:
    return type(value).__name__


def _as_tensor(value: Value) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return torch.tensor(int(value), dtype=torch.int64)


def _metadata(payload: Payload) -> dict[str, str]:
    return {name: _kind_of_number(value) for name, value in payload.items() if not isinstance(value, Tensor)}


def encode(payload: Payload) -> bytes:
    """The frame of a payload.

    Raises:
        ValueError: if a tensor's dtype has no place in the format.
    """
    tensors = {name: _as_tensor(value).detach().cpu().contiguous() for name, value in payload.items()}
    for name, value in tensors.items():
        if value.dtype not in _DTYPES:
            raise ValueError(f"{name}: dtype {value.dtype} cannot cross the boundary; one of {list(_DTYPES)}")
    return safetensors.torch.save(tensors, _metadata(payload) or None)


def decode(frame: bytes) -> Reply:
    """The payload of a frame, on the CPU.

    Raises:
        ValueError: if the bytes are not a frame.
    """
    try:
        tensors = safetensors.torch.load(frame)
        numbers = _read_metadata(frame)
    except Exception as error:  # safetensors raises its own type, and struct and json theirs
        raise ValueError(f"not a safetensors frame: {error}") from error
    casts = {"bool": bool, "int": int, "float": float}
    return {
        name: casts[numbers[name]](value.item()) if numbers.get(name) in casts else value
        for name, value in tensors.items()
    }


def _read_metadata(frame: bytes) -> dict[str, str]:
    length = int.from_bytes(frame[:8], "little")
    return json.loads(frame[8 : 8 + length]).get("__metadata__") or {}


def framed_bytes(payload: Payload) -> dict[str, int]:
    """Bytes of the frame by field, without encoding it; their sum is ``len(encode(payload))``.

    A field carries its data and its entries in the header; what the frame needs as a whole (header length, metadata,
    padding) is charged to the first field.
    """
    signature = tuple(
        (name, *_layout(value), None if isinstance(value, Tensor) else _kind_of_number(value))
        for name, value in payload.items()
    )
    return dict(_framed(signature))


def _layout(value: Value) -> tuple[torch.dtype, tuple[int, ...]]:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return (torch.float64 if isinstance(value, float) else torch.int64), ()


@lru_cache(maxsize=1024)
def _framed(signature: tuple[tuple[str, torch.dtype, tuple[int, ...], str | None], ...]) -> dict[str, int]:
    if not signature:
        return {}
    numbers = {name: kind for name, _, _, kind in signature if kind}
    header: dict[str, object] = {"__metadata__": numbers} if numbers else {}
    sizes: dict[str, int] = {field_of(name): 0 for name, *_ in signature}
    offset = 0
    for name, dtype, shape, _ in sorted(signature, key=lambda entry: (-_RANK[entry[1]], entry[0])):
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [offset, end]}
        sizes[field_of(name)] += _json_bytes({name: header[name]}) - 1 + end - offset
        offset = end
    total = 8 + -(-_json_bytes(header) // 8) * 8 + offset
    sizes[field_of(signature[0][0])] += total - sum(sizes.values())
    return sizes


def _json_bytes(value: object) -> int:
    return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())
