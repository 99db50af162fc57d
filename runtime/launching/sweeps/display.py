"""What a sweep shows: one display of all its jobs while they run, and a table of every job at the end."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cutlayer.runtime.ground.screen import Screen
from cutlayer.runtime.ground.text import one_line, print_errors, print_lines, printable
from cutlayer.runtime.ground.units import format_bytes
from cutlayer.runtime.launching.sweeps.sweep import ALIVE, BAD, Job, JobFolder, JobProgress, Sweep
from cutlayer.runtime.records.console import format_seconds, on_terminal

Jobs = Sequence[tuple[Job, JobProgress]]

_REFRESH_S = 1.0
_LINES_S = 60.0
"""Seconds between two lines about the whole sweep where there is no terminal and no job has ended."""
_END_S = 20.0
_STYLES = {"finished": "green", "skipped": "green", "failed": "red", "killed": "red", "running": "cyan"}
_LOG_WIDTH = 500


class Display:
    """Shows a sweep from a thread of its own until `stop`; reads its files and nothing else.

    Args:
        sweep: what to show.
        mode: as the configuration's `progress`: bar draws on the terminal, lines prints, none is silent, auto chooses.
    """

    def __init__(self, sweep: Sweep, mode: str = "auto") -> None:
        self._sweep = sweep
        self._mode = ("bar" if on_terminal() else "lines") if mode == "auto" else mode
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._shared: tuple[str, ...] = shared_overrides(sweep.expected)

    def start(self) -> None:
        """Begin to show."""
        show = {"bar": self._draw, "lines": self._print_lines}.get(self._mode)
        if show is not None:
            self._thread = threading.Thread(target=show, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Show the last state and end."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait_for_processes(self) -> None:
        """Wait a while for the jobs' processes on this machine to end, and note those as interrupted."""
        end = time.monotonic() + _END_S
        here = socket.gethostname()
        for job, _ in self._sweep.jobs():
            if job.state in ALIVE and job.host == here:
                while _is_alive(job.pid) and time.monotonic() < end:
                    time.sleep(0.05)
                folder = JobFolder(self._sweep.path / "jobs" / str(job.number))
                if folder.read().state in ALIVE:
                    folder.update(state="interrupted")

    def _draw(self) -> None:
        console = Screen()
        with Live(self._picture(console), console=console, auto_refresh=False, transient=True) as live:
            while not self._ended.wait(_REFRESH_S):
                live.update(self._picture(console), refresh=True)

    def _picture(self, console: Console) -> RenderableType:
        jobs = self._sweep.jobs()
        active = [(job, done) for job, done in jobs if job.state in ALIVE]
        room = max(1, console.size.height - 3)
        more = [Text(f"... and {len(active) - room} more", style="dim")] if len(active) > room else []
        share = _share(jobs)
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_row(Text(self._headline(jobs, share), style="bold"), ProgressBar(total=1, completed=share))
        return Group(head, self._active(active[:room]), *more)

    def _active(self, active: Jobs) -> Table:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(justify="right", no_wrap=True, style="dim")
        table.add_column(ratio=3, no_wrap=True, overflow="ellipsis")
        table.add_column(ratio=1, min_width=8)
        for _ in range(4):
            table.add_column(justify="right", no_wrap=True)
        for job, done in active:
            what = Text(self.named(job))
            if job.state != "running":
                what.append(f"  {job.place or job.state}", style="dim")
                table.add_row(f"#{job.number}", what, "", "", "", "", "")
                continue
            bar = ProgressBar(total=max(job.rounds, 1), completed=done.round)
            left = done.seconds / done.round * (job.rounds - done.round) if done.round else None
            cells = (f"{done.round}/{job.rounds}", percent(done.accuracy), format_bytes(done.bytes))
            table.add_row(f"#{job.number}", what, bar, *cells, f"{format_seconds(left)} left" if left else "")
        return table

    def _headline(self, jobs: Jobs, share: float) -> str:
        spent = time.monotonic() - self._began
        left = f", about {format_seconds(spent / share * (1 - share))} left" if 0.01 < share < 1 else ""
        return f"{tally(jobs)}, {format_seconds(spent)}{left}"

    def _print_lines(self) -> None:
        reported: dict[int, str] = {}
        last = time.monotonic()
        more = True
        while more:
            more = not self._ended.wait(_REFRESH_S)
            jobs = self._sweep.jobs()
            for job, done in jobs:
                if reported.get(job.number, "queued") != job.state:
                    reported[job.number] = job.state
                    if job.state != "starting":
                        print_lines(f"{tally(jobs)} | #{job.number} {self.named(job)}: {outcome(job, done)}")
                        last = time.monotonic()
            if time.monotonic() - last > _LINES_S:
                last = time.monotonic()
                print_lines(self._headline(jobs, _share(jobs)))

    def named(self, job: Job) -> str:
        """What distinguishes the job from the others of its sweep."""
        return distinct(job, self._shared)


