"""An object that several processes have, with its large tensors and arrays once in memory that they share."""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import tempfile
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Smaller ones are pickled; their places begin at multiples of the second.
_LARGE, _ALIGNED = 4096, 64
_DEVICE = "device"


class Shared:
    """A pickled object, to be given to processes as they start; each gets a copy of it that shares its memory.

    What one process writes into a tensor the others do not see: it gets pages of its own. Large tensors of the object
    itself lie in the shared memory from then on, and no longer where they were. Tensors on a GPU are copied.

    Raises:
        TypeError, AttributeError, pickle.PicklingError: it does not pickle.
    """

    def __init__(self, value: Any) -> None:
        content = io.BytesIO()
        pickler = _Pickler(content)
        pickler.dump(value)
        self._content, self._size = content.getvalue(), pickler.size
        self._file = _anonymous_file()
        os.ftruncate(self._file, max(1, self._size))
        written = memoryview(mmap.mmap(self._file, max(1, self._size)))
        for (_, offset, *_), item in pickler.placed:
            flat: Any = item.reshape(-1)
            raw = (flat.view(torch.uint8).numpy() if isinstance(item, Tensor) else flat).view(np.uint8)
            written[offset : offset + len(raw)] = raw.data
        self._move(pickler.own)

    def _move(self, tensors: list[tuple[Any, Tensor]]) -> None:
        """Let tensors lie in the shared memory, which frees what they took."""
        memory = self._map()
        for place, tensor in tensors:
            tensor.set_(_at(memory, place))  # pyright: ignore[reportUnknownMemberType]

    def _map(self) -> mmap.mmap:
        return mmap.mmap(self._file, max(1, self._size), access=mmap.ACCESS_COPY)

    def load(self, device: torch.device | None = None) -> Any:
        """The object.

        Args:
            device: where its tensors go that were on a GPU, and what stands for that GPU in it.
        """
        return _Unpickler(io.BytesIO(self._content), self._map(), device).load()

    def __getstate__(self) -> dict[str, Any]:
        return {"content": self._content, "size": self._size, "file": reduction.DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._content, self._size, self._file = state["content"], state["size"], state["file"].detach()

    def close(self) -> None:
        """Give the memory back, once no process holds it."""
        os.close(self._file)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.size = 0
        self.placed: list[tuple[Any, Tensor | np.ndarray]] = []
        self.own: list[tuple[Any, Tensor]] = []
        self._known: dict[int, Any] = {}
        self._held: list[object] = []  # else another object may come to have the same id

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.device):
            return (_DEVICE,) if obj.type != "cpu" else None
        if type(obj) is Tensor:
            return self._known.get(id(obj)) or self._of_tensor(obj)
        if type(obj) is np.ndarray and obj.nbytes >= _LARGE and obj.dtype.kind in "biuf" and obj.flags.c_contiguous:
            return self._known.get(id(obj)) or self._place(obj, obj, str(obj.dtype), obj.shape, obj.nbytes, False)
        return None

    def _of_tensor(self, tensor: Tensor) -> Any:
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

    def _place(self, obj: object, data: Any, dtype: Any, shape: tuple[int, ...], size: int, elsewhere: bool) -> Any:
        self.size = -(-self.size // _ALIGNED) * _ALIGNED
        place = self._known[id(obj)] = ("memory", self.size, dtype, shape, elsewhere)
        self._held.append(obj)
        self.placed.append((place, data))
        self.size += size
        return place


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, memory: mmap.mmap, device: torch.device | None) -> None:
        super().__init__(file)
        self._memory, self._device = memory, device
        self._made: dict[int, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == _DEVICE:
            return self._device
        _, offset, _, _, elsewhere = pid
        if offset not in self._made:
            found = _at(self._memory, pid)
            self._made[offset] = found.to(self._device) if elsewhere else found
        return self._made[offset]


def _at(memory: mmap.mmap, place: Any) -> Any:
    _, offset, dtype, shape, _ = place
    count = math.prod(shape)
    if isinstance(dtype, torch.dtype):
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
    return np.frombuffer(memory, dtype=dtype, count=count, offset=offset).reshape(shape)


def _anonymous_file() -> int:
    """A file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("cutlayer")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
