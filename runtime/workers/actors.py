"""``engine=ray``: workers that are actors of a Ray cluster which is there already."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
import warnings
from collections.abc import Generator, Sequence
from functools import cached_property
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.extras import install
from cutlayer.runtime.ground.process import prepare_process
from cutlayer.runtime.ground.ray_cluster import join_cluster
from cutlayer.runtime.messages.codec import decode
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.workers.program import Program
from cutlayer.runtime.workers.shared import Packed, not_given, unpacked
from cutlayer.runtime.workers.talk import Frame, Hold, Talk, Word, pack, unpack

log = logging.getLogger(__name__)

# Ray keeps what is larger in each machine's object store, once.
_INLINE_BYTES = 100_000
_PATIENCE_S = 30.0


class Actors:
    """Starts actors that have the run's setup; see ``Engine``.

    A cluster is the one that RAY_ADDRESS names, or the one of this machine.

    Raises:
        ConfigError: there is no Ray, no cluster, or it has less than the workers need.
    """

    def __init__(self, setup: Setup) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("engine", "ray", f"processes, or the extra: {install('ray')}")
        ray = sys.modules.get("ray")
        self._joined = ray is None or not ray.is_initialized()  # else this run is itself a task of the cluster
        settings = {
            "address": os.environ.get("RAY_ADDRESS") or "auto",
            "log_to_driver": False,
            "logging_level": "warning",
        }
        self._ray: Any = join_cluster("engine=ray", "RAY_ADDRESS", settings) if self._joined else ray
        self._setup = setup
        self._sent: tuple[bytes, Any] = (b"", None)
        self._made: Any = None
        if self.most < 1:
            raise ConfigError("engine", "ray", f"a cluster with {self._kind}s; this one has none")

    @property
    def _kind(self) -> str:
        return "GPU" if self._gpu else "CPU"

    @property
    def _gpu(self) -> bool:
        return self._setup.device.type == "cuda"

    @property
    def most(self) -> int:
        return int(self._ray.cluster_resources().get(self._kind, 0.0))

    @cached_property
    def _given(self) -> list[Any]:
        """What each actor is made with: the setup as references to what the cluster has once a machine."""
        try:
            packed = Packed(self._setup, self._setup.dataset)
        except Exception as error:
            raise not_given(self._setup, error) from error
        memories = [np.empty(max(1, size), np.uint8) for size in packed.sizes]
        packed.write([memory.data for memory in memories])
        return [self._ray.put(each) for each in (packed.content, *memories)]

    def _kind_of_actor(self, count: int) -> Any:
        """The actors' class, with what each of so many takes of the cluster."""
        if self._made is None:
            threads = torch.get_num_threads()
            gpus = min(1.0, self.most / count) if self._gpu else 0.0
            room = int(self._ray.cluster_resources().get("CPU", 0.0) / threads)
            if count > room:
                by = f" by those of a worker (threads={threads})" if threads > 1 else ""
                raise ConfigError("workers", count, f"at most {room}, the CPUs of the cluster{by}")
            options = {"num_cpus": threads, "num_gpus": int(gpus * 1000) / 1000, "scheduling_strategy": "SPREAD"}
            self._made = self._ray.remote(**options)(RayWorker)
        return self._made

    def begin(self, number: int, count: int) -> ActorLink:
        actor = self._kind_of_actor(count).remote(*self._given, torch.get_num_threads(), self._gpu, _versions())
        return ActorLink(self._ray, actor, number, self)

    def common(self, frame: bytes) -> Any:
        """What actors are given for a frame that many of them get."""
        if len(frame) < _INLINE_BYTES:
            return frame
        if frame is not self._sent[0]:
            self._sent = (frame, self._ray.put(np.frombuffer(frame, np.uint8)))
        return self._sent[1]

    def close(self) -> None:
        self._sent = (b"", None)
        self.__dict__.pop("_given", None)
        if self._joined:
            self._ray.shutdown()


def _versions() -> dict[str, str]:
    """What has to be the same at both ends for the same bits."""
    return {"torch": torch.__version__, "numpy": np.__version__}


class ActorLink:
    """An actor; see ``WorkerLink``. It is told by calls, whose results come one by one in the order of the calls."""

    def __init__(self, ray: Any, actor: Any, number: int, actors: Actors) -> None:
        self._ray, self._actor, self._actors = ray, actor, actors
        self._calls: SimpleQueue[Any] = SimpleQueue()
        self._call: Any = iter(())
        self._number = number
        self._process = actor.pid.remote()
        self.pid: int | None = None
        self.end = "it does not answer"
        self.hopeless = self.starved = False

    def say(self, head: Word, frames: Sequence[Frame] = (), common: bytes | None = None) -> None:
        content = pack(head, frames)
        sent = content if len(content) < _INLINE_BYTES else np.frombuffer(content, np.uint8)
        given = None if common is None else self._actors.common(common)
        self._calls.put(self._actor.hear.remote(sent, given))

    def hear(self) -> Talk:
        try:
            if self.pid is None:
                self.pid = self._started()
            while True:
                for result in self._call:
                    return unpack(self._ray.get(result))
                self._call = self._calls.get()
                if self._call is None:
                    raise EOFError
        except self._ray.exceptions.RayError as error:
            text = str(error)
            self.hopeless = "creation task" in text or "failed to import" in text
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            self.starved = isinstance(error, self._ray.exceptions.OutOfMemoryError)
            self.end = f"{type(error).__name__}: {lines[-1] if self.hopeless else lines[0]}"
            raise EOFError from error

    def _started(self) -> int:
        """Its process number, once the cluster has room for it."""
        if not self._ray.wait([self._process], timeout=_PATIENCE_S)[0]:
            log.warning("worker %d waits for the cluster, whose CPUs or GPUs are taken", self._number)
        return self._ray.get(self._process)

    def kill(self) -> None:
        self._ray.kill(self._actor)
        self._calls.put(None)

    def close(self) -> None:
        pass


class RayWorker:
    """A worker in a process of the cluster.

    Args:
        content, frozen, memory: of a ``Packed`` setup. threads: to compute with.
        gpu: whether on the GPU that Ray gave it. versions: that the run has.
    """

    def __init__(
        self,
        content: bytes,
        frozen: np.ndarray,
        memory: np.ndarray,
        threads: int,
        gpu: bool,
        versions: dict[str, str],
    ) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all its processes
        place = torch.device("cuda:0" if gpu else "cpu")
        prepare_process(place)

        def load() -> Setup:
            logging.disable()  # the run's own process has said what there is to say
            if versions != _versions():
                raise ConfigError(
                    "engine", "ray", f"{versions} on every machine; {os.uname().nodename} has {_versions()}"
                )
            torch.set_num_threads(threads)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # nobody may write to what all of a machine have
                setup: Setup = unpacked(content, (frozen, bytearray(memory)), place)
            prepare_process(place, setup.config.arithmetic)
            return setup

        self._program = Program(load)

    def pid(self) -> int:
        """The number of its process."""
        return os.getpid()

    def hear(self, content: bytes | memoryview, common: bytes | memoryview | None) -> Generator[Any]:
        """Answers to a word, each as soon as it is known."""
        head, payloads = unpack(content)
        if common is not None:
            payloads.insert(0, decode(memoryview(common)))
        try:
            for answer, parts in self._program.hear(head, payloads):
                packed = pack(answer, parts)
                yield packed if len(packed) < _INLINE_BYTES else np.frombuffer(packed, np.uint8)
        except Exception:
            if isinstance(head, Hold):
                os._exit(1)
            raise
