"""What stands in for a GPU's graphs on a processor: operations on fixed memory, done again by each replay."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
READING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
# Its schema does not say that it moves running statistics.
NORMALISING = {torch.ops.aten.native_batch_norm.default}


class Tape(TorchDispatchMode):
    """The operations of some work, with the tensors and numbers that they were given.

    As when a CUDA graph is recorded, a value that is read is an error, and what was written into is as it was before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any], list[Any]]] = []
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READING:
            raise RuntimeError(f"{func} reads a value while work is recorded")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if func in NORMALISING or (argument.alias_info is not None and argument.alias_info.is_write):
                self._keep(value)
        found = func(*args, **kwargs)
        copied = [[*each] if isinstance(each, list) else each for each in args]
        self.calls.append((func, copied, kwargs, tree_leaves(found)))
        return found

    def _keep(self, value: Any) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def restore(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)

    def replay(self) -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, found in self.calls:
                for old, new in zip(found, tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class TapeStream:
    """As `CudaStream`. Class attributes count what was recorded and replayed, and the passes of parts among it."""

    recorded, replayed, passes = 0, 0, 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def run(self, work: Callable[[], T]) -> T:
        return work()

    def record(self, work: Callable[[], T], *, large: bool = False) -> tuple[Callable[[], None], T]:
        tape = Tape()
        try:
            with tape:
                found = work()
        finally:
            tape.restore()
        type(self).recorded += 1
        type(self).passes += 2 * large  # a forward pass; its backward pass follows

        def replay() -> None:
            type(self).replayed += 1
            tape.replay()

        return replay, found
