"""Payloads as bytes: the safetensors format, which holds tensors and text and cannot run code.

The frame of a message is one safetensors file, as ``cutlayer.runtime.messages.frames`` writes and reads it.
"""

from __future__ import annotations

import json
from functools import lru_cache

from cutlayer.runtime.messages.boundary import Payload, Reply, field_of
from cutlayer.runtime.messages.bounds import Limits, WireError
from cutlayer.runtime.messages.frames import DTYPES as _DTYPES
from cutlayer.runtime.messages.frames import FrameReader, Signature, numbers, pieces, places, signature

__all__ = ["_DTYPES", "decode", "encode", "framed_bytes"]


def encode(payload: Payload) -> bytes:
    """The frame of a payload.

    Raises:
        ValueError: if a name, a dtype or a number has no place in the format.
    """
    return b"".join(pieces(payload))


def decode(frame: bytes | memoryview) -> Reply:
    """The payload of a frame, on the CPU.

    Raises:
        ValueError: if the bytes are not a frame.
    """
    try:
        reader = FrameReader(len(frame), Limits(message_bytes=len(frame)))
        reader.feed(memoryview(frame))
        return reader.finish()
    except WireError as error:
        raise ValueError(f"not a safetensors frame: {error}") from error


def framed_bytes(payload: Payload) -> dict[str, int]:
    """Bytes of the frame by field, without encoding it; their sum is ``len(encode(payload))``, of an empty payload 0.

    A field carries its data and its entries in the header; what the frame needs as a whole (header length, metadata,
    padding) is charged to the first field.
    """
    return dict(_framed(signature(payload)))


@lru_cache(maxsize=1024)
def _framed(of: Signature) -> dict[str, int]:
    if not of:
        return {}
    marks = numbers(of)
    sizes: dict[str, int] = {field_of(name): 0 for name, *_ in of}
    placed = places(of)
    data = 0
    for name, entry in placed.items():
        start, data = entry["data_offsets"]
        sizes[field_of(name)] += _json_bytes({name: entry}) - 1 + data - start
    total = 8 + -(-_json_bytes(({"__metadata__": marks} if marks else {}) | placed) // 8) * 8 + data
    sizes[field_of(of[0][0])] += total - sum(sizes.values())
    return sizes


def _json_bytes(value: object) -> int:
    return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())
