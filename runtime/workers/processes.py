"""``engine=processes``: workers that are processes of this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from functools import cached_property
from queue import SimpleQueue

import torch

from cutlayer.runtime.ground import forking
from cutlayer.runtime.ground.forking import SENT_TO_ALL
from cutlayer.runtime.ground.memory import NO_MEMORY, be_first_to_go, ending_without_memory, killed_for_memory
from cutlayer.runtime.ground.process import prepare_process
from cutlayer.runtime.ground.processors import cores
from cutlayer.runtime.messages.boundary import Reply
from cutlayer.runtime.messages.codec import decode
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.workers.program import Program
from cutlayer.runtime.workers.shared import Shared, not_given
from cutlayer.runtime.workers.stream import WorkerStream
from cutlayer.runtime.workers.talk import Frame, Talk, Word

_THIS = "cutlayer.runtime.workers.processes"

# What a message says of the frame that is common to many: it has none, the same as before, or this one.
_NONE, _SAME, _NEW = range(3)


def preload() -> None:
    """Load what workers need while the data are read."""
    forking.server(_THIS)


class Processes:
    """Starts processes that have the run's setup; see ``Engine``."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    @property
    def most(self) -> int:
        return torch.cuda.device_count() if self._setup.device.type == "cuda" else cores()

    @cached_property
    def _shared(self) -> Shared:
        try:
            return Shared(self._setup)
        except Exception as error:
            raise not_given(self._setup, error) from error

    def begin(self, number: int, count: int) -> ProcessLink:
        device = None
        if self._setup.device.type == "cuda":
            device = f"cuda:{number % torch.cuda.device_count()}"
        return ProcessLink(self._shared, torch.get_num_threads(), device)

    def close(self) -> None:
        if "_shared" in self.__dict__:
            self.__dict__.pop("_shared").close()


class ProcessLink:
    """A process at the other end of a socket; see ``WorkerLink``.

    Args:
        shared: holds the run's ``Setup``. threads: to compute with. device: the worker's GPU.
    """

    hopeless = starved = False
    end = ""

    def __init__(self, shared: Shared, threads: int, device: str | None) -> None:
        ours, theirs = socket.socketpair()
        self._stream = WorkerStream(ours)
        # Not multiprocessing's daemon, which may have no processes of its own; it ends with this process all the same.
        arguments = (theirs, shared, threads, device)
        self._process = forking.server(_THIS).Process(target=be_worker, args=arguments)
        self._process.start()
        theirs.close()
        self._common = b""
        self._killed = killed_for_memory()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def say(self, head: Word, frames: Sequence[Frame] = (), common: bytes | None = None) -> None:
        how = _NONE if common is None else _SAME if common is self._common else _NEW
        if common is not None and how == _NEW:
            self._common, frames = common, [[common], *frames]
        self._stream.send((head, how), frames)

    def hear(self) -> Talk:
        head, lengths = self._stream.receive_head()
        return head, [self._stream.receive_payload(length) for length in lengths]

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.starved, self.end = self._how(self._process.exitcode or 0)

    def _how(self, status: int) -> tuple[bool, str]:
        """Whether it may have ended for want of memory, by its exit status, and how it ended in words."""
        if status == NO_MEMORY:
            return True, "as its memory ran out"
        if status != -signal.SIGKILL:
            return False, f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        killed = killed_for_memory()
        if self._killed is None or killed is None:
            return True, f"killed by signal {-status}, as the system does where memory runs out,"
        by_system = killed > self._killed
        return by_system, "killed by the system, as memory ran out," if by_system else f"killed by signal {-status}"

    def close(self) -> None:
        self._stream.socket.close()


def be_worker(end: socket.socket, shared: Shared, threads: int, device: str | None) -> None:
    """Be a worker until the other end of the socket is closed; the arguments are those of ``ProcessLink``."""
    for number in SENT_TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    logging.disable()  # the run's own process has said what there is to say
    be_first_to_go()
    with ending_without_memory():
        _work(WorkerStream(end), shared, threads, torch.device(device or "cpu"))


def _work(stream: WorkerStream, shared: Shared, threads: int, place: torch.device) -> None:
    prepare_process(place)  # before anything is on a GPU
    inbox: SimpleQueue[tuple[Word, list[Reply]]] = SimpleQueue()
    threading.Thread(target=_listen, args=(stream, inbox), daemon=True).start()

    def load() -> Setup:
        setup: Setup = shared.load(place)
        prepare_process(place, setup.config.arithmetic)
        torch.set_num_threads(threads)
        return setup

    program = Program(load)
    while True:
        for head, frames in program.hear(*inbox.get()):
            stream.send(head, frames)


def _listen(stream: WorkerStream, inbox: SimpleQueue[Talk]) -> None:
    common = b""
    try:
        with ending_without_memory():
            while True:
                (head, how), lengths = stream.receive_head()
                if how == _NEW:
                    common = bytes(stream.receive_bytes(lengths.pop(0)))
                payloads = [] if how == _NONE else [decode(common)]
                inbox.put((head, payloads + [stream.receive_payload(length) for length in lengths]))
    except (EOFError, OSError):
        os._exit(0)  # whatever it computes: nobody waits for it
