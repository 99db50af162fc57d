"""Frames: a payload as one safetensors file, written from the tensors' own memory and read as its bytes come in.

A frame is 8 bytes of header length, a JSON header with the name, dtype, shape and place of each tensor, then the raw
data. Plain numbers are 0-dimensional 64-bit tensors, marked in the header's metadata. The data lie as the format wants
them, by descending dtype, then by name; the header lists the tensors in the order of the payload, which the receiver
gets back.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from cutlayer.runtime.messages.boundary import Payload, Reply, Value
from cutlayer.runtime.messages.bounds import MIB, Limits, WireError, read_object, shown

# In the order of the format, which lays tensors out by descending dtype, then by name.
DTYPES: dict[torch.dtype, str] = {
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
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_NUMBERS = {"bool": torch.int64, "int": torch.int64, "float": torch.float64}
_METADATA = "__metadata__"
_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_NAME_BYTES = 512
_LARGEST = 2**63  # no tensor has as many bytes

_WHOLE = 64 * MIB
"""A tensor of up to so many bytes is made when its first byte is there; a larger one grows with what has come."""

Signature: TypeAlias = tuple[tuple[str, torch.dtype, tuple[int, ...], str | None], ...]


def signature(payload: Payload) -> Signature:
    """All of a payload but its data: name, dtype, shape and, of a plain number, its kind."""
    return tuple((name, *_layout(value), _kind(value)) for name, value in payload.items())


def _layout(value: Value) -> tuple[torch.dtype, tuple[int, ...]]:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return (torch.float64 if isinstance(value, float) else torch.int64), ()


def _kind(value: Value) -> str | None:
    if isinstance(value, Tensor):
        return None
    return "bool" if isinstance(value, bool) else "float" if isinstance(value, float) else "int"


def numbers(of: Signature) -> dict[str, str]:
    """The header's metadata: the kind of each plain number."""
    return {name: kind for name, _, _, kind in of if kind}


