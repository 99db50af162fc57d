"""A client's side of a run over the network: its data, its parts of the model, and what it keeps between rounds."""

from __future__ import annotations

from pathlib import Path

from cutlayer.runtime.costs.cuts import prepared
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import DamagedError
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.network.client.kept import KeptState
from cutlayer.runtime.parties.store import Row, Store
from cutlayer.runtime.rounds.evaluator import ApartTests
from cutlayer.runtime.rounds.seats import Seats
from cutlayer.runtime.rounds.session import Session
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.scoring.scores import ClientScores
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.transport import GrpcTransport
from cutlayer.runtime.trust import Limit

# A server's model is bounded by what is taken as a message, which is where it comes in.
_HOW = "if you trust it, add: transport.max_message_mb={mb}"


class Site:
    """One client where it is.

    Args:
        config: the server's, with what this machine says for itself.
        folder: where the client's state is kept.
        download: whether published data that are not here may be downloaded.
    """

    def __init__(self, config: RunConfig, folder: Path, *, download: bool = True) -> None:
        assert config.client_id is not None
        assert isinstance(config.transport, GrpcTransport)
        limit = Limit(config.transport.max_message_mb * 1e6, _HOW)
        self.setup = setup = Setup(*prepared(config, limit=limit, download=download))
        if not config.client_id < setup.population:
            raise ConfigError("client_id", config.client_id, f"a client of the run, 0 to {setup.population - 1}")
        self.client = config.client_id
        self.kept = KeptState(folder)
        self._store = Store(None, device=setup.device)
        self._seats = Seats(setup, self._store)
        self._tests = ApartTests(setup, self._store)
        self._round = 0
        self._last: int | None = None

    @property
    def samples(self) -> int:
        """Number of the client's training samples."""
        return len(self.setup.partition.indices(self.client))

    @property
    def seconds(self) -> float:
        """That the client has computed in its rounds."""
        return self._seats.seconds

    def restore(self, last: int | None, needed: int | None) -> None:
        """Be as after the client's round ``last``, None for the initial state.

        Args:
            needed: the oldest round that may be asked for again; None while that is the initial state.

        Raises:
            ConfigError: the state of that round is not here.
        """
        store = self._store
        store.discard_all()
        if last != self._last:
            rows: dict[str, Row] = {}
            if last is not None:
                try:
                    rows = self.kept.read(last)
                except DamagedError as error:
                    expected = f"the folder with this client's state after its round {last + 1} ({error})"
                    raise ConfigError("save_dir", str(self.setup.config.save_dir), expected) from None
            store.replace(self.client, rows)
            self._last = last
        self.kept.forget(before=needed, after=last)

    def open(self, round: int) -> Session:
        """Begin the client's part of a round (from 0)."""
        self._round = round
        return self._seats.open(self.client, round)

    def keep(self) -> bool:
        """Keep what the round changed; whether there is anything that the client keeps."""
        store = self._store
        store.commit()
        rows = store.rows(self.client)
        if rows:
            self.kept.write(self._round, rows)
        self._last = self._round if rows else None
        return bool(rows)

    # ------------------------------------------------------------------ evaluation

    def scores(self, parts: Payload) -> ClientScores:
        """Test the client's own model, with the server's parts for the others."""
        self._tests.hold(parts)
        return self._tests.of_client(self.client)
