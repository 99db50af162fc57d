"""What the server tells of itself while it runs: `network.json` in the run's folder, and who reads it.

Nothing here needs gRPC or torch: `status.py` reads the file on any machine that sees the folder.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import replace_file
from cutlayer.runtime.ground.reading import UnreadableError, read_json
from cutlayer.runtime.ground.text import one_line

if TYPE_CHECKING:
    from cutlayer.runtime.network.server.remote_clients import RemoteClients
    from cutlayer.runtime.rounds.federation import Federation
    from cutlayer.runtime.settings import RunConfig

log = logging.getLogger(__name__)
T = TypeVar("T")

NETWORK = "network.json"
# Seconds from one writing to the next, at least; more where it takes more than this share of the time.
_PAUSE_S, _SHARE = 0.5, 0.02
# Seconds since 1970 or of training, and bytes, that can be: the year 5138, and four thousand petabytes.
_LATEST, _MOST = 1e11, 2**62

Doing = Literal["absent", "idle", "working", "testing"]
State = Literal["starting", "running", "finished", "stopped"]
_STATES = (*get_args(Doing), *get_args(State))


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

    state: State = "running"
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
    """What the server of the run in a folder last told.

    Raises:
        ConfigError: it has told nothing that can be read.
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


def announce(folder: Path, config: RunConfig) -> None:
    """Tell that a server has begun to load what it needs, unless the server before it has told of the run."""
    if (folder / NETWORK).exists():
        return
    now = time.time()
    status = replace(_about(config), state="starting", began=now, time=now)
    replace_file(folder / NETWORK, json.dumps(asdict(status), indent=1) + "\n", durable=False)


def is_told(folder: Path) -> bool:
    """Whether the server before this one has told its clients that the run is over."""
    try:
        return read_status_of(folder).state == "finished"
    except ConfigError:
        return False


def _about(config: RunConfig) -> Status:
    """What is known of a run before it begins."""
    return Status(
        title=config.title,
        algorithm=config.algorithm_name,
        model=config.model.name,
        dataset=f"{config.dataset.name}-{config.dataset.distribution}",
        rounds=config.rounds,
        host=socket.gethostname(),
        pid=os.getpid(),
    )


class StatusFile:
    """Keeps `network.json` up to date, from a thread of its own that sleeps until something has changed.

    A context manager; it never breaks the run: a file that cannot be written is a line of the log.

    Args:
        accuracy: of the last test, where the run goes on from a checkpoint.
    """

    def __init__(
        self, folder: Path, federation: Federation, clients: RemoteClients, accuracy: float | None = None
    ) -> None:
        self._path, self._federation, self._clients = folder / NETWORK, federation, clients
        sent = federation.ledger.training
        self._status = replace(
            _about(federation.config),
            round=federation.round,
            accuracy=accuracy,
            payload=sent().payload,
            framed=sent().framed,
            up=sent("up").payload,
            down=sent("down").payload,
            address=clients.hub.address,
            tls=clients.hub.secure,
            began=time.time(),
        )
        self._changed, self._over = threading.Event(), threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._keep, name="status", daemon=True)

    def __enter__(self) -> StatusFile:
        self._clients.watch = self.changed
        self._changed.set()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.state = "finished" if error is None else "stopped"
        self._over.set()
        self._changed.set()
        self._thread.join()

    def changed(self) -> None:
        """Something has changed; from any thread, and cheap enough for each message."""
        self._changed.set()

    # ------------------------------------------------------------------ in the thread

    def _keep(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            over = self._over.is_set()  # before it is written, so that the last state is
            began = time.monotonic()
            self._write()
            if over:
                return
            self._over.wait(max(_PAUSE_S, (time.monotonic() - began) / _SHARE))

    def _write(self) -> None:
        try:
            replace_file(self._path, json.dumps(asdict(self._now()), indent=1) + "\n", durable=False)
            self._failed = False
        except Exception as error:
            if not self._failed:
                log.warning("%s cannot be written, the run goes on: %s", self._path.name, error)
            self._failed = True

    def _now(self) -> Status:
        status, clients, hub, record = self._status, self._clients, self._clients.hub, self._clients.record
        if record is not None:
            status.round = record.round
            status.accuracy = clients.accuracy if clients.accuracy is not None else status.accuracy
            status.payload, status.framed = record.comm_load, record.comm_framed
            status.up, status.down = record.comm_up, record.comm_down
        status.attempt, status.repeats = clients.attempt, clients.repeats
        status.waiting, status.waiting_since = clients.waiting
        status.refused, status.last_refused = hub.refused
        status.clients = hub.seen
        status.wire_up = sum(each.up for each in hub.seen)
        status.wire_down = sum(each.down for each in hub.seen)
        status.seconds = self._federation.seconds["wall"]
        status.time = time.time()
        return status