def places(of: Signature) -> dict[str, dict[str, Any]]:
    """The header's entry of each tensor, in the order of the data."""
    made: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, dtype, shape, _ in sorted(of, key=lambda entry: (-_RANK[entry[1]], entry[0])):
        end = offset + math.prod(shape) * dtype.itemsize
        made[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    return made


@lru_cache(maxsize=64)
def _header(of: Signature) -> tuple[bytes, tuple[str, ...]]:
    """The first bytes of a frame, up to its data, and the names in the order of the data."""
    for name, dtype, _, _ in of:
        if dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {dtype} cannot cross the boundary; one of {list(DTYPES)}")
        if not name or name == _METADATA or len(name.encode()) > _NAME_BYTES:
            raise ValueError(f"{name!r} is no name that crosses the boundary: 1 to {_NAME_BYTES} bytes")
    placed = places(of)
    marks = numbers(of)
    content = ({_METADATA: marks} if marks else {}) | {name: placed[name] for name, *_ in of}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, tuple(placed)


def pieces(payload: Payload) -> list[bytes | memoryview]:
    """The frame of a payload in pieces: its header, then the memory of each tensor, uncopied.

    Raises:
        ValueError: if a name, a dtype or a number has no place in the format.
    """
    header, order = _header(signature(payload))
    return [header, *(_bytes_of(name, payload[name]) for name in order)]


def _bytes_of(name: str, value: Value) -> bytes | memoryview:
    if isinstance(value, Tensor):
        return _memory(value.detach().cpu().resolve_neg().contiguous())
    try:
        return struct.pack("<d" if isinstance(value, float) else "<q", value)
    except struct.error:
        raise ValueError(f"{name}: {value} does not fit in 64 bits") from None


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to read and to write."""
    # By strides: the stride of a dimension of size 1 may be anything, and `view` keeps it.
    flat: Any = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return memoryview(flat.numpy())


def chunks(parts: Iterable[bytes | memoryview], size: int, lead: bytes = b"") -> Iterator[bytes]:
    """The bytes of all parts, joined in chunks of ``size`` bytes; the first has ``lead`` before them.

    The last chunk may be shorter; of no parts there is the lead alone, if there is one.
    """
    taken: list[bytes | memoryview] = [lead] if lead else []
    room = size
    for part in parts:
        rest = memoryview(part)
        while rest:
            taken.append(rest[:room])
            room -= len(taken[-1])
            rest = rest[len(taken[-1]) :]
            if not room:
                yield b"".join(taken)
                taken, room = [], size
    if taken:
        yield b"".join(taken)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor that a header announces; its data lie at ``start`` up to ``end`` bytes behind the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    number: str | None

    @property
    def size(self) -> int:
        return self.end - self.start


class FrameReader:
    """One frame on its way in: its bytes go in as they come, and each lands where it stays.

    The header is checked in full before there is memory for any tensor. Memory is taken as data come: at no time more
    than twice what is there and 64 MiB.
    """

    def __init__(self, length: int, limits: Limits) -> None:
        """``length``: bytes of the whole frame.

        Raises:
            WireError: as ``feed``.
        """
        if length < 8 or length > limits.message_bytes:
            raise WireError(f"a frame of {length} bytes; 8 to {limits.message_bytes} are accepted")
        self._length, self._limits = length, limits
        self._start = bytearray()  # the header, and its length
        self._entries: list[_Entry] | None = None
        self._coming: list[_Entry] = []  # in descending order of the data: the last comes next
        self._tensors: dict[str, Tensor] = {}
        self._room = memoryview(b"")  # of the tensor whose data come now
        self._filled = 0

    def feed(self, data: memoryview) -> None:
        """Take in the next bytes.

        Raises:
            WireError: if they are not those of a frame within the limits.
        """
        if self._entries is None:
            data = self._feed_header(data)
        while data:
            if not self._coming:
                raise WireError(f"{len(data)} bytes behind the end of a frame")
            data = self._feed_tensor(self._coming[-1], data)

    def _feed_header(self, data: memoryview) -> memoryview:
        if len(self._start) < 8:
            missing = 8 - len(self._start)
            self._start += data[:missing]
            data = data[missing:]
            if len(self._start) < 8:
                return data
        length = int.from_bytes(self._start[:8], "little")
        if length > min(self._limits.header_bytes, self._length - 8):
            raise WireError(
                f"a header of {length} bytes in a frame of {self._length}; {self._limits.header_bytes} are accepted"
            )
        missing = 8 + length - len(self._start)
        self._start += data[:missing]
        if len(self._start) == 8 + length:
            self._entries = _read_header(self._start[8:], self._length - 8 - length, self._limits)
            self._coming = sorted((entry for entry in self._entries if entry.size), key=lambda entry: -entry.start)
            self._start.clear()
        return data[missing:]

    def _feed_tensor(self, entry: _Entry, data: memoryview) -> memoryview:
        if self._filled == len(self._room):
            self._make_room(entry)
        count = min(len(data), len(self._room) - self._filled)
        self._room[self._filled : self._filled + count] = data[:count]
        self._filled += count
        if self._filled == entry.size:
            self._coming.pop()
            self._room, self._filled = memoryview(b""), 0
        return data[count:]

    def _make_room(self, entry: _Entry) -> None:
        size = max(_WHOLE, 2 * self._filled)
        whole = size >= entry.size
        made = _empty(entry.shape, entry.dtype) if whole else _empty((size,), torch.uint8)
        room = _memory(made)
        room[: self._filled] = self._room
        self._room = room
        if whole:
            self._tensors[entry.name] = made

    def finish(self) -> Reply:
        """The payload, once all bytes of the frame are in.

        Raises:
            WireError: if a number is none of its kind, or data are missing.
        """
        if self._entries is None or self._coming:
            raise WireError("a frame ends before its data do")
        return {entry.name: self._value(entry) for entry in self._entries}

    def _value(self, entry: _Entry) -> Value:
        tensor = self._tensors[entry.name] if entry.size else _empty(entry.shape, entry.dtype)
        if entry.dtype == torch.bool and entry.size and tensor.view(torch.uint8).max() > 1:  # masks may count its bytes
            raise WireError(f"{shown(entry.name)} has bools that are neither 0 nor 1")
        if entry.number is None:
            return tensor
        value = tensor.item()
        if entry.number != "bool":
            return value
        if value not in (0, 1):
            raise WireError(f"{shown(entry.name)} is a bool of value {value}")
        return bool(value)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except (RuntimeError, MemoryError):
        raise WireError(f"no memory for a tensor of shape {shown(shape)}") from None


def _read_header(raw: bytearray, data: int, limits: Limits) -> list[_Entry]:
    """The tensors of a header, whose data have ``data`` bytes in all; in the order in which it lists them."""
    if not raw.startswith(b"{"):
        raise WireError("a header does not begin with a brace")
    # Before anything is made of it, as a few bytes of JSON are many bytes of Python objects. Each tensor has two lists.
    most = {b"{": limits.tensors + 2, b"[": 2 * limits.tensors, b",": (limits.dimensions + 5) * (limits.tensors + 1)}
    if any(raw.count(sign) > count for sign, count in most.items()):
        raise WireError(f"a header of more than {limits.tensors} tensors, or of tensors with too many dimensions")
    content = read_object(raw, "a header")
    marks = _read_marks(content.pop(_METADATA, {}), content)
    entries = [_read_entry(name, entry, marks.get(name), limits) for name, entry in content.items()]
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != end:
            raise WireError(f"the data of {shown(entry.name)} begin at {shown(entry.start)}, not at {end}")
        end = entry.end
    if end != data:
        raise WireError(f"{data} bytes of data, where the header says {end}")
    return entries


def _read_marks(marks: Any, content: dict[str, Any]) -> dict[str, str]:
    if not isinstance(marks, dict):
        raise WireError("metadata are not an object")
    for name, kind in cast(dict[str, Any], marks).items():
        if name not in content or not isinstance(kind, str) or kind not in _NUMBERS:
            raise WireError(f"metadata {shown(name)} mark no number: {shown(kind)}")
    return cast(dict[str, str], marks)


def _read_entry(name: str, entry: Any, number: str | None, limits: Limits) -> _Entry:
    if not 0 < len(name.encode()) <= _NAME_BYTES:
        raise WireError(f"a tensor's name of {len(name.encode())} bytes; 1 to {_NAME_BYTES} are accepted")
    if not isinstance(entry, dict) or cast(dict[str, Any], entry).keys() != _KEYS:
        raise WireError(f"{shown(name)} has no dtype, shape and data_offsets, or more than these")
    fields = cast(dict[str, Any], entry)
    dtype = _BY_NAME.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise WireError(f"{shown(name)} is of dtype {shown(fields['dtype'])}; one of {', '.join(_BY_NAME)}")
    shape, place = _sizes(name, fields["shape"]), _sizes(name, fields["data_offsets"])
    if len(shape) > limits.dimensions:
        raise WireError(f"{shown(name)} has {len(shape)} dimensions; {limits.dimensions} are accepted")
    # A size of zero hides the others from the product, but not from whoever computes strides.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= _LARGEST:
        raise WireError(f"{shown(name)} of shape {shown(shape)} is larger than any tensor")
    if len(place) != 2 or place[1] - place[0] != math.prod(shape) * dtype.itemsize:
        raise WireError(f"{shown(name)} of shape {shown(shape)} does not fill its data_offsets {shown(place)}")
    if number is not None and (shape or dtype != _NUMBERS[number]):
        raise WireError(f"{shown(name)} is marked as a number, but has shape {shown(shape)} and dtype {dtype}")
    return _Entry(name, dtype, shape, place[0], place[1], number)


def _sizes(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise WireError(f"{shown(name)} has a shape or data_offsets that is no list: {shown(values)}")
    sizes = cast(list[Any], values)
    if any(type(size) is not int or size < 0 for size in sizes):
        raise WireError(f"{shown(name)} has a shape or data_offsets that is no list of sizes: {shown(sizes)}")
    return tuple(sizes)
