"""Where clients of this process sit, and what data they have."""

from __future__ import annotations

from cutlayer.runtime.ground import rng
from cutlayer.runtime.parties.contexts import ClientContext, ClientState, Seat
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.rounds.session import LocalSession, Session, Workplace
from cutlayer.runtime.rounds.setup import Setup


class Seats:
    """Clients of one process, opened one after another; a seat, with a set of parts, is used by many.

    Args:
        store: where the clients keep their rows, but for those that are opened with rows of their own.

    Attributes:
        seconds: that the clients have computed.
    """

    def __init__(self, setup: Setup, store: Store) -> None:
        self.setup, self._store = setup, store
        self.seats: list[Seat] = []
        self.seconds: float = 0.0

    def open(self, client: int, round: int, state: ClientState | None = None) -> Session:
        """Begin a client's round (from 0), on a seat that is free."""
        seat, setup = self.seat(), self.setup
        context = self.context(client, round, seat, state)
        seed = rng.derive(setup.config.seed, round=round, client=client, stream="client")

        def leave(seconds: float) -> None:
            seat.taken = False
            self.seconds += seconds

        work = Workplace(setup.blueprint, seed, lambda: setup.memory(f"the round of client {client}"))
        return LocalSession(setup.algorithm, context, work, leave)

    def seat(self) -> Seat:
        """A seat that is free."""
        seat = next((seat for seat in self.seats if not seat.taken), None)
        if seat is None:
            blueprint = self.setup.blueprint
            seat = Seat(blueprint, blueprint.parts(self.setup.algorithm.layout.client))
            self.seats.append(seat)
        return seat

    def context(self, client: int, round: int, seat: Seat, state: ClientState | None = None) -> ClientContext:
        """A client in a round, on a seat that it takes."""
        seat.take(self.setup.blueprint.for_client(client))
        return self.seated(client, round, seat, state)

    def seated(self, client: int, round: int, seat: Seat, state: ClientState | None = None) -> ClientContext:
        """A client in a round, on a seat that has been taken."""
        setup = self.setup
        return ClientContext(
            seat,
            id=client,
            round=round,
            seed=setup.config.seed,
            config=setup.config.algorithm,
            state=state or ClientState(self._store, client),
            data=setup.data(client),
            steps=setup.steps(client),
            pace=setup.pace(client),
        )

    def rows_of(self, client: int) -> frozenset[str]:
        """The names of what a client has kept."""
        return self._store.names(client)
