"""Where the clients of a run are that come over the network, as the run at the server sees it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.network.server.remote_clients import RemoteClients
from cutlayer.runtime.network.server.status import was_finished
from cutlayer.runtime.network.server.status_file import StatusFile, announce
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.run_folder import RunFolder
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.transport import GrpcTransport

log = logging.getLogger(__name__)


class Elsewhere:
    """On machines of their own; that the run begins is written for ``status.py`` at once."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self._folder = folder
        announce(folder.path, config)

    def clients(self, setup: Setup, store: Store) -> RemoteClients:
        """The clients of the run's federation; they may come once ``connected``."""
        self._clients = RemoteClients(setup, self._folder.path.name, self._folder.path)
        return self._clients

    def check(self, setup: Setup) -> None:
        """Raise ConfigError for what cannot be measured after training where clients are elsewhere."""
        config = setup.config
        where = "with transport=grpc, where clients keep their data and their parts for themselves"
        if config.personalize.part is not None:
            raise ConfigError("personalize.part", config.personalize.part, f"null {where}")
        if config.probe.after and setup.personal:
            raise ConfigError("probe.after", True, f"false {where}")
        if config.generate.after and setup.personal:
            raise ConfigError("generate.after", True, f"false {where}")

    @property
    def processes(self) -> int:
        """The server alone."""
        return 1

    @contextlib.contextmanager
    def connected(self, federation: Federation, accuracy: float | None) -> Generator[None]:
        """Clients can join within the block.

        Args:
            accuracy: of the last test, where the run resumes from a checkpoint.
        """
        transport, clients, folder = federation.setup.config.transport, self._clients, self._folder.path
        assert isinstance(transport, GrpcTransport)
        reported, over = was_finished(folder), federation.done
        clients.listen(federation.round)
        population = federation.setup.population
        log.info("listening on %s port %d for %d clients", transport.host, clients.hub.port, population)
        with StatusFile(folder, federation, clients, accuracy):
            try:
                yield
            except BaseException:
                clients.hub.close("the server has stopped", later=True)
                raise
            try:
                if not (over and reported):
                    clients.disconnect_all(everyone=over)
            finally:
                clients.hub.close("the run is over")
