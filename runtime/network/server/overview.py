"""A run over the network as a picture in the terminal: how far it is, and who is there."""

from __future__ import annotations

import math
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from rich.console import Console, Group, OverflowMethod, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cutlayer.runtime.ground.text import one_line, printable
from cutlayer.runtime.ground.units import format_bytes
from cutlayer.runtime.network.server.status import Seen, Status, read_status_of
from cutlayer.runtime.records.console import format_seconds
from cutlayer.runtime.run_folder import is_owned, read_status

_STYLES = {"absent": "red", "working": "green", "testing": "cyan", "unknown": "dim", "over": "dim"}
_ORDER = ("working", "testing", "idle", "absent", "unknown", "over")
_PIDS, _AGES = 2**31, 1e10
_BESIDE_TITLE = 40
"""Columns for the bar and how far it is."""
_PLACE = 60
"""Characters of where a client is."""
_MOST = 2000
"""Clients that have a line of their own where nobody's terminal sets an end."""
_WIDE = 112  # columns from which errors have a column of their own
_HEADS = ("client", "state", "for", "last word", "up", "down", "joins", "from")
_STATE, _LEFT = 1, (1, 7)


@dataclass(frozen=True)
class View:
    """What is shown of a run.

    Attributes:
        alive: the server that wrote this still runs. starting: another one owns the folder, but wrote nothing yet.
        error: of a run that has failed, one line.
        now: seconds since 1970.
    """

    folder: Path
    status: Status
    alive: bool
    error: str
    now: float
    starting: bool = False

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.status.state == "finished"

    def state(self, client: Seen) -> str:
        """What a client does; of a server that does not run nothing is known."""
        return "over" if self.is_over else client.state if self.alive else "unknown"


def current_view(folder: Path) -> View:
    """The run in a folder as it is now.

    Raises:
        ConfigError: as ``read_status_of``.
    """
    owned = is_owned(folder)  # before the file is read: a server that ends meanwhile has written its last word
    status = read_status_of(folder)
    alive = owned and not (status.host == socket.gethostname() and _is_dead(status.pid))
    error = one_line(read_status(folder).get("error") or "")
    return View(folder, status, alive, error, time.time(), owned and not alive)


def _is_dead(pid: int) -> bool:
    if not 0 < pid < _PIDS:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return False


def picture(view: View, console: Console, *, fit: bool) -> RenderableType:
    """All of it.

    Args:
        fit: no more clients than the terminal has lines for: those with trouble first, and the others in a line.
    """
    head = _head(view, min(console.width, _WIDE))
    wide = console.width >= _WIDE
    room = _MOST
    if fit:
        used = len(console.render_lines(head, pad=False)) + 1  # and the table's own head
        room = max(1, console.size.height - used)
    numbers = _fitting(view, room, wide or not fit)
    parts = [head, *_rows(view, numbers, wide=wide, cut=fit)]
    rest = sorted(set(range(len(view.status.clients))) - set(numbers))
    if rest:
        parts.append(
            Text(f"... and {len(rest)} more: {_tally(view, rest)}", style="dim", no_wrap=True, overflow="ellipsis")
        )
    return Group(*parts)


# ---------------------------------------------------------------------- how far it is


def _head(view: View, width: int) -> RenderableType:
    status = view.status
    top = Table.grid(padding=(0, 1))
    top.width = width
    top.add_column(no_wrap=True, overflow="ellipsis")
    top.add_column(ratio=1, min_width=8)
    top.add_column(no_wrap=True, justify="right")
    accuracy = "no accuracy yet" if status.accuracy is None else f"{status.accuracy:.2%}"
    bar = ProgressBar(total=max(status.rounds, 1), completed=status.round)
    title = one_line(status.title, max(12, width - _BESIDE_TITLE))
    top.add_row(Text(title, style="bold"), bar, f"round {status.round}/{status.rounds}, {accuracy}")
    sent = f"sent {format_bytes(status.payload)}: up {format_bytes(status.up)}, down {format_bytes(status.down)}"
    wire = f"wire: up {format_bytes(status.wire_up)}, down {format_bytes(status.wire_down)}"
    if status.state == "starting":
        return Group(top, _server(view), Text(_nearby(view.folder), style="dim", overflow="fold"))
    spent = f"{format_seconds(status.seconds)} of training"
    if 0 < status.round < status.rounds and not view.is_over:
        left = status.seconds / status.round * (status.rounds - status.round)
        spent += f", about {format_seconds(left)} left" if left < _AGES else ""
    lines = [
        Text(f"{sent}; {wire}"),
        Text(f"{spent}; listening since {_clock(status.began, view.now)}"),
        _server(view),
        _doing(view),
    ]
    if status.refused:
        lines.append(Text(f"{status.refused} refused, the last one {status.last_refused}", style="yellow"))
    # Not cut: a folder is there to be copied.
    lines.append(Text(_nearby(view.folder), style="dim", overflow="fold"))
    return Group(top, *lines)


