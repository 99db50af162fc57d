"""Runs at a Ray cluster, compared with one process: what ``test_ray`` starts where that cluster is.

``python -m tests.workers.on_ray methods`` runs every method once, ``lost_machine`` loses a machine of the cluster in
mid-run, ``lost_actor`` an actor. Each prints one JSON object.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import cutlayer.algorithms as algorithms
from cutlayer.runtime.ground.ray_cluster import join_cluster
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.workers.clients import WorkerClients
from tests.conftest import SMALL, same, weights
from tests.workers.test_workers import recorded, settings


def federations(name: str, *keys: str) -> tuple[Federation, Federation]:
    """A run in one process, and the same at two actors."""
    of = [*SMALL, *settings(name), "rounds=2", "threads=1", *keys]
    return Federation(load_config(of)), Federation(load_config([*of, "workers=2", "engine=ray"]), clients=WorkerClients)


def close(made: Federation) -> None:
    """End its actors."""
    assert isinstance(made.clients, WorkerClients)
    made.clients.close()


def methods() -> dict[str, bool]:
    """Whether each method gives the same weights, metrics and bytes."""
    join_cluster("engine=ray", "RAY_ADDRESS", {"address": os.environ["RAY_ADDRESS"], "log_to_driver": False})
    found: dict[str, bool] = {}
    for name in algorithms.names():
        if algorithms.get(name).pooled:
            continue
        alone, made = federations(name)
        found[name] = recorded(alone) == recorded(made) and same(weights(alone), weights(made))
        close(made)
    return found


def machine_of(actor: int) -> int:
    """The process that is an actor's machine in the cluster: what has started it."""
    status = Path("/proc", str(actor), "status").read_text()
    return int(status.split("PPid:")[1].split()[0])


def is_head(machine: int) -> bool:
    """Whether the cluster ends with that machine."""
    return b"--head" in Path("/proc", str(machine), "cmdline").read_bytes()


def lost(machine: bool) -> dict[str, bool]:
    """Whether weights are the same where a machine with an actor, or an actor alone, is killed between two rounds."""
    found: dict[str, bool] = {}
    for name in ("sl_multi_server",) if machine else ("fed_avg", "sl_multi_server"):
        alone, made = federations(name, "rounds=3")
        assert isinstance(made.clients, WorkerClients)
        made.step()
        before = made.clients.pool.living()
        killed = before[0]
        if machine:
            killed = next(at for at in map(machine_of, before) if not is_head(at))
        os.kill(killed, signal.SIGKILL)
        recorded(made)
        recorded(alone)
        found[f"{name} same"] = same(weights(alone), weights(made))
        found[f"{name} replaced"] = len(set(made.clients.pool.living()) - set(before)) == 1
        close(made)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(methods() if sys.argv[1] == "methods" else lost(sys.argv[1] == "lost_machine")))
