"""A worker without memory: the bits of one process, or one line that says so and whom it was with."""

import contextlib
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.algorithms import ALGORITHMS
from cutlayer.algorithms.fed_avg import FedAvg
from cutlayer.runtime.ground import memory
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import ClientProgram, Fields, Payload
from cutlayer.runtime.parties.contexts import ClientContext
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.workers import processes
from cutlayer.runtime.workers.clients import WorkerClients
from cutlayer.runtime.workers.processes import ProcessLink, be_worker
from tests.conftest import play, same, weights
from tests.workers.test_workers import federation

Configure = Callable[..., RunConfig]
MB = 1 << 20
LARGE = ("algorithm=fed_avg", "model=cnn4", "batch_size=300", "num_clients=3", "frac=1.0", "rounds=1")
TOLD = re.compile(
    r"workers=2: expected fewer, or a smaller batch_size( than 300: a worker's memory ran out in the round of client "
    r"[012]|: 7 died in one round, the last as its memory ran out( with client [012])?)"
)


def outcome(made: Federation) -> str | None:
    """The one line by which a run ends; None where it ends well."""
    try:
        play(made)
    except ConfigError as error:
        return str(error)
    return None


def _limited(more: int, *arguments: Any) -> None:
    """A worker that may take so much more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    be_worker(*arguments)


@pytest.mark.parametrize("more", [8, 64, 96, 8192])
def test_workers_of_little_memory_give_the_same_bits_or_one_line(
    more: int, configure: Configure, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "be_worker", partial(_limited, more * MB))
    with federation(configure(*LARGE, "workers=2")) as made:
        line = outcome(made)
        assert line is None or TOLD.match(line), line
        if line is None:
            assert same(weights(made), weights(play(Federation(configure(*LARGE)))))
    assert (line is None) == {8: False, 8192: True}.get(more, line is None)
    assert "Traceback" not in capfd.readouterr().err


class _Hungry(FedAvg):
    """FedAvg with a client that takes memory until its process is killed; what it takes is bounded."""

    name = "hungry"

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram | Fields:
        held = [torch.ones(MB) for _ in range(512)] if ctx.id == 2 else []
        return FedAvg.client(ctx, down) if not held else {}


@contextlib.contextmanager
def cgroup(limit: int) -> Generator[Callable[[int], None]]:
    """A group of processes that together may take so much memory; gives what puts a process into it."""
    above, file = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    if not above.is_dir():
        above, file = Path("/sys/fs/cgroup"), "memory.max"
    group = above / f"cutlayer-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / file).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"this machine makes no groups with a limit ({error})")
    try:
        yield lambda process: (group / "cgroup.procs").write_text(str(process)) and None
    finally:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def test_the_system_s_kill_for_want_of_memory_is_told_with_the_client(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By a real limit: each worker of the run is in a group of processes that may take 1 GB together."""
    monkeypatch.setitem(ALGORITHMS, "hungry", _Hungry)
    config = replace(configure("algorithm=fed_avg", "num_clients=3", "workers=2"), algorithm_name="hungry")
    begin = ProcessLink.__init__
    with cgroup(1000 * MB) as put, federation(config) as made:

        def started(self: ProcessLink, *arguments: Any) -> None:
            begin(self, *arguments)
            put(self.pid or 0)

        monkeypatch.setattr(ProcessLink, "__init__", started)
        line = outcome(made)
    assert line == (
        "workers=2: expected fewer, or a smaller batch_size: 7 died in one round, "
        "the last killed by the system, as memory ran out, with client 2"
    )
    assert caplog.text.count("killed by the system, as memory ran out, with client 2); another takes its place") >= 5


class _Killed(FedAvg):
    """FedAvg with a client whose worker somebody kills."""

    name = "killed"

    @staticmethod
    def client(ctx: ClientContext, down: Payload) -> ClientProgram | Fields:
        if ctx.id == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return FedAvg.client(ctx, down)


@pytest.mark.parametrize("counted", [True, False])
def test_another_kill_is_told_from_it_where_the_system_counts(
    counted: bool, configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(ALGORITHMS, "killed", _Killed)
    if not counted:
        monkeypatch.setattr(memory, "_COUNTER", tmp_path / "none")
    elif memory.killed_for_memory() is None:
        pytest.skip("this system does not count")
    config = replace(configure("algorithm=fed_avg", "num_clients=3", "workers=2"), algorithm_name="killed")
    with federation(config) as made:
        line = outcome(made)
    wanted = "workers that live" if counted else "fewer, or a smaller batch_size"
    hint = "" if counted else ", as the system does where memory runs out,"
    died = f"7 died in one round, the last killed by signal 9{hint} with client 2"
    assert line == f"workers=2: expected {wanted}: {died}"


def test_a_worker_goes_before_the_process_of_its_run(configure: Configure) -> None:
    if not Path("/proc/self/oom_score_adj").exists():
        pytest.skip("another system")
    with federation(configure("algorithm=fed_avg", "workers=2")) as made:
        made.step()
        assert isinstance(made.clients, WorkerClients)
        scores = [int(Path(f"/proc/{each}/oom_score_adj").read_text()) for each in made.clients.pool.living()]
    assert len(scores) == 2
    assert min(scores) > int(Path("/proc/self/oom_score_adj").read_text())
