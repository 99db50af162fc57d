"""A program's standard streams, which may be closed, full or broken: what it does is not lost for what it says.

The results of a run are its files. Whether anybody reads what it prints, through `| head` or on a terminal that is
gone, changes neither them nor its exit status.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from cutlayer.runtime.ground.text import error_text, plain_logs, print_errors

_NARROWEST, _WIDEST = 20, 1000
"""Columns and lines of a terminal that COLUMNS and LINES are believed."""


class _Output(io.FileIO):
    """A file descriptor that takes everything: what cannot be written is dropped."""

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
        except OSError:  # the reader is gone, the disk is full, the terminal is closed
            return size
        return size if written is None else written  # None: a pipe that is full and does not wait


def stand_without_streams() -> None:
    """Make this process's standard streams usable whatever they are; to be called before it opens anything.

    A closed descriptor is opened on the null device: otherwise the next file that is opened gets its number, and
    whatever is printed. Text that the stream's encoding does not have is written with backslashes. Logs are plain.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _open_null(descriptor)
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]: so it is where it was closed
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream: Any = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):  # not what somebody else has put there
            setattr(sys, name, _tolerant(stream, descriptor))
    for name in ("COLUMNS", "LINES"):
        size = os.environ.get(name, "")
        if size and not (size.isdecimal() and len(size) < 5 and _NARROWEST <= int(size) <= _WIDEST):
            del os.environ[name]
    plain_logs()
    sys.excepthook = lambda _kind, error, _trace: print_errors(*error_text(error).split("\n"))


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a program's main function with streams that cannot stop it, and leave with its exit status."""
    stand_without_streams()
    sys.exit(main())


def _open_null(descriptor: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
    os.set_inheritable(descriptor, True)


def _tolerant(stream: Any, descriptor: int) -> io.TextIOWrapper:
    encoding = "utf-8"
    if stream is not None:
        encoding = stream.encoding
        with contextlib.suppress(OSError):
            stream.flush()
    raw = _Output(descriptor, "w", closefd=False)
    # Lines are written as they come, to a file or a pipe too: whoever follows a run sees where it is.
    text = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=True)
    text.mode = "w"  # pyright: ignore[reportAttributeAccessIssue]
    return text
