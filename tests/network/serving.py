"""A server in the test's own process, and clients in processes of their own on this machine."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar

import torch

from cutlayer.runtime.ground import forking
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.network.client.kept import KeptState
from cutlayer.runtime.rounds.federation import Federation
from tests.conftest import SMALL

SERVER = ("transport=grpc", "role=server", "transport.port=0", "transport.timeout=60", "transport.gather=0")
END_S = 60.0


def _be_clients(commands: Connection) -> None:
    """What a client process does: it is one client after another, and tells how each ended."""
    from cutlayer.runtime.network.client.program import work

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the server that it is forked from ignores it
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    while True:
        overrides = commands.recv()
        try:
            work(load_config(overrides), overrides)
            commands.send("")
        except Exception as error:
            commands.send(f"{type(error).__name__}: {error}")


class Client:
    """A client in a process of its own, which is used again for another one when it has ended."""

    _free: ClassVar[list[tuple[multiprocessing.process.BaseProcess, Connection]]] = []

    def __init__(self, overrides: Sequence[str]) -> None:
        if not self._free:
            context = forking.server(
                "cutlayer.runtime.rounds.federation",
                "cutlayer.runtime.launching.hydra_support",
                "cutlayer.runtime.experiment",
            )
            here, there = multiprocessing.Pipe()
            process = context.Process(target=_be_clients, args=(there,), daemon=True)
            process.start()
            there.close()
            self._free.append((process, here))
        self._process, self._commands = self._free.pop()
        self._commands.send(list(overrides))
        self._ended = False

    def error(self) -> str:
        """Wait for its end: why it failed, empty if it did not."""
        assert self._commands.poll(END_S), "the client has not ended"
        self._ended = True
        text = self._commands.recv()
        self._free.append((self._process, self._commands))
        return text

    def kill(self) -> None:
        """End it, wherever it is."""
        if not self._ended:
            self._process.kill()
            self._process.join(END_S)
            self._commands.close()
            self._ended = True


def start_client(client: int, port: int, save_dir: Path, *more: str) -> Client:
    """A client of the server on a port of this machine."""
    own = ("transport=grpc", "role=client", f"server=127.0.0.1:{port}", f"client_id={client}", "device=cpu")
    return Client((*own, f"save_dir={save_dir / str(client)}", *more))


@contextlib.contextmanager
def served(
    tmp_path: Path, *overrides: str, clients: int | None = None, of_clients: Sequence[str] = ()
) -> Generator[Federation]:
    """A federation on a small setting whose clients are other processes, with overrides of theirs; ends them all."""
    from cutlayer.runtime.network.server.remote_clients import RemoteClients

    config = load_config([*SMALL, *SERVER, *overrides])
    federation = Federation(config, tmp_path / "server", clients=lambda setup, _: RemoteClients(setup, "run"))
    federation.resume()
    remote = federation.clients
    assert isinstance(remote, RemoteClients)
    remote.listen(federation.round)
    started: list[Client] = []
    try:
        for client in range(federation.setup.population if clients is None else clients):
            started.append(start_client(client, remote.hub.port, tmp_path, *of_clients))
        yield federation
        remote.hub.close("the run is over")
        assert [client.error() for client in started] == [""] * len(started)
    finally:
        remote.hub.close("the test is over")
        for client in started:
            client.kill()


def kept_rows(tmp_path: Path, population: int) -> dict[str, torch.Tensor]:
    """All that the clients keep on their disks, named as in ``tests.conftest.weights``."""
    rows: dict[str, torch.Tensor] = {}
    for client in range(population):
        for mark in (tmp_path / str(client)).rglob("run"):
            state = KeptState(mark)
            if state.rounds():
                for row, tensors in state.read(state.rounds()[-1]).items():
                    rows |= {f"clients/{client}/{row}/{key}": tensor for key, tensor in tensors.items()}
    return rows
