"""How this process computes: with how many threads, with the same bits each time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from typing import Any, Literal, NamedTuple

import torch
import torch.utils.deterministic

from cutlayer.runtime.ground.allocator import keep_freed_memory

# Below this many parameters the work of one operation is too little to divide, and threads that wait for each other on
# a busy machine cost many times what they save on an idle one.
SMALL_MODEL = 1_000_000
_ALL_THREADS = torch.get_num_threads()


class Arithmetic(NamedTuple):
    """What a GPU's kernels may do.

    Attributes:
        deterministic: they have to give the same bits each time; else each layer takes the fastest that is found.
        tf32: products and convolutions of float32 may round what they multiply to 10 bits of mantissa.
    """

    deterministic: bool = True
    tf32: bool = False


def prepare_process(device: torch.device, arithmetic: Arithmetic | None = None) -> None:
    """Ask for the kernels of an arithmetic; on a CPU, which has one only, for memory that is used again."""
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        deterministic, tf32 = arithmetic or Arithmetic()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with this only
        torch.backends.cudnn.benchmark = not deterministic
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        # A kernel more for each new tensor, of use only to a program that reads memory that it has not written.
        _set(torch.utils.deterministic, "fill_uninitialized_memory", False)
        _allow_tf32(tf32)


@contextlib.contextmanager
def settings_kept() -> Generator[None]:
    """Put back at the block's end what `prepare_process` and `set_threads` set, for a process that is somebody's own.

    What the allocator keeps stays, as the C library does not say what it was.
    """
    variable = "CUBLAS_WORKSPACE_CONFIG"
    threads, workspace = torch.get_num_threads(), os.environ.get(variable)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    switches: list[tuple[Any, str]] = [(torch.backends.cudnn, "benchmark")]
    switches += [(torch.utils.deterministic, "fill_uninitialized_memory")]
    switches += [(operations, "fp32_precision") for operations in _in_float32()]
    before = [getattr(module, switch) for module, switch in switches]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        for (module, switch), value in zip(switches, before, strict=True):
            if getattr(module, switch) != value:
                _set(module, switch, value)
        if workspace is None:
            os.environ.pop(variable, None)


def _in_float32() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn


def _allow_tf32(allowed: bool) -> None:
    """Torch allows it in convolutions unless it is told not to, and in products if it is told to."""
    for operations in _in_float32():
        _set(operations, "fp32_precision", "tf32" if allowed else "ieee")


def _set(module: Any, switch: str, value: object) -> None:
    """Set what torch has as a property of a module."""
    setattr(module, switch, value)


def set_threads(threads: int | Literal["auto"], device: torch.device, parameters: int, share: int = 1) -> None:
    """Compute with so many threads; ``auto``: one for a small model on a CPU, else all, or this process's share.

    Args:
        parameters: of the model. share: processes that compute side by side with as many threads each.
    """
    automatic = 1 if device.type == "cpu" and parameters < SMALL_MODEL else max(1, _ALL_THREADS // share)
    # Set in either case: an earlier job of this process may have left another number.
    torch.set_num_threads(automatic if threads == "auto" else threads)
