"""Work of a device that is recorded once and then replayed, as the same kernels on the same memory: CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
Replay = Callable[[], None]


class RecordingStream(Protocol):
    """Where work is recorded. Recordings of one stream share memory, so that they are replayed one after another."""

    def run(self, work: Callable[[], T]) -> T:
        """Compute something where recordings are made: libraries choose kernels and take memory for each stream."""
        ...

    def record(self, work: Callable[[], T], *, large: bool = False) -> tuple[Replay, T]:
        """What computes the work anew, and what the work gave, which each replay writes over.

        Recorded work is not computed, so that what it would write into is as before.

        Args:
            large: the work takes much memory; what is kept of freed memory is given back before.
        """
        ...


class CudaStream:
    """Records CUDA graphs.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._first: Any = None  # a graph that is kept, as the memory of all goes with the last

    def run(self, work: Callable[[], T]) -> T:
        """See `RecordingStream`."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return work()
        finally:
            current.wait_stream(self._stream)

    def record(self, work: Callable[[], T], *, large: bool = False) -> tuple[Replay, T]:
        """See `RecordingStream`.

        Not by ``torch.cuda.graph``: where a capture fails, that leaves this stream the current one, and its error hides
        what the work raised.
        """
        graph: Any = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._stream.device)
        if large:
            torch.cuda.empty_cache()
        pool = {} if self._first is None else {"pool": self._first.pool()}
        with torch.cuda.stream(self._stream), _nothing_collected():
            # Other threads, which read images ahead, may go on meanwhile.
            graph.capture_begin(**pool, capture_error_mode="thread_local")
            try:
                found = work()
            except BaseException:
                with suppress(Exception):
                    graph.capture_end()
                raise
            graph.capture_end()
        self._first = self._first or graph
        return graph.replay, found


STREAMS: dict[str, Callable[[torch.device], RecordingStream]] = {"cuda": CudaStream}
"""What work is recorded on, by type of device."""


@contextmanager
def _nothing_collected() -> Generator[None]:
    """What Python would find to be garbage may free what a GPU must not free while it records."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def generators(device: torch.device) -> list[torch.Generator]:
    """What random numbers of a program on a device come from."""
    own = [torch.cuda.default_generators[device.index or 0]] if device.type == "cuda" else []
    return [torch.default_generator, *own]


def explained(error: BaseException) -> str:
    """An error with its text, and that of the one that it came from, in one line."""
    texts: list[str] = []
    found: BaseException | None = error
    while found is not None and len(texts) < 3:
        texts.append(f"{type(found).__name__}: {' '.join(str(found).split())[:300]}")
        found = found.__cause__ or found.__context__
    return ", after ".join(texts)
