"""An object that several processes have, with its large tensors and arrays once in memory that they share."""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import tempfile
from collections.abc import Sequence
from multiprocessing import reduction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.rounds.setup import Setup

# Smaller ones are pickled; their places begin at multiples of the second.
_LARGE, _ALIGNED = 4096, 64
_DEVICE = "device"


class Packed:
    """A pickled object, with its large tensors and arrays apart from it.

    Args:
        frozen: an object within it, whose large tensors nobody ever writes to.

    Raises:
        TypeError, AttributeError, pickle.PicklingError: it does not pickle.

    Attributes:
        content: the pickle. sizes: bytes of what nobody writes to, and of the rest.
    """

    def __init__(self, value: Any, frozen: Any = None) -> None:
        within = _Pickler(io.BytesIO(), frozenset())
        within.dump(frozen)
        content = io.BytesIO()
        self._pickler = _Pickler(content, within.known())
        self._pickler.dump(value)
        self.content, self.sizes = content.getvalue(), tuple(self._pickler.sizes)

    def write(self, memories: Sequence[memoryview]) -> None:
        """Write the two kinds of tensors into memory of these sizes."""
        for place, item in self._pickler.placed:
            flat: Any = item.reshape(-1)
            raw = (flat.view(torch.uint8).numpy() if isinstance(item, Tensor) else flat).view(np.uint8)
            memories[place.kind][place.offset : place.offset + len(raw)] = raw.data

    def move(self, memories: Sequence[Any]) -> None:
        """Let the object's own tensors lie in memory that was written, which frees what they took."""
        for place, tensor in self._pickler.own:
            tensor.set_(_at(memories, place))  # pyright: ignore[reportUnknownMemberType]


def unpacked(content: bytes, memories: Sequence[Any], device: torch.device | None) -> Any:
    """The object of a ``Packed``.

    Args:
        memories: that were written.
        device: where its tensors go that were on a GPU, and what stands for that GPU in it.
    """
    return _Unpickler(io.BytesIO(content), memories, device).load()


class Shared:
    """An object in memory that processes share: given to them as they start, each gets a copy of it that shares.

    What one process writes into a tensor the others do not see: it gets pages of its own. Large tensors of the object
    itself lie in the shared memory from then on, and no longer where they were. Tensors on a GPU are copied.

    Raises:
        TypeError, AttributeError, pickle.PicklingError: it does not pickle.
    """

    def __init__(self, value: Any) -> None:
        packed = Packed(value)
        self._content, self._size = packed.content, max(1, packed.sizes[1])
        self._file = _anonymous_file()
        os.ftruncate(self._file, self._size)
        packed.write((memoryview(b""), memoryview(mmap.mmap(self._file, self._size))))
        packed.move(self._map())

    def _map(self) -> tuple[bytes, mmap.mmap]:
        return b"", mmap.mmap(self._file, self._size, access=mmap.ACCESS_COPY)

    def load(self, device: torch.device | None = None) -> Any:
        """The object, see ``unpacked``."""
        return unpacked(self._content, self._map(), device)

    def __getstate__(self) -> dict[str, Any]:
        return {"content": self._content, "size": self._size, "file": reduction.DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._content, self._size, self._file = state["content"], state["size"], state["file"].detach()

    def close(self) -> None:
        """Give the memory back, once no process holds it."""
        os.close(self._file)


def not_given(setup: Setup, error: Exception) -> ConfigError:
    """What a run whose setup does not pickle ends with."""
    reason = f"1: {setup.config.title} cannot be given to other processes ({error})"
    return ConfigError("workers", setup.config.workers, reason)


class _Place(NamedTuple):
    kind: int
    offset: int
    dtype: Any
    shape: tuple[int, ...]
    elsewhere: bool


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, frozen: frozenset[int]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.sizes = [0, 0]
        self.placed: list[tuple[_Place, Tensor | np.ndarray]] = []
        self.own: list[tuple[_Place, Tensor]] = []
        self._frozen = frozen
        self._known: dict[int, _Place] = {}
        self._held: list[object] = []  # else another object may come to have the same id

    def known(self) -> frozenset[int]:
        """What was placed, by its identity."""
        return frozenset(self._known)

    def persistent_id(self, obj: Any) -> _Place | str | None:
        if isinstance(obj, torch.device):
            return _DEVICE if obj.type != "cpu" else None
        if type(obj) is Tensor:
            return self._known.get(id(obj)) or self._of_tensor(obj)
        if type(obj) is np.ndarray and obj.nbytes >= _LARGE and obj.dtype.kind in "biuf" and obj.flags.c_contiguous:
            return self._known.get(id(obj)) or self._place(obj, obj, str(obj.dtype), obj.shape, obj.nbytes, False)
        return None

    def _of_tensor(self, tensor: Tensor) -> _Place | None:
        size, elsewhere = tensor.numel() * tensor.element_size(), tensor.device.type != "cpu"
        if tensor.layout is not torch.strided or not (elsewhere or (tensor.is_contiguous() and size >= _LARGE)):
            return None
        if tensor.requires_grad or not size:
            return None
        data = tensor.cpu().contiguous()
        place = self._place(tensor, data, tensor.dtype, tuple(tensor.shape), size, elsewhere)
        if not elsewhere:
            self.own.append((place, tensor))
        return place

    def _place(self, obj: object, data: Any, dtype: Any, shape: tuple[int, ...], size: int, elsewhere: bool) -> _Place:
        kind = 0 if id(obj) in self._frozen else 1
        start = -(-self.sizes[kind] // _ALIGNED) * _ALIGNED
        place = _Place(kind, start, dtype, shape, elsewhere)
        self._known[id(obj)] = place
        self._held.append(obj)
        self.placed.append((place, data))
        self.sizes[kind] = start + size
        return place


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memories: Sequence[Any], device: torch.device | None) -> None:
        super().__init__(file)
        self._memories, self._device = memories, device
        self._made: dict[_Place, Any] = {}

    def persistent_load(self, pid: _Place | str) -> Any:
        if isinstance(pid, str):
            return self._device
        if pid not in self._made:
            found = _at(self._memories, pid)
            self._made[pid] = found.to(self._device) if pid.elsewhere else found
        return self._made[pid]


def _at(memories: Sequence[Any], place: _Place) -> Any:
    memory, count = memories[place.kind], math.prod(place.shape)
    if isinstance(place.dtype, torch.dtype):
        return torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset).view(place.shape)
    return np.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset).reshape(place.shape)


def _anonymous_file() -> int:
    """A file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("cutlayer")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
