"""Rounds of a few clients in this process that are no rounds of a run: to see what is sent, or what a step costs."""

from __future__ import annotations

from collections.abc import Callable

from cutlayer.datasets import Dataset, Partition
from cutlayer.runtime.ground import rng
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.rounds.schedule import SCHEDULES, Opener
from cutlayer.runtime.rounds.seats import Seats
from cutlayer.runtime.rounds.servers import make_server
from cutlayer.runtime.rounds.session import Channel, ServerParty, Session, Workplace
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.settings import RunConfig


class Trial:
    """Both parties of a configuration as they begin, and rounds of theirs; nothing is tested or written.

    Args:
        config, dataset, divide: as of ``Setup``.

    Raises:
        ConfigError: what cannot be built as configured.
    """

    def __init__(self, config: RunConfig, dataset: Dataset | None, divide: Callable[[Setup], Partition]) -> None:
        self.setup = Setup(config, dataset, divide)
        self._stores = {name: Store(None, name, device=self.setup.device) for name in ("clients", "server")}
        self._server = make_server(self.setup, self._stores["server"])
        self.seats = Seats(self.setup, self._stores["clients"])

    def play(self, cohort: list[int], round: int, channel: Channel, open: Opener | None = None) -> None:
        """One round (from 0) of a cohort.

        Args:
            open: begins a client's round, in place of ``seats.open``.
        """
        setup = self.setup
        seed = rng.derive(setup.config.seed, round=round, stream="trial")
        server = ServerParty(self._server, Workplace(setup.blueprint, seed))
        server.open_round(min(round, setup.config.rounds - 1), cohort)

        def seated(client: int) -> Session:
            return self.seats.open(client, round)

        SCHEDULES[setup.algorithm.schedule](cohort, open or seated, self._discard, server, channel)
        server.close_round()
        for store in self._stores.values():
            store.commit()

    def kept(self, client: int) -> dict[str, int]:
        """Bytes of what each party keeps of a client for its next round, by store: `clients` and `server`."""
        return {name: store.bytes_of(client) for name, store in self._stores.items()}

    def _discard(self, client: int) -> None:
        for store in self._stores.values():
            store.discard(client)