def _server(view: View) -> Text:
    status = view.status
    where = f"{status.address}, {'TLS' if status.tls else 'no TLS'}, process {status.pid} on {status.host}"
    if view.is_over:
        return Text(f"the run is over (server {where})", style="green")
    if view.alive and status.state == "starting":
        since = _age(view.now - status.began)
        return Text(f"the server is starting, since {since} (process {status.pid} on {status.host})", style="yellow")
    if view.alive:
        return Text(f"server {where}")
    if view.starting:
        return Text(f"the server is starting; what follows is of the one before it ({where})", style="yellow")
    why = f": {view.error}" if view.error else ""
    reported = f"its last word {_age(view.now - status.time)} ago"
    return Text(f"the server is not running{why} ({where}, {reported}); the same command resumes", style="bold red")


def _doing(view: View) -> Text:
    status = view.status
    counts = _tally(view, range(len(status.clients)))
    if view.is_over or not view.alive:
        return Text(f"{len(status.clients)} clients")
    if status.waiting:
        text = Text(f"waiting for {_age(view.now - status.waiting_since)} {status.waiting}", style="yellow")
    elif any(client.state == "testing" for client in status.clients):
        text = Text(f"test after round {status.round}: {counts}")
    elif status.attempt:
        attempt = f", attempt {status.attempt}" if status.attempt > 1 else ""
        text = Text(f"round {status.round + 1}{attempt}: {counts}")
    else:
        text = Text(f"{'after the last round' if status.round >= status.rounds else 'between rounds'}: {counts}")
    if status.repeats:
        text.append(f"; {status.repeats} repeated", style="yellow")
    return text


# ---------------------------------------------------------------------- who is there


def _rows(view: View, numbers: Sequence[int], *, wide: bool, cut: bool) -> list[Text]:
    """A line for each client, and one for its last error, below or beside it."""
    cells = [_HEADS, *(_cells(view, number) for number in numbers)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADS))]
    overflow: OverflowMethod = "ellipsis" if cut else "fold"
    rows: list[Text] = []
    for number, row in zip((None, *numbers), cells, strict=True):
        line = Text(style="" if number is not None else "dim", no_wrap=cut, overflow=overflow)
        for column, (text, width) in enumerate(zip(row, widths, strict=True)):
            padded = text.ljust(width) if column in _LEFT else text.rjust(width)
            line.append(padded + " ", _STYLES.get(text, "") if column == _STATE else "")
        error = "" if number is None else _error(view, number)
        if error and wide:
            line.append(error, "red")
        line.rstrip()
        rows.append(line)
        if error and not wide:
            rows.append(Text(f"{'':{widths[0]}} {error}", "red", no_wrap=cut, overflow=overflow))
    return rows


def _cells(view: View, number: int) -> tuple[str, ...]:
    client = view.status.clients[number]
    state = view.state(client)
    since = _age(view.now - client.since) if client.since and state == client.state else ""
    if not client.joined:
        return (str(number), state, since, "", "", "", "", "")
    moved = (format_bytes(client.up), format_bytes(client.down), str(client.joined))
    place = one_line(unquote(client.peer.partition(":")[2]), _PLACE)  # ipv4:10.0.0.2:40000, ipv6:%5B::1%5D:40000
    return (str(number), state, since, _age(view.now - client.last), *moved, place)


def _error(view: View, number: int) -> str:
    client = view.status.clients[number]
    return f"{_age(view.now - client.failed)} ago: {client.error}" if client.error else ""


def _fitting(view: View, room: int, wide: bool) -> list[int]:
    """As many clients as there are lines for: all of them in order, or those with trouble before the others."""
    numbers = range(len(view.status.clients))
    lines = [2 if _error(view, number) and not wide else 1 for number in numbers]
    if sum(lines) <= room:
        return [*numbers]
    found: list[int] = []
    room -= 1  # for the line that counts the others
    for number in sorted(numbers, key=lambda number: (_rank(view, number), number)):
        room -= lines[number]
        if room < 0:
            break
        found.append(number)
    return found


def _rank(view: View, number: int) -> int:
    """The smaller the sooner a person has to look."""
    client = view.status.clients[number]
    state = view.state(client)
    if state == "absent":
        return 0 if client.joined else 1
    return 2 if client.error else {"working": 3, "testing": 4}.get(state, 5)


def _tally(view: View, numbers: Sequence[int]) -> str:
    counts = Counter(view.state(view.status.clients[number]) for number in numbers)
    return ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])


# ---------------------------------------------------------------------- words


def _age(seconds: float) -> str:
    """How long something lasts, in as few letters as a column has."""
    seconds = max(0.0, seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{math.floor(seconds / size)} {unit}"
    return f"{math.floor(seconds)} s"


def _clock(then: float, now: float) -> str:
    """A time of day, with its date where that is another one."""
    day = "%H:%M" if time.localtime(then)[:3] == time.localtime(now)[:3] else "%Y-%m-%d %H:%M"
    return time.strftime(day, time.localtime(then))


def _nearby(path: Path) -> str:
    """The path from the current folder where it lies below it."""
    here = Path.cwd()
    return printable(path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path)
