"""A run's server under pressure, by hand: `python -m tests.network.pressure [case ...]`, on loopback only.

Each case begins after some rounds of a run with honest clients, whose results are compared with those of one process,
to the bit. A line gives the server's resident memory before, at its most and at the end of the case, the median round
before and in the case and the longest one, the connections that it kept, and the lines of its log.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cutlayer.runtime.network.wire import What
from tests.network import hosts, raw
from tests.network.runs import SETTING, Federation, differing, undisturbed

ROUNDS, BEFORE, LASTING_S = 350, 20, 32.0
RUN = (*SETTING, "algorithm=sl_single_server", f"rounds={ROUNDS}", "eval_interval=50", "checkpoint_interval=10")
STRANGER = {"client": 10**6}

Case = Callable[[raw.Crowd, threading.Event], None]


def windows(crowd: raw.Crowd, over: threading.Event) -> None:
    """500 streams whose peers take nothing, 100 on a connection."""
    for _ in range(5):
        numbers = range(1, 201, 2)
        crowd.come(raw.greeting(0) + b"".join(raw.request(n) + raw.says(n, What.HELLO, STRANGER) for n in numbers))
    over.wait(LASTING_S)


def lone_windows(crowd: raw.Crowd, over: threading.Event) -> None:
    """500 such streams, each on a connection of its own."""
    for _ in range(500):
        crowd.come(raw.greeting(0) + raw.request(1) + raw.says(1, What.HELLO, STRANGER))
    over.wait(LASTING_S)


def streams(crowd: raw.Crowd, over: threading.Event) -> None:
    """20,000 streams that greet wrongly and stay, on 20 connections."""
    numbers = [crowd.come(raw.greeting()) for _ in range(20)]
    for at in range(1000):
        for number in numbers:
            crowd.say(number, raw.request(2 * at + 1) + raw.says(2 * at + 1, What.HELLO, STRANGER))
    over.wait(LASTING_S)


def resets(crowd: raw.Crowd, over: threading.Event) -> None:
    """20,000 streams, each given up at once, on 20 connections."""
    numbers = [crowd.come(raw.greeting()) for _ in range(20)]
    for at in range(1000):
        for number in numbers:
            crowd.say(number, raw.request(2 * at + 1) + raw.frame(raw.RESET, 0, 2 * at + 1, bytes(4)))
    over.wait(LASTING_S)


def silent(crowd: raw.Crowd, over: threading.Event) -> None:
    """2,000 connections that say nothing."""
    for _ in range(2000):
        crowd.come()
    over.wait(LASTING_S)


def idle(crowd: raw.Crowd, over: threading.Event) -> None:
    """2,000 connections that speak HTTP/2, answer probes and open no stream."""
    for _ in range(2000):
        crowd.come(raw.greeting())
    over.wait(LASTING_S)


def storm(crowd: raw.Crowd, over: threading.Event) -> None:
    """4,000 connections, one after another, that greet wrongly and leave."""
    for _ in range(4000):
        crowd.leave(crowd.come(raw.greeting() + raw.request(1) + raw.says(1, What.HELLO, STRANGER)))
    over.wait(LASTING_S)


CASES: tuple[Case, ...] = (windows, lone_windows, streams, resets, silent, idle, storm)


class Watch:
    """What a process takes of the machine, looked at ten times a second."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.before = self.most = self.now = self._memory()
        self._sockets = self._count()
        self.kept = 0

    def look(self) -> None:
        """Once more; not after the process has ended."""
        with contextlib.suppress(OSError):
            self.now = self._memory()
            self.most = max(self.most, self.now)
            self.kept = self._count() - self._sockets

    def _memory(self) -> float:
        """Resident, in MB."""
        pages = int(Path(f"/proc/{self._pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6

    def _count(self) -> int:
        """Open sockets."""
        count = 0
        for each in Path(f"/proc/{self._pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                count += str(each.readlink()).startswith("socket:")
        return count


def times(results: Path) -> list[float]:
    """Seconds of each round so far."""
    with (results / "metrics.csv").open(encoding="utf-8") as file:
        walls = [float(row["time_wall"]) for row in csv.DictReader(file) if row["time_wall"]]
    return [walls[0], *(later - sooner for sooner, later in itertools.pairwise(walls))]


def measure(case: Case, folder: Path, expected: Path) -> str:
    """One case; the line that tells of it."""
    (folder / "network").mkdir()
    with hosts.network(folder / "network", "loopback") as network:
        federation = Federation(network, folder, RUN, certificates=False)
        federation.start()
        federation.after_round(BEFORE)
        watch = Watch(federation.server.pid)
        begun, began, over = federation.rounds, time.monotonic(), threading.Event()
        with raw.Crowd(network.port) as crowd:
            thread = threading.Thread(target=case, args=(crowd, over), daemon=True)
            thread.start()
            while thread.is_alive() and federation.server.status is None:
                watch.look()
                time.sleep(0.1)
            lasted, ended = time.monotonic() - began, federation.rounds
            over.set()
            thread.join()
        found = federation.finish(300)
        each, text = times(found), federation.server.text
    wrong = differing(expected, found)
    quiet, pressed = each[1:begun], each[begun:ended]
    return (
        f"{case.__name__}, {lasted:.0f} s: memory {watch.before:.0f} MB, then {watch.most:.0f} at most and "
        f"{watch.now:.0f} last; rounds {statistics.median(quiet):.2f} s, then {statistics.median(pressed):.2f} and "
        f"{max(pressed):.2f} at most, {text.count('is repeated')} repeated; {watch.kept} connections kept; "
        f"{text.count(chr(10))} lines of log; {f'WRONG: {wrong} differ' if wrong else 'the same bits'}"
    )


def main(arguments: list[str]) -> int:
    """Measure what is named; all without a name."""
    known = {case.__name__: case for case in CASES}
    if unknown := [name for name in arguments if name not in known]:
        raise SystemExit(f"{', '.join(unknown)}: expected {', '.join(known)}")
    with tempfile.TemporaryDirectory(prefix="cutlayer-") as name:
        expected = undisturbed(Path(name) / "whole", RUN)
        for case in arguments or known:
            folder = Path(name) / str(case)
            folder.mkdir()
            print(measure(known[str(case)], folder, expected), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
