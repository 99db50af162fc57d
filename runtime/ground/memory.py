"""Memory that runs out: an error of its own in every library, and a process that is killed without a word."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import traceback
from collections.abc import Generator
from pathlib import Path

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError

# What torch, CUDA's libraries, oneDNN, C++ and the system say of it in errors that are of no type of their own; a
# thread needs memory for its stack.
_SAID = re.compile(
    "can't allocate memory|cannot allocate memory|out of memory|ALLOC_FAILED|bad_alloc|could not create a primitive$"
    "|can't start new thread",
    re.IGNORECASE,
)
_ASKED = re.compile(r"allocate ([\d.]+ ?[KMGTPE]?i?(?:B|bytes))\b")
_LESS = "a smaller model, batch_size or eval_batch_size, or dataset.storage=stream"
_WHO_GOES = Path("/proc/self/oom_score_adj")
_COUNTER, _LINE = Path("/proc/vmstat"), "oom_kill "


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory, of the machine or of a GPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_SAID.search(str(error))))


@contextlib.contextmanager
def memory_told(where: str = "", key: str = "", value: object = NO_VALUE, less: str = "") -> Generator[None]:
    """Say in one line that memory ran out in the block, and what needs less of it. Also for a whole function.

    Args:
        where: this was, such as "memory ran out in the round of client 3". key, value, less: what is to be changed.

    Raises:
        ConfigError: it did.
    """
    try:
        yield
        return
    except Exception as error:
        if not ran_out(error):
            raise
        asked = _ASKED.search(str(error))
        # What the failed block held is wanted: the error itself would keep it.
        traceback.clear_frames(error.__traceback__)
    amount = f" (asked for {asked[1]})" if asked else ""
    if key:
        raise ConfigError(key, value, f"{less}: {where}{amount}")
    raise ConfigError("memory", NO_VALUE, f"ran out{amount}; {_LESS} needs less")


NO_MEMORY = errno.ENOMEM
"""The exit status of a process that ended as its memory ran out."""


@contextlib.contextmanager
def ending_without_memory() -> Generator[None]:
    """End this process, in whatever thread, where memory runs out in the block."""
    try:
        yield
    except Exception as error:
        if ran_out(error):
            os._exit(NO_MEMORY)
        raise


def be_first_to_go() -> None:
    """Let the system, where the machine's memory runs out, kill this process before those that hold results."""
    with contextlib.suppress(OSError):  # another system
        _WHO_GOES.write_text("500", encoding="ascii")


def killed_for_memory() -> int | None:
    """How many processes of this machine the system has killed since its start for want of memory, None if unknown."""
    try:
        lines = _COUNTER.read_text(encoding="ascii").splitlines()
        return next((int(line.removeprefix(_LINE)) for line in lines if line.startswith(_LINE)), None)
    except (OSError, ValueError):
        return None
