"""What the server reports of itself while it runs, in `network.json` in the run's folder, and who reads it.

Nothing here needs gRPC or torch: `status.py` reads the file on any machine that sees the folder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.reading import UnreadableError, read_json
from cutlayer.runtime.ground.text import one_line

T = TypeVar("T")

NETWORK = "network.json"
# Seconds since 1970 or of training, and bytes, that can be: the year 5138, and four thousand petabytes.
_LATEST, _MOST = 1e11, 2**62

Doing = Literal["absent", "idle", "working", "testing"]
ServerState = Literal["starting", "running", "finished", "stopped"]
_STATES = (*get_args(Doing), *get_args(ServerState))


@dataclass
class Seen:
    """What is known of a client.

    Attributes:
        state: absent, idle, working or testing. peer: where it is. since: when its state began (seconds since 1970).
        last: of its last word. up, down: bytes of messages, of this server process. joined: how often it has come.
        error: why it was last lost or refused. failed: when.
    """

    state: Doing = "absent"
    peer: str = ""
    since: float = 0.0
    last: float = 0.0
    up: int = 0
    down: int = 0
    joined: int = 0
    error: str = ""
    failed: float = 0.0

    def become(self, state: Doing) -> None:
        """Note what it does now."""
        if state != self.state:
            self.state, self.since = state, time.time()

    def fail(self, error: str) -> None:
        """Note why it was lost or refused."""
        self.error, self.failed = error, time.time()


@dataclass
class Status:
    """A run over the network at one moment.

    Attributes:
        state: starting: no client can join yet. stopped: by Ctrl-C or an error. title: algorithm, model and data set.
        round: rounds that are over. attempt: of the round that comes, from 1; 0 before it begins. repeats: rounds that
            were begun again, by this process.
        accuracy: of the last test, a fraction. payload, framed, up, down: bytes of training traffic up to the last
            round's end, as in ``results.json``; up and down as payload.
        wire_up, wire_down: bytes of all clients' messages, by this process. seconds: of training.
        waiting: for whom the server waits; "" if for nobody. waiting_since, began, time: seconds since 1970, of which
            ``began`` is when this process began to listen, and ``time`` when this was written.
        host, pid: of the server's process. refused: streams that were refused, and the last one's reason.
    """

    state: ServerState = "running"
    title: str = ""
    algorithm: str = ""
    model: str = ""
    dataset: str = ""
    round: int = 0
    rounds: int = 0
    attempt: int = 0
    repeats: int = 0
    accuracy: float | None = None
    payload: int = 0
    framed: int = 0
    up: int = 0
    down: int = 0
    wire_up: int = 0
    wire_down: int = 0
    seconds: float = 0.0
    waiting: str = ""
    waiting_since: float = 0.0
    address: str = ""
    tls: bool = False
    host: str = ""
    pid: int = 0
    began: float = 0.0
    time: float = 0.0
    refused: int = 0
    last_refused: str = ""
    clients: list[Seen] = field(default_factory=list[Seen])


def read_status_of(folder: Path) -> Status:
    """What the server of the run in a folder last wrote.

    Raises:
        ConfigError: it has written nothing that can be read.
    """
    try:
        status = _build(Status, asdict(Status()), read_json(folder, NETWORK))
        empty = asdict(Seen())
        status.clients = [_build(Seen, empty, each) for each in cast("list[Any]", status.clients)]
    except ValueError as error:
        why = error.why if isinstance(error, UnreadableError) else one_line(error)
        expected = f"the folder of a run over the network with a {NETWORK} that can be read ({why})"
        raise ConfigError("run", str(folder), expected) from None
    return status


def _build(kind: type[T], empty: Mapping[str, Any], known: Any) -> T:
    """A dataclass of the values that are of its fields' types, texts in one line; those missing are as in `empty`."""
    if not isinstance(known, dict):
        raise ValueError(f"{type(known).__name__} instead of a mapping")
    values = {name: value for name, value in cast("Mapping[str, Any]", known).items() if name in empty}
    for name, value in values.items():
        default: object = empty[name]
        number = isinstance(default, float) or name == "accuracy"
        wanted = (int, float) if number else (type(default),)
        if type(value) not in wanted and not (value is None and default is None):
            raise ValueError(f"{name} {value!r:.40}")
        # A time of day that no clock shows, and what no number of bytes is; NaN is in between nothing.
        if isinstance(value, int | float) and not 0 <= value <= (_LATEST if number else _MOST):
            raise ValueError(f"{name} {value!r:.40}")
        if isinstance(value, str):
            values[name] = one_line(value)
    if values.get("state", empty["state"]) not in _STATES:
        raise ValueError(f"state {values['state']!r:.40}")
    return kind(**values)


def was_finished(folder: Path) -> bool:
    """Whether the server before this one has informed its clients that the run is over."""
    try:
        return read_status_of(folder).state == "finished"
    except ConfigError:
        return False
