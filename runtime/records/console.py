"""What a run shows: a bar with time left on a terminal, plain lines elsewhere, and a short table at the end.

The log always gets the plain lines. While a bar is alive, those handlers that write to the terminal leave them out.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from rich.text import Text

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.screen import Screen
from cutlayer.runtime.ground.units import format_bytes, format_percent
from cutlayer.runtime.records.history import RoundRecord, RunSummary

log = logging.getLogger(__name__)

MODES = ("auto", "bar", "lines", "none")
LINE_INTERVAL = 5.0
"""Seconds that pass at least between two plain lines."""
_LOG_WIDTH = 88
_TIME_WINDOW = 600.0


TableRow = tuple[str, str, str]
"""A line of a table: a name, a figure, a remark."""


@dataclass(frozen=True)
class Section:
    """What was measured after training, as a part of the table at a run's end."""

    title: str
    remark: str
    rows: Sequence[TableRow]


def check_mode(mode: str) -> None:
    """Raise ConfigError unless `mode` is one of `MODES`: `auto` is `bar` on a terminal, else `lines`."""
    if mode not in MODES:
        raise ConfigError("progress", mode, "a way to show progress", MODES)


def on_terminal() -> bool:
    """Whether a bar makes sense: a person watches, and no other job of a sweep draws on the same screen."""
    if multiprocessing.current_process().name != "MainProcess":
        return False
    return sys.stdout.isatty() and sys.stderr.isatty() and not Screen().is_dumb_terminal


