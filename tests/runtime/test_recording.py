"""How a CUDA graph is recorded, on a made-up `torch.cuda`: what is left where recording fails."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cutlayer.runtime.parties.recording import CudaStream, explained

DEVICE = torch.device("cuda", 0)


class Gpu:
    """Streams and graphs that note what is asked of them; a graph whose work failed cannot be ended."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.current: Any = SimpleNamespace(name="main", wait_stream=lambda other: self.asked.append("main waits"))
        self.pools: list[Any] = []

    def make_stream(self, device: torch.device) -> Any:
        wait = lambda other: self.asked.append("side waits")  # noqa: E731
        return SimpleNamespace(name="side", device=device, wait_stream=wait)

    @contextmanager
    def stream(self, stream: Any) -> Any:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def make_graph(self) -> Any:
        gpu, number = self, len(self.pools)

        class Graph:
            def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
                assert (gpu.current.name, capture_error_mode, gc.isenabled()) == ("side", "thread_local", False)
                gpu.pools.append(pool)

            def capture_end(self) -> None:
                if "fails" in gpu.asked:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

            def pool(self) -> str:
                return f"pool of {number}"

            def replay(self) -> None:
                gpu.asked.append("replayed")

        return Graph()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    for name, value in {
        "Stream": made.make_stream,
        "stream": made.stream,
        "CUDAGraph": made.make_graph,
        "current_stream": lambda device: made.current,
        "synchronize": lambda device: None,
        "empty_cache": lambda: made.asked.append("freed"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_work_is_recorded_beside_the_stream_that_is_computed_on(gpu: Gpu) -> None:
    stream = CudaStream(DEVICE)
    assert stream.run(lambda: gpu.current.name) == "side"
    assert gpu.asked == ["side waits", "main waits"]
    replay, found = stream.record(lambda: gpu.current.name, large=True)
    assert (found, gpu.current.name, gpu.asked[2:]) == ("side", "main", ["freed"])
    replay()
    assert gpu.asked[3:] == ["replayed"]
    stream.record(lambda: None)
    assert gpu.pools == [None, "pool of 0"], "recordings of one stream share memory"


def test_what_failed_is_what_is_told(gpu: Gpu) -> None:
    def fail() -> None:
        gpu.asked.append("fails")
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for it.")

    stream = CudaStream(DEVICE)
    with pytest.raises(RuntimeError, match="operation not permitted") as found:
        stream.record(fail)
    assert gpu.current.name == "main", "the work that follows is on the stream that it was on"
    assert gc.isenabled()
    assert explained(found.value).startswith("RuntimeError: CUDA error: operation not permitted when stream is")
    gpu.asked.clear()
    assert stream.record(lambda: 3)[1] == 3


def test_an_error_names_the_one_before_it() -> None:
    error = RuntimeError("second\n  line")
    error.__context__ = ValueError("first")
    assert explained(error) == "RuntimeError: second line, after ValueError: first"
    assert len(explained(RuntimeError("x" * 1000))) < 400
