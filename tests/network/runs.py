"""A federation on the hosts of a test network, started by the command lines that a user would give."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cutlayer.runtime.experiment import run
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.run_folder import RunFolder
from tests.killing import left
from tests.network.programs import PATIENCE_S, Network, Program
from tests.places import ROOT, program

SETTING = (
    *("dataset=digits", "model=mlp", "model.projector.hidden=16", "model.projector.width=16", "batch_size=100"),
    *("num_clients=3", "checkpoint_interval=1"),
)
# A link that is cut, or a process that hangs, is known as lost after four seconds, and by nothing else than the probes.
LINKS = ("transport.keepalive=2", "transport.timeout=600")
OWN = ("device=cpu", "threads=1")


class Federation:
    """The processes of one run and what they leave.

    Args:
        settings: of the run, in the server's command line.
        data: of each client's command line; the server's stand in ``settings``.
        certificates: whether the parties know each other by certificates, each with files of its own.
    """

    def __init__(
        self,
        network: Network,
        folder: Path,
        settings: Sequence[str],
        data: Callable[[int], Sequence[str]] = lambda client: ("dataset=digits",),
        certificates: bool = True,
    ) -> None:
        self.network, self.folder = network, folder
        self._settings, self._data = tuple(settings), data
        self._certificates = certificates
        if certificates:
            self._certify()
        self._results: Path | None = None
        self.server: Program
        self.clients: dict[int, Program] = {}

    def _certify(self) -> None:
        made, clients = self.folder / "certs", len(self.network.clients)
        order = (f"server={self.network.listen}", f"clients={clients}")
        subprocess.run([*program("certificates"), made, *order], cwd=ROOT, capture_output=True, check=True)
        for party in ("server", *(f"client-{client}" for client in range(clients))):
            own = self.folder / f"certs-{party}"
            own.mkdir()
            for file in ("ca.pem", f"{party}.pem", f"{party}.key"):
                shutil.copy(made / file, own)

    def _both(self, party: str) -> tuple[str, ...]:
        """What is said to the server and to each client."""
        trust = f"certificates={self.folder}/certs-{party}" if self._certificates else "insecure=true"
        return ("transport=grpc", f"transport.{trust}", *LINKS, *OWN, f"save_dir={self.folder / party}")

    def start(self) -> None:
        """Start the server and every client."""
        self.start_server()
        for client in range(len(self.network.clients)):
            self.start_client(client)

    def start_server(self) -> None:
        """Start the server, or start it again."""
        network = self.network
        here = ("role=server", f"transport.host={network.listen}", f"transport.port={network.port}")
        self.server = network.server.start(
            [*program("main"), *here, *self._both("server"), *self._settings],
            self.folder / "server.txt",
        )

    def start_client(self, client: int) -> None:
        """Start a client, or start it again."""
        address, port = self.network.dial(client)
        here = ("role=client", f"server={address}:{port}", f"client_id={client}", *self._data(client))
        self.clients[client] = self.network.clients[client].start(
            [*program("main"), *here, *self._both(f"client-{client}")],
            self.folder / f"client-{client}.txt",
        )

    @property
    def results(self) -> Path | None:
        """The run's folder at the server, once there is one."""
        if self._results is None:
            self._results = next((mark.parent for mark in (self.folder / "server").rglob("identity")), None)
        return self._results

    @property
    def rounds(self) -> int:
        """Completed so far, by the table that grows by a line with each."""
        table = None if self.results is None else self.results / "metrics.csv"
        return max(0, table.read_text().count("\n") - 1) if table is not None and table.exists() else 0

    def wait(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> None:
        """Wait for something to come true while the server and all clients are there.

        Raises:
            AssertionError: the time is over, or one of them has ended badly; with what all of them said.
        """
        end = time.monotonic() + seconds
        while not condition():
            parties = (self.server, *self.clients.values())
            if time.monotonic() > end or any(program.status for program in parties):
                raise AssertionError(f"not {what} in {seconds:g} s\n" + "\n".join(each.tail for each in parties))
            time.sleep(0.01)

    def after_round(self, number: int) -> None:
        """Wait until so many rounds are complete."""
        self.wait(lambda: self.rounds >= number, f"after round {number}")

    def in_turn_of(self, client: int, sent_bytes: int = 1500) -> None:
        """Wait until a client has sent so much from now on: it is at work on a round."""
        link = self.network.clients[client].link
        before = link.traffic().sent_bytes
        self.wait(lambda: link.traffic().sent_bytes >= before + sent_bytes, f"client {client} at work")

    @contextmanager
    def losing(self, *clients: int) -> Generator[None]:
        """What is done inside makes the server lose these clients: wait until it has."""
        before = [self._losses(client) for client in clients]
        yield
        for client, known in zip(clients, before, strict=True):
            self.wait(lambda c=client, k=known: self._losses(c) > k, f"client {client} given up")

    def _losses(self, client: int) -> int:
        return self.server.text.count(f"client {client} is gone")

    def finish(self, seconds: float = PATIENCE_S) -> Path:
        """Wait for the end of the run, which all parties have to see; the folder with what it left."""
        self.wait(lambda: self.server.status is not None, "over", seconds)
        for each in (self.server, *self.clients.values()):
            each.finish(20)
        assert self.results is not None
        return self.results

    def clients_of(self, number: int) -> set[int]:
        """The clients that finished a round, by the uploads that were charged."""
        assert self.results is not None
        rows = [row.split(",") for row in (self.results / "communication.csv").read_text().splitlines()[1:]]
        return {int(row[4]) for row in rows if row[:3] == [str(number), "up", "metrics"]}


def undisturbed(folder: Path, settings: Sequence[str]) -> Path:
    """The same run in one process; the folder with what it left."""
    config = load_config([*settings, *OWN, "progress=none"])
    with RunFolder.claim(folder / "run", config.identity(), save_dir=folder) as claimed:
        run(config, claimed)
    return claimed.path


def differing(one: Path, other: Path) -> list[str]:
    """Which parts of what two runs left are not the same, to the bit of each weight; times aside."""
    here, there = left(one), left(other)
    # A checkpoint has the rows of clients' states only where clients are in the same process.
    return [key for key in here.keys() | there.keys() if key != "checkpoint" and here.get(key) != there.get(key)]
