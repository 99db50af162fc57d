"""Time of a split-learning step's round trip over the network, and the server's memory, against a bare gRPC echo.

On loopback, client and server in processes of their own, no computation: the server sends a gradient and waits for the
client's next smashed data, by the path of a run, from tensors to checked tensors. The echo (``benchmarks.echo``) sends
as many bytes as one message and gets them back. Both take turns, in blocks of steps, without and with TLS. Processor
time is that of all threads at both ends, which other load on the machine disturbs less than it does the seconds.
Then the server's memory with few and with many clients at once (``benchmarks.crowd``).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import echo
from benchmarks.crowd import Crowd, echo_mb, platform_mb
from benchmarks.links import WAIT_S, listening, open_session, processes, smashed, take_steps
from benchmarks.measure import Spread, machine_options, processor_seconds, set_up, thread_seconds
from cutlayer.runtime.ground import forking
from cutlayer.runtime.ground.allocator import keep_freed_memory
from cutlayer.runtime.network.certificates.authority import Order, make_certificates

TARGET = 1.2


class RoundTrips:
    """Both sides at once, ready to be measured alternately."""

    def __init__(self, stack: contextlib.ExitStack, mb: float, certificates: Path | None) -> None:
        start = stack.enter_context(processes())
        context = forking.server()
        ours, theirs = context.Pipe()
        served = start(echo.serve, theirs, certificates)
        if not ours.poll(WAIT_S):
            raise RuntimeError("the echo does not start")
        port = ours.recv()
        self._orders, theirs = context.Pipe()
        self._bare = (served, start(echo.call, theirs, port, certificates, round(mb * 1e6)))
        hub = stack.enter_context(listening(1, certificates))
        self._client = start(take_steps, hub.port, 0, certificates, mb)
        self._session, self._gradient = open_session(hub, 0), {"grad": smashed(mb)["z"]}
        self._session.send(self._gradient)
        self._session.receive()

        self.threads = {"server": Counter[str](), "client": Counter[str]()}
        """Processor seconds of the platform's threads at each end, in all of its blocks."""

    def take(self, name: str, times: int) -> tuple[float, float]:
        """A block of so many steps of a side: median seconds of one, and processor seconds of all."""
        before, threads = self._processor(name), self._threads()
        found = self._platform(times) if name == "platform" else self._echo(name, times)
        if name == "platform":
            for end, seconds in self._threads().items():
                self.threads[end].update({kind: value - threads[end][kind] for kind, value in seconds.items()})
        return statistics.median(found), self._processor(name) - before

    def _threads(self) -> dict[str, dict[str, float]]:
        return {"server": thread_seconds(), "client": thread_seconds(self._client)}

    def _processor(self, name: str) -> float:
        if name == "platform":
            return time.process_time() + processor_seconds(self._client)
        return sum(map(processor_seconds, self._bare))

    def _echo(self, client: str, times: int) -> list[float]:
        """Seconds of so many steps of the echo."""
        self._orders.send((client, times))
        if not self._orders.poll(WAIT_S):
            raise RuntimeError("the echo does not answer")
        return self._orders.recv()

    def _platform(self, times: int) -> list[float]:
        """Seconds of so many steps of a run."""
        found: list[float] = []
        for _ in range(times):
            start = time.perf_counter()
            self._session.send(self._gradient)
            self._session.receive()
            found.append(time.perf_counter() - start)
        return found


def measure(options: argparse.Namespace, certificates: Path | None, show: Callable[[str], None]) -> None:
    """The lines of one link."""
    blocks: dict[str, list[tuple[float, float]]] = {name: [] for name in (*echo.CLIENTS, "platform")}
    with contextlib.ExitStack() as stack:
        trips = RoundTrips(stack, options.mb, certificates)
        for _ in range(options.repeats + 1):
            for name, taken in blocks.items():
                taken.append(trips.take(name, options.steps))
        threads = trips.threads
    taken = {name: [seconds for seconds, _ in each[1:]] for name, each in blocks.items()}
    spreads = {name: Spread.of(each) for name, each in taken.items()}
    steps = options.repeats * options.steps
    processor = {name: sum(spent for _, spent in each[1:]) / steps for name, each in blocks.items()}
    quicker = min(echo.CLIENTS, key=lambda name: spreads[name].median)
    ratio = Spread.of([one / bare for one, bare in zip(taken["platform"], taken[quicker], strict=True)])
    show(f"{options.mb:g} MB each way, {'without' if certificates is None else 'with'} TLS")
    labels = {name: f"gRPC alone, {name} client" for name in echo.CLIENTS} | {"platform": "the platform"}
    for name, label in labels.items():
        show(f"  {label:<24} {spreads[name].show(1e3, 1, ' ms')}, processor {1e3 * processor[name]:.1f} ms")
    for end, seconds in threads.items():
        main, others, grpc = (1e3 * seconds[kind] / (steps + options.steps) for kind in ("main", "others", "libraries"))
        show(f"    of it at the {end}: main thread {main:.1f} ms, Python's others {others:.1f}, gRPC's {grpc:.1f}")
    verdict = "met" if ratio.median <= TARGET else "MISSED"
    spent = processor["platform"] / processor[quicker] if processor[quicker] else math.nan  # less than can be told
    against = f"target {TARGET:.2f} {verdict}; of processor time {spent:.2f}"
    show(f"  ratio to the {quicker} client {ratio.show()}, {against}")


def measure_memory(options: argparse.Namespace, show: Callable[[str], None]) -> None:
    """The lines of the server's memory."""
    few, many = (Crowd(clients, options.crowd_mb, options.crowd_steps) for clients in options.clients)
    show(f"memory that {few.clients} and {many.clients} clients take at the server, {few.mb:g} MB each way and step")
    for name, stray in (("the platform", False), ("and each sends a message unasked", True)):
        low, high = (platform_mb(replace(crowd, stray=stray)) for crowd in (few, many))
        show(f"  {name:<34} {low:6.0f} MB {high:6.0f} MB")
    show(f"  {'gRPC alone, all at once':<34} {echo_mb(few):6.0f} MB {echo_mb(many):6.0f} MB")


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure round trips without and with TLS, then memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mb", type=float, default=4.0, help="MB of a message (default: 4)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a block, of which the median (default: 20)")
    parser.add_argument("--repeats", type=int, default=15, help="measured blocks of each side (default: 15)")
    parser.add_argument("--tls", choices=("no", "yes", "both"), default="both", help="default: both")
    parser.add_argument("--clients", type=int, nargs=2, default=[10, 100], help="at once, for memory (default: 10 100)")
    parser.add_argument("--crowd-mb", type=float, default=8.0, help="MB of their messages (default: 8)")
    parser.add_argument("--crowd-steps", type=int, default=3, help="steps of each of them (default: 3)")
    parser.add_argument("--only", choices=("time", "memory"), help="one of the two")
    machine_options(parser)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    show(f"{set_up(options)}; {options.repeats} repeats, median (min .. max) of blocks of {options.steps} steps")
    if options.only != "memory":
        with tempfile.TemporaryDirectory() as folder:
            certificates = Path(folder) / "certificates"
            make_certificates(certificates, Order(server=("localhost",), clients=(0,)))
            for tls in {"no": (False,), "yes": (True,), "both": (False, True)}[options.tls]:
                measure(options, certificates if tls else None, show)
    if options.only != "time":
        measure_memory(options, show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
