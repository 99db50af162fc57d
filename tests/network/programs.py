"""What the two kinds of test network share: programs that run on their hosts, and what can be done to a link."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.places import ROOT

PATIENCE_S = 90.0
"""What is waited for at most, unless said otherwise; it only bounds a test that fails."""
_TAIL = 4000
_FOREIGN = ("RAY_", "SLURM_", "HYDRA_", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "GRPC_")


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> None:
    """Wait for something to come true.

    Raises:
        AssertionError: it has not after so many seconds.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"after {seconds:g} s: not {what}"
        time.sleep(0.01)


def bound_to_test() -> list[str]:
    """What a command begins with to be killed when the test's process ends, where that can be had."""
    return ["setpriv", "--pdeathsig=KILL"] if shutil.which("setpriv") else []


@dataclass(frozen=True)
class Traffic:
    """What a host has sent into its link and received from it."""

    sent_bytes: int
    received_bytes: int
    sent_packets: int = 0
    received_packets: int = 0


class Link(Protocol):
    """A host's only connection to the others."""

    def cut(self) -> None:
        """From now on nothing comes through, either way, and neither end is told."""
        ...

    def heal(self) -> None:
        """Everything comes through again."""
        ...

    def shape(self, **conditions: float) -> None:
        """Put the link in other conditions (`shaping.Conditions`), each way; connections through it live on."""
        ...

    def traffic(self) -> Traffic:
        """Counted since the network was made."""
        ...


class Host(Protocol):
    """A machine, or what stands for one."""

    @property
    def name(self) -> str: ...

    @property
    def link(self) -> Link: ...

    def start(self, command: Sequence[str], log: Path, **environment: str) -> Program:
        """Start a program there, in the project's folder; what it prints goes to `log`, after what is in it."""
        ...


class Network(Protocol):
    """One server and some clients; a context manager, which ends everything that runs in it.

    listen: address that the server listens on.
    port: free there.
    """

    form: str
    listen: str
    port: int

    @property
    def server(self) -> Host: ...

    @property
    def clients(self) -> Sequence[Host]: ...

    def dial(self, client: int) -> tuple[str, int]:
        """The address and port by which a client reaches the server."""
        ...

    def __enter__(self) -> Network: ...

    def __exit__(self, *_: object) -> None: ...


class Program:
    """A program that runs on a host."""

    def __init__(self, command: Sequence[str], log: Path, name: str, nested: bool, **environment: str) -> None:
        """``nested``: the command starts the program as its only child, and ends as that does."""
        self.name, self.log = name, log
        kept = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        kept |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._seen = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [*command],
                cwd=ROOT,
                env=kept | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._pids = [self._process.pid]
        if nested:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
            until(lambda: self.status is not None or children.read_text().split(), f"started: {name}", 20)
            if self.status is None:
                self._pids.insert(0, int(children.read_text().split()[0]))

    @property
    def status(self) -> int | None:
        """Exit status; negative: the signal that ended it; None while it runs."""
        return self._process.poll()

    @property
    def pid(self) -> int:
        """Its own, not that of what started it."""
        return self._pids[0]

    @property
    def text(self) -> str:
        """What this program has printed so far."""
        with self.log.open("rb") as file:
            file.seek(self._seen)
            return file.read().decode(errors="replace")

    @property
    def tail(self) -> str:
        """How it ended, and the end of what it printed."""
        return f"--- {self.name} (exit status {self.status})\n{self.text[-_TAIL:]}"

    def wait_for(self, pattern: str, seconds: float = PATIENCE_S, times: int = 1) -> re.Match[str]:
        """Wait until what it prints has so many places that match; the last of these.

        Raises:
            AssertionError: it has ended without, or the time is over.
        """
        found: list[re.Match[str]] = []
        end = time.monotonic() + seconds
        while len(found) < times:
            ended = self.status is not None
            found = list(re.finditer(pattern, self.text))
            late = time.monotonic() > end
            assert len(found) >= times or not (ended or late), f"no {pattern!r} in {seconds:g} s: {self.tail}"
            time.sleep(0.01)
        return found[times - 1]

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        # What stands between stops with a program that is stopped, and has to go on with it. It ends by itself.
        for pid in self._pids if number == signal.SIGCONT else self._pids[:1]:
            os.kill(pid, number)

    def kill(self) -> None:
        """End it at once, as a machine does that loses power, and see it gone."""
        if self.status is None:
            self.signal(signal.SIGKILL)
            self._process.wait(20)

    def hang(self) -> None:
        """Let it do nothing until `go_on`, and see it stopped."""
        self.signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self._pids[0]}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", f"stopped: {self.name}", 20)

    def go_on(self) -> None:
        """After `hang`."""
        self.signal(signal.SIGCONT)

    def finish(self, seconds: float = PATIENCE_S, status: int = 0) -> str:
        """Wait for its end; what it printed.

        Raises:
            AssertionError: it goes on, or its exit status is another.
        """
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {seconds:g} s: {self.tail}") from None
        assert self.status == status, self.tail
        return self.text

    def end(self) -> None:
        """End it and everything that it started, whatever state it is in."""
        if self.status is None:
            for pid in self._pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                    os.killpg(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self._process.wait(20)
