"""Rounds of Cutlayer in the time of one of pfl and of Flower: the same work by each, alternating, in processes.

What is timed is the time from the end of the first round to the end of the last, as each side's own hook for the end of
a round sees it: no start, no data, no first round, no test. All begin with the same weights and take the same clients
and batches in the same order; a side that ends with other weights, or counts other steps or samples, is not compared.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import ROOT, Spread, set_up
from benchmarks.peers.by_cutlayer import give
from benchmarks.peers.places import PEERS, PeerError, cache_folder, command, environment, last_line, variables
from benchmarks.peers.work import Given, Told, Work
from cutlayer.runtime.ground.processors import cores

OURS = "cutlayer"
_REFERENCE = "reference"
_LIMIT_S = 1800
# Of what training has changed, after the first round and after the last: sums are rounded otherwise on each side, which
# a network of pools and ReLUs magnifies from round to round.
_TOLERANCES = (1e-4, 0.1)


class Ran(NamedTuple):
    """What a side has told, its seconds with the start, how far its weights are from Cutlayer's (``Given.apart``)."""

    told: Told
    whole: float
    apart: tuple[float, float]

    @property
    def rate(self) -> float:
        """Timed rounds a second."""
        return (self.told.rounds - 1) / self.told.seconds


class Race:
    """Runs of all sides on the same work.

    Args:
        given: what they are given. pythons: the interpreter of each side. allocator: see ``places.variables``.
    """

    def __init__(self, given: Given, pythons: dict[str, str], *, allocator: bool) -> None:
        self._given, self._pythons, self._allocator = given, pythons, allocator
        self._start(OURS, 1, _REFERENCE)

    def run(self, side: str, workers: int) -> Ran:
        """A run; everything that it has started has ended then.

        Raises:
            PeerError: it failed, or did other work than it was given.
        """
        name = f"{side}-{workers}"
        begun = time.perf_counter()
        self._start(side, workers, name)
        whole, told, apart = time.perf_counter() - begun, self._given.told(name), self._given.apart(name, _REFERENCE)
        check(self._given.work, told, apart)
        return Ran(told, whole, apart)

    def _start(self, side: str, workers: int, name: str) -> None:
        arguments = [str(self._given.folder), str(workers), name]
        try:
            done = subprocess.run(
                command(side, self._pythons[side], workers, arguments),
                cwd=ROOT,
                env=variables(self._given.folder, self._allocator),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=_LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            raise PeerError(f"not done in {_LIMIT_S} s") from None
        if done.returncode:
            raise PeerError(f"it failed ({last_line(done.stderr or done.stdout)})")


def check(work: Work, told: Told, apart: tuple[float, float]) -> None:
    """What a side has done is what it was given, and it has learnt.

    Args:
        apart: how far its weights are from the reference, see ``Given.apart``.

    Raises:
        PeerError: it is not.
    """
    found = {"rounds": told.rounds, **told.counted, "threads": told.threads, "torch": told.versions["torch"]}
    expected: dict[str, int | str] = {"rounds": work.rounds + 1, "steps": work.steps, "samples": work.samples}
    expected |= {"threads": 1, "torch": str(torch.__version__)}
    if found != expected:
        other = ", ".join(f"{name} {found.get(name)} for {value}" for name, value in expected.items())
        raise PeerError(f"it did other work: {other}")
    if not told.after[1] < told.before[1]:
        raise PeerError(f"it did not learn: test loss {told.before[1]:.3f}, then {told.after[1]:.3f}")
    if not all(distance < limit for distance, limit in zip(apart, _TOLERANCES, strict=True)):
        raise PeerError(f"its weights are other ones, {_distance(apart)}")


def _distance(apart: tuple[float, float]) -> str:
    return f"apart by {apart[0]:.0e} of their change after the first round, {apart[1]:.0e} after the last"


def compare(race: Race, peers: Sequence[str], workers: int, repeats: int, show: Callable[[str], None]) -> bool:
    """Show the ratios to the peers with so many workers; whether there is any."""
    ran: dict[str, list[Ran]] = {side: [] for side in (OURS, *peers)}
    for repeat in range(repeats):
        order = list(ran)
        for side in order[repeat % len(order) :] + order[: repeat % len(order)]:
            try:
                ran[side].append(race.run(side, workers))
            except PeerError as error:
                show(f"{side}, {workers} workers: {error}")
                if side == OURS:
                    return False
                del ran[side]
        rates = ", ".join(f"{side} {runs[-1].rate:.2f}" for side, runs in ran.items())
        show(f"{workers} workers, repeat {repeat + 1}, rounds a second: {rates}")
    show(f"{workers} {'process' if workers == 1 else 'processes'}:")
    for side, runs in ran.items():
        rounds = Spread.of([run.rate for run in runs])
        ratios = [run.told.seconds / ours.told.seconds for run, ours in zip(runs, ran[OURS], strict=True)]
        ratio = "" if side == OURS else f", Cutlayer gives {Spread.of(ratios).show()} times its rounds"
        show(f"  {side:<8} {rounds.show()} rounds a second{ratio}")
        show(
            f"           {_learnt(runs[-1])}; {Spread.of([run.whole for run in runs]).show(digits=1)} s with its start"
        )
    return len(ran) > 1


def _learnt(run: Ran) -> str:
    told = run.told
    (accuracy, loss), (reached, left) = told.before, told.after
    packages = ", ".join(f"{name} {version}" for name, version in told.versions.items())
    return (
        f"{told.counted['steps']} steps on {told.counted['samples']} images, {told.parameters} parameters, "
        f"test accuracy {accuracy:.1%} to {reached:.1%}, loss {loss:.3f} to {left:.3f}, "
        f"weights {_distance(run.apart)}; {packages}"
    )


def interpreters(peers: Sequence[str], folder: Path, show: Callable[[str], None]) -> dict[str, str]:
    """The interpreters of Cutlayer and of the peers whose environments can be made."""
    found = {OURS: sys.executable}
    for peer in peers:
        begun = time.perf_counter()
        try:
            found[peer] = environment(peer, folder)
        except PeerError as error:
            show(f"{peer}: {error}")
        else:
            show(f"{peer}: environment {folder / peer}, ready in {time.perf_counter() - begun:.1f} s")
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; they name the machine as ``measure.set_up`` reads it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=list(PEERS), help="default: all")
    parser.add_argument("--workers", nargs="+", default=["1", "auto"], help="processes of each side (default: 1 auto)")
    parser.add_argument("--rounds", type=int, default=Work.rounds, help=f"timed rounds (default: {Work.rounds})")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument("--environments", type=Path, default=cache_folder(), help="where they are made and kept")
    parser.add_argument("--same-allocator", action="store_true", help="keep freed memory in the peers too")
    parser.set_defaults(device="cpu", precision="fp32", threads=1)
    options = parser.parse_args(arguments)
    try:
        counts = [cores() if count == "auto" else int(count) for count in options.workers]
    except ValueError:
        parser.error(f"--workers {' '.join(options.workers)}: expected integers >= 1, or auto")
    if min(counts) < 1 or options.rounds < 1 or options.repeats < 1:
        parser.error("--workers, --rounds and --repeats: expected integers >= 1")
    options.workers = list(dict.fromkeys(counts))
    return options


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print, work: Work | None = None) -> int:
    """Compare with the peers that the options name; exit status 1 if there is none to compare with.

    Args:
        work: in the place of the default.
    """
    begun, options = time.perf_counter(), parse(arguments)
    work = replace(work or Work(), rounds=options.rounds)
    show(f"{set_up(options)}; {options.repeats} repeats of {work.rounds} rounds, median (min .. max)")
    show(work.describe())
    pythons = interpreters(options.peer, options.environments, show)
    compared = False
    with tempfile.TemporaryDirectory(prefix="cutlayer-peers-", ignore_cleanup_errors=True) as folder:
        try:
            race = Race(give(Path(folder), work), pythons, allocator=options.same_allocator)
        except PeerError as error:
            show(f"{OURS}: {error}")
            return 1
        for workers in options.workers:
            compared |= compare(
                race, [peer for peer in options.peer if peer in pythons], workers, options.repeats, show
            )
    show(f"whole command {time.perf_counter() - begun:.0f} s")
    return 0 if compared else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is running ends too, and the folder goes
    sys.exit(main())
