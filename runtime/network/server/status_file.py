"""The server's own end of `network.json`: it is written from the start of the process to the end of the run."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cutlayer.runtime.ground.files import replace_file
from cutlayer.runtime.network.server.status import NETWORK, Status

if TYPE_CHECKING:
    from cutlayer.runtime.network.server.remote_clients import RemoteClients
    from cutlayer.runtime.rounds.federation import Federation
    from cutlayer.runtime.settings import RunConfig

log = logging.getLogger(__name__)

# Seconds from one writing to the next, at least; more where it takes more than this share of the time.
_PAUSE_S, _SHARE = 0.5, 0.02


def announce(folder: Path, config: RunConfig) -> None:
    """Report that a server has begun to load what it needs, unless the server before it has reported the run."""
    if (folder / NETWORK).exists():
        return
    now = time.time()
    status = replace(_about(config), state="starting", began=now, time=now)
    replace_file(folder / NETWORK, json.dumps(asdict(status), indent=1) + "\n", durable=False)


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
        accuracy: of the last test, where the run resumes from a checkpoint.
    """

    def __init__(
        self, folder: Path, federation: Federation, clients: RemoteClients, accuracy: float | None = None
    ) -> None:
        self._path, self._federation, self._clients = folder / NETWORK, federation, clients
        sent = federation.ledger.training
        self._status = replace(
            _about(federation.setup.config),
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
        self._clients.watch = self.mark_changed
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

    def mark_changed(self) -> None:
        """Note that something has changed; from any thread, and cheap enough for each message."""
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
                log.warning("%s cannot be written, the run continues: %s", self._path.name, error)
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
