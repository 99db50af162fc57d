"""How this process computes: with how many threads, with the same bits each time."""

from __future__ import annotations

import os
from typing import Literal

import torch

from cutlayer.runtime.ground.allocator import keep_freed_memory

# Below this many parameters the work of one operation is too little to divide, and threads that wait for each other on
# a busy machine cost many times what they save on an idle one.
SMALL_MODEL = 1_000_000
_ALL_THREADS = torch.get_num_threads()


def prepare_process(device: torch.device) -> None:
    """Ask for kernels that give the same bits each time; on a CPU, where all do, for memory that is used again."""
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with this only
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def set_threads(threads: int | Literal["auto"], device: torch.device, parameters: int, share: int = 1) -> None:
    """Compute with so many threads; ``auto``: one for a small model on a CPU, else all, or this process's share.

    Args:
        parameters: of the model. share: processes that compute side by side with as many threads each.
    """
    automatic = 1 if device.type == "cpu" and parameters < SMALL_MODEL else max(1, _ALL_THREADS // share)
    # Set in either case: an earlier job of this process may have left another number.
    torch.set_num_threads(automatic if threads == "auto" else threads)
