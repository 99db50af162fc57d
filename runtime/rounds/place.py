"""Where the clients of a run are, as what runs it, or measures it later, sees them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.rounds.clients import Clients
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.local_clients import LocalClients
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.settings import RunConfig


class ClientsPlace(Protocol):
    """Where the clients of a run are."""

    def clients(self, setup: Setup, store: Store) -> Clients:
        """The clients of the run's federation, see ``MakeClients``."""
        ...

    def check(self, setup: Setup) -> None:
        """Raise ConfigError for what cannot be measured with clients there."""
        ...

    @property
    def processes(self) -> int:
        """How many of them compute side by side on this machine."""
        ...

    def connected(self, federation: Federation, accuracy: float | None) -> AbstractContextManager[None]:
        """Clients take part within the block; ``accuracy`` is that of the last test, if there was one."""
        ...


def here(_: RunConfig) -> ClientsPlace:
    """In this process, whatever the configuration says."""
    return Here()


class Here:
    """In this process; see ``ClientsPlace``."""

    def clients(self, setup: Setup, store: Store) -> Clients:
        return LocalClients(setup, store)

    def check(self, setup: Setup) -> None:
        pass

    @property
    def processes(self) -> int:
        return 1

    def connected(self, federation: Federation, accuracy: float | None) -> AbstractContextManager[None]:
        return nullcontext()