class Progress:
    """Progress of one run over its rounds; a context manager.

    Args:
        rounds: number of rounds of the whole run.
        title: what runs, short, e.g. "fsl_sage simple_conv digits-iid".
        mode: one of `MODES`.
        done: rounds completed by an earlier process, when the run is resumed.
        console: where a bar is drawn; standard output by default.

    Raises:
        ConfigError: unknown mode.
    """

    def __init__(
        self, rounds: int, title: str = "", mode: str = "auto", done: int = 0, console: Console | None = None
    ) -> None:
        check_mode(mode)
        self._rounds, self._title, self._done = rounds, title, done
        self._mode = ("bar" if on_terminal() else "lines") if mode == "auto" else mode
        self._console = console
        self._accuracy: float | None = None
        self._began = self._last_line = time.monotonic()
        self._first = done + 1
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._quiet: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> Progress:
        self._began = self._last_line = time.monotonic()
        if self._mode == "bar":
            self._open_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            for handler, stream in self._quiet:
                handler.setStream(stream)
                handler.removeFilter(_not_progress)
            self._quiet.clear()

    def update(self, record: RoundRecord) -> None:
        """Show one completed round."""
        self._done = record.round
        if record.test_acc is not None:
            self._accuracy = record.test_acc
        if self._bar is not None:
            shown: dict[str, Any] = {
                "accuracy": format_percent(self._accuracy),
                "bytes": format_bytes(record.comm_load),
            }
            self._bar.update(self._task, completed=record.round, **shown)
        now = time.monotonic()
        is_edge = record.round in (self._first, self._rounds)
        if self._mode != "none" and (is_edge or now - self._last_line >= LINE_INTERVAL):
            self._last_line = now
            log.info("%s", self.line(record), extra={"progress": True})

    def within(self, fraction: float) -> None:
        """Show that `fraction` (0 to 1) of the current round is done, for rounds that take minutes."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done + fraction)

    def clients(self, done: int, of: int) -> None:
        """Show that `done` clients of `of` have been personalised, once all rounds are over."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"personalising {done}/{of}", total=of, completed=done)
        now = time.monotonic()
        if self._mode != "none" and now - self._last_line >= LINE_INTERVAL:
            self._last_line = now
            log.info("%s", f"{self._title}: personalised {done}/{of} clients", extra={"progress": True})

    def doing(self, text: str) -> None:
        """Show what is measured once all rounds are over."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        now = time.monotonic()
        if self._mode != "none" and now - self._last_line >= LINE_INTERVAL:
            self._last_line = now
            log.info("%s", f"{self._title}: {text}", extra={"progress": True})

    def line(self, record: RoundRecord) -> str:
        """One round in one plain line."""
        done = record.round - self._first + 1
        each = (time.monotonic() - self._began) / max(done, 1)
        width = len(str(self._rounds))
        parts = [
            f"{self._title}: " * bool(self._title) + f"round {record.round:>{width}}/{self._rounds}",
            f"accuracy {format_percent(self._accuracy)}",
            *([] if record.train_loss is None else [f"loss {record.train_loss:.4f}"]),
            f"sent {format_bytes(record.comm_load)}",
            f"{format_seconds(each)} a round",
        ]
        if record.round < self._rounds:
            parts.append(f"{format_seconds(each * (self._rounds - record.round))} left")
        return ", ".join(parts)

    def _open_bar(self) -> None:
        self._bar = RichProgress(
            TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=3)
            ),
            BarColumn(bar_width=None, table_column=Column(ratio=4, min_width=8)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[accuracy]}", style="green", table_column=Column(no_wrap=True, justify="right")),
            TextColumn("{task.fields[bytes]}", style="cyan", table_column=Column(no_wrap=True, justify="right")),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left", table_column=Column(no_wrap=True)),
            console=self._console or Screen(),
            expand=True,
            # Rounds differ in length (evaluation, alignment): the default window of 30 s makes the estimate jump.
            speed_estimate_period=_TIME_WINDOW,
        )
        shown: dict[str, Any] = {"accuracy": format_percent(None), "bytes": format_bytes(0)}
        self._task = self._bar.add_task(self._title, total=self._rounds, completed=self._done, **shown)
        streams = (sys.stdout, sys.stderr)
        self._bar.start()
        for handler in _terminal_handlers(streams):
            self._quiet.append((handler, handler.stream))
            # rich has put a proxy here that prints above the bar instead of through it.
            handler.setStream(sys.stdout if handler.stream is streams[0] else sys.stderr)
            handler.addFilter(_not_progress)


@dataclass(frozen=True)
class RunFiles:
    """What a finished run points its user to: its folder, and its first picture if there is one."""

    folder: Path
    picture: Path | None = None


def show_summary(
    summary: RunSummary,
    files: RunFiles | None = None,
    title: str = "",
    mode: str = "auto",
    console: Console | None = None,
    sections: Sequence[Section] = (),
) -> None:
    """Show the table at a run's end: on the terminal in colour, in the log as text; nowhere with mode "none".

    Args:
        summary: from `Results.finish`.
        files: where the results lie.
        title: what ran.
        mode: as in `Progress`.
        console: where to draw; standard output by default.
        sections: what was measured after training.
    """
    if mode == "none":
        return
    text = io.StringIO()
    _print(
        Screen(file=text, width=_LOG_WIDTH, color_system=None),
        summary_table(summary, title, box.ASCII2, sections),
        files,
    )
    handlers: list[logging.StreamHandler[Any]] = []
    if mode == "bar" or on_terminal():
        _print(console or Screen(), summary_table(summary, title, sections=sections), files)
        handlers = _terminal_handlers((sys.stdout, sys.stderr))
    for handler in handlers:
        handler.addFilter(_not_progress)
    log.info("%s", text.getvalue().rstrip(), extra={"progress": True, "lines": True})
    for handler in handlers:
        handler.removeFilter(_not_progress)


def summary_table(
    summary: RunSummary,
    title: str = "",
    style: box.Box = box.ROUNDED,
    sections: Sequence[Section] = (),
) -> Table:
    """Accuracy, what was measured after training, communication by direction and kind, and time by party."""
    table = Table(title=title or None, title_style="bold", box=style, show_header=False, title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True, style="bold")
    table.add_column("", style="dim")
    loss = "" if summary.final_loss is None else f"test loss {summary.final_loss:.4f}"
    table.add_row("final accuracy", format_percent(summary.final_acc), loss)
    table.add_row(
        "best accuracy",
        format_percent(summary.best_acc),
        f"in round {summary.best_round}" if summary.best_round else "",
    )
    for section in sections:
        table.add_section()
        table.add_row(section.title, "", section.remark)
        for row in section.rows:
            table.add_row(*row)
    table.add_section()
    load, framed = format_bytes(summary.comm_load), format_bytes(summary.comm_framed)
    table.add_row("communication", load, f"of training, as payload; {framed} on the wire" if summary.comm_load else "")
    for direction in ("up", "down"):
        for kind, (payload, _) in sorted(summary.traffic.get(direction, {}).items()):
            table.add_row(f"  {direction}: {kind}", format_bytes(payload), _per_round(payload, summary.rounds))
    table.add_section()
    table.add_row("time", format_seconds(summary.time_wall), f"{summary.rounds} rounds")
    shares = {"clients": summary.time_client, "server": summary.time_server, "evaluation": summary.time_eval}
    shares["other"] = max(0.0, summary.time_wall - sum(shares.values()))
    for name, seconds in shares.items():
        share = seconds / summary.time_wall if summary.time_wall > 0 else 0.0
        table.add_row(f"  {name}", format_seconds(seconds), f"{share:.0%}")
    return table


def format_seconds(seconds: float) -> str:
    """A duration in words, e.g. "0.21 s", "48 s", "3 min 20 s", "5 h 12 min"."""
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def show_rows(rows: Sequence[TableRow], folder: Path, title: str = "", mode: str = "auto") -> None:
    """Print what was measured of a saved run; nothing with mode "none"."""
    if mode == "none":
        return
    table = Table(title=title or None, title_style="bold", box=box.ROUNDED, show_header=False, title_justify="left")
    for column, style in enumerate(("", "bold", "dim")):
        longest = max(cell_len(row[column]) for row in rows) if column < 2 else None
        table.add_column("", style=style, no_wrap=column < 2, min_width=longest, overflow="fold")
    for row in rows:
        table.add_row(*row)
    _print(Screen(), table, RunFiles(folder))


def stamp_lines() -> None:
    """Put date and time before the lines of this process's log on the terminal, for one that runs for days.

    Not where they go to the journal of systemd, which does the same. The log in a run's folder has them in any case.
    """
    for handler in _terminal_handlers((sys.stdout, sys.stderr)):
        if not _is_journal(handler.stream):
            handler.setFormatter(_Stamped())


class _Stamped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        is_table = text.startswith("\n")
        return text if is_table else f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.created))} {text}"


def _is_journal(stream: Any) -> bool:
    try:
        where = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{where.st_dev}:{where.st_ino}"


def _print(console: Console, table: Table, files: RunFiles | None) -> None:
    console.print()
    console.print(table)
    if files is not None:
        # Not wrapped and not styled in parts: a path must stay one word to be copied or clicked.
        console.print(Text(f"results  {_nearby(files.folder)}"), soft_wrap=True)
        if files.picture is not None:
            console.print(Text(f"picture  {_nearby(files.picture)}"), soft_wrap=True)


def _nearby(path: Path) -> Path:
    """The path from the current folder where it lies below it: short, and good to paste."""
    here = Path.cwd()
    return path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path


def _per_round(count: int, rounds: int) -> str:
    return f"{format_bytes(count / rounds)} a round" if rounds else ""


def _terminal_handlers(streams: tuple[Any, ...]) -> list[logging.StreamHandler[Any]]:
    """The handlers that a message of this module reaches and that write to one of `streams`."""
    found: list[logging.Handler] = []
    logger: logging.Logger | None = log
    while logger is not None:
        found += logger.handlers
        logger = logger.parent if logger.propagate else None
    return [cast("logging.StreamHandler[Any]", each) for each in found if getattr(each, "stream", None) in streams]


def _not_progress(record: logging.LogRecord) -> bool:
    return not getattr(record, "progress", False)
