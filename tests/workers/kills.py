"""Kills workers at random instants of runs of every method, and compares what comes out.

``python -m tests.workers.kills 100 fed_avg`` does it to 100 runs of each method that is named, or of all; with
``engine=ray`` among the names at a cluster of this machine. Prints a line for each method; exit status 1 where a run
gave other bits.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence

import torch

import cutlayer.algorithms as algorithms
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.workers.clients import WorkerClients
from tests.conftest import SMALL, same, weights

WORKERS = 2


def settings(name: str) -> list[str]:
    """A run of three rounds in which each client has steps to be killed between."""
    return [*SMALL, f"algorithm={name}", "model=cnn2", "rounds=3", "local_epochs=4", "optimizer.keep=run", "threads=1"]


class Killer(threading.Thread):
    """Kills one worker after another, each a random time after the one before, until it is told to stop."""

    def __init__(self, clients: WorkerClients, seed: int, most: float) -> None:
        super().__init__(daemon=True)
        self._clients, self._random, self._most = clients, random.Random(seed), most
        self.over = threading.Event()
        self.killed = 0

    def run(self) -> None:
        while not self.over.wait(self._random.uniform(0, self._most)) and self.killed < 2:
            workers = self._clients.pool.living()
            if workers:
                os.kill(self._random.choice(workers), signal.SIGKILL)
                self.killed += 1


def play(name: str, seed: int, most: float, keys: Sequence[str]) -> tuple[Federation, int]:
    """A run with workers of which up to two are killed; how many were."""
    federation = Federation(load_config([*settings(name), f"workers={WORKERS}", *keys]), clients=WorkerClients)
    assert isinstance(federation.clients, WorkerClients)
    killer = Killer(federation.clients, seed, most)
    killer.start()
    try:
        while not federation.done:
            federation.step()
    finally:
        killer.over.set()
        killer.join()
        federation.clients.close()
    return federation, killer.killed


def main(times: int, names: Sequence[str], keys: Sequence[str] = ()) -> int:
    """Kill in ``times`` runs of each method, with these keys besides; the number of runs that gave other bits."""
    torch.set_num_threads(1)
    wrong = 0
    for name in names:
        expected = Federation(load_config(settings(name)))
        start = time.perf_counter()
        while not expected.done:
            expected.step()
        took = time.perf_counter() - start
        kills = other = 0
        for seed in range(times):
            federation, killed = play(name, seed, 0.4 + took, keys)
            kills += killed
            other += not same(weights(federation), weights(expected))
        print(f"{name:<18} {times} runs, {kills} kills, {other} with other bits", flush=True)
        wrong += other
    return wrong


if __name__ == "__main__":
    keys = [word for word in sys.argv[2:] if "=" in word]
    some = [word for word in sys.argv[2:] if "=" not in word]
    every = [name for name in algorithms.names() if not algorithms.get(name).pooled]
    sys.exit(main(int(sys.argv[1]), some or every, keys) > 0)
