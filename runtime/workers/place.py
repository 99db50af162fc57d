"""Where the clients of a run are that has them on this machine."""

from __future__ import annotations

from cutlayer.runtime.rounds.place import ClientsPlace, Here
from cutlayer.runtime.settings import RunConfig


def local_place(config: RunConfig, *, everyone: bool = False) -> ClientsPlace:
    """In this process, or at workers; ``everyone`` as for these."""
    if config.workers == 1 and config.engine == "processes":
        return Here()
    from cutlayer.runtime.workers.clients import AtWorkers  # late: it loads what starts processes

    return AtWorkers(config, everyone=everyone)
