"""What has been learnt so far: the parts of the model that the server holds, and those that clients keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from cutlayer.runtime.parties.blueprint import Parts
from cutlayer.runtime.parties.store import Row, Store
from cutlayer.runtime.rounds.setup import Setup


class Learnt:
    """The models of a run, as far as a party knows them.

    Args:
        held: gives the parts that the server holds. own: the rows that clients keep.
    """

    def __init__(self, setup: Setup, held: Callable[[], Parts], own: Store) -> None:
        self._setup, self._held, self._own = setup, held, own

    @property
    def held(self) -> Parts:
        """The parts that the server holds."""
        return self._held()

    def own(self, client: int, part: str) -> Row | None:
        """A part as a client keeps it; None where it keeps none."""
        return self._own.get(client, part)

    def is_own(self, part: str) -> bool:
        """Whether a client may have a part for itself: by the method, or because the server has none."""
        return part in self._setup.personal or part not in self.held

    def client_states(self, client: int, path: Sequence[str] | None = None) -> dict[str, Mapping[str, Tensor]]:
        """The parts of the model that a client uses, in order: its own ones, and for the others the server's.

        Args:
            path: names of the parts; None for those that make up the whole model.
        """
        states: dict[str, Mapping[str, Tensor]] = {}
        held, initial = self.held, self._setup.blueprint.for_client(client).initial
        for name in path or self._setup.algorithm.layout.whole:
            own = self.own(client, name) if self.is_own(name) else None
            shared = held[name].state_dict() if name in held else initial[name]
            states[name] = shared if own is None else {**shared, **own}
        return states