def shared_overrides(jobs: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """What all jobs of a sweep have in common, in order; nothing where there is only one."""
    return tuple(each for each in jobs[0] if all(each in job for job in jobs)) if len(jobs) > 1 else ()


def distinct(job: Job, shared: Sequence[str]) -> str:
    """The overrides that distinguish the job from the others."""
    return " ".join(_plain(each) for each in job.overrides if each not in shared) or "(no overrides)"


def _plain(override: str) -> str:
    """An override without Hydra's own signs: the + before it, and the backslashes that protect characters."""
    return printable(re.sub(r"\\(.)", r"\1", override.lstrip("+")))


def tally(jobs: Jobs) -> str:
    """The sweep in one phrase, e.g. "5/12 jobs done, 1 failed, 2 running"."""
    states = Counter(job.state for job, _ in jobs)
    failed = sum(states[state] for state in BAD)
    counts = {"failed": failed, "running": states["running"], "waiting": states["waiting"] + states["elsewhere"]}
    reported = [f"{count} {name}" for name, count in counts.items() if count]
    before = f" ({states['skipped']} of them before)" if states["skipped"] else ""
    return ", ".join([f"{sum(job.is_done for job, _ in jobs)}/{len(jobs)} jobs done{before}", *reported])


def outcome(job: Job, done: JobProgress) -> str:
    """A job's state in one line of text."""
    if job.state in BAD:
        return f"{job.state}: {job.error}"
    if job.state in ("finished", "skipped"):
        before = ", finished before" if job.state == "skipped" else f", {format_seconds(done.seconds)}"
        return f"{job.state}, {percent(done.accuracy)}, {format_bytes(done.bytes)}{before}"
    return f"{job.state} on {job.place}" if job.state == "running" else f"{job.state} {job.place}".rstrip()


def show_table(jobs: Jobs, sweep: Path | None, how_to_go_on: str = "") -> None:
    """Print every job: what it ran, its state, accuracy, bytes, time, the line of its error, and its folder."""
    terminal = sys.stdout.isatty()
    console = Screen(width=None if terminal else _LOG_WIDTH, soft_wrap=not terminal)
    shared = shared_overrides([job.overrides for job, _ in jobs])
    common = " ".join(_plain(each) for each in shared)
    style = box.ROUNDED if terminal else box.ASCII2
    table = Table(
        title=Text(f"all jobs: {common}") if common else None, title_justify="left", box=style, show_lines=False
    )
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("job", overflow="fold", ratio=1)
    for name in ("state", "rounds", "accuracy", "sent", "time"):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    for job, done in jobs:
        what = Text(distinct(job, shared))
        if job.error:
            what.append(f"\n{one_line(job.error, None)}", style="red")
        figures = ("", "", "", "")
        if done.round:
            figures = (str(done.round), percent(done.accuracy), format_bytes(done.bytes), format_seconds(done.seconds))
        table.add_row(str(job.number), what, Text(job.state, style=_STYLES.get(job.state, "")), *figures)
    console.print(table)
    # Below the table and not wrapped: a path must stay one word to be copied.
    for job, _ in jobs:
        if job.folder:
            console.print(Text(f"#{job.number:<{len(str(len(jobs)))}} {_nearby(Path(job.folder))}"), soft_wrap=True)
    kept = f"; logs and this table: {_nearby(sweep)}" if sweep else ""
    console.print(Text(tally(jobs) + kept), soft_wrap=True)
    failed = sum(job.state in BAD for job, _ in jobs)
    sys.stdout.flush()
    if failed:
        print_errors(f"{failed} of {len(jobs)} jobs failed; the same command tries them again")
    if how_to_go_on:
        states = Counter(job.state for job, _ in jobs)
        counts = f"{states['interrupted'] + states['elsewhere']} in part, {states['queued']} not begun"
        print_errors(f"interrupted ({counts}); {how_to_go_on}")


def percent(accuracy: float | None) -> str:
    """A share of one in percent, "-" for none."""
    return "-" if accuracy is None else f"{accuracy:.2%}"


def _share(jobs: Jobs) -> float:
    """How much of what the sweep had to do is done, 0 to 1, if all jobs were equally long."""
    jobs = [each for each in jobs if each[0].state != "skipped"]
    done = (1.0 if job.is_done else each.round / job.rounds if job.rounds else 0.0 for job, each in jobs)
    return sum(done) / len(jobs) if jobs else 1.0


def _nearby(path: Path) -> str:
    """The path from the current folder where it lies below it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
