"""Processes forked from a server that has loaded the libraries, and nothing else: they start in a moment."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import tempfile
from collections.abc import Generator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

SENT_TO_ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""A terminal sends the first of these to all its processes, a cluster the others to every process of a task.

The server has to outlive its processes, whose ends it reports; multiprocessing lets it ignore Ctrl-C only once it has
loaded.
"""
# The name of a socket has 108 bytes at most, of which multiprocessing's own part takes about 40.
_LONGEST_FOLDER, _SHORT_FOLDER = 60, "/tmp"


def server(*modules: str) -> ForkServerContext:
    """A context whose processes have these modules loaded; starts the server if this process has none yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    with _ignored(*SENT_TO_ALL), _short_temporary_folder():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _short_temporary_folder() -> Generator[None]:
    """Let the server's socket lie in /tmp where the folder for temporary files has too long a name for one."""
    before = tempfile.tempdir
    if len(tempfile.gettempdir()) > _LONGEST_FOLDER:
        tempfile.tempdir = _SHORT_FOLDER
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def _ignored(*numbers: signal.Signals) -> Generator[None]:
    """Let a process started in the block ignore these signals."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # else not Python's own
                signal.signal(number, handler)
