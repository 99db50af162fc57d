"""The clients of a federation as its rounds see them, wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from cutlayer.runtime.messages.ledger import Ledger
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.records.history import RoundRecord
from cutlayer.runtime.rounds.evaluator import Evaluator
from cutlayer.runtime.rounds.schedule import RoundReport
from cutlayer.runtime.rounds.session import Serving
from cutlayer.runtime.rounds.setup import Setup
from cutlayer.runtime.rounds.tuner import Tuner
from cutlayer.runtime.scoring.scores import ClientScores, Measured


class Clients(Protocol):
    """Clients that go through rounds, all of them in this process or on machines of their own."""

    @property
    def may_repeat(self) -> bool:
        """Whether a round may be given up, and begun again."""
        ...

    @property
    def here(self) -> bool:
        """Whether they compute, and keep what they keep, in this process."""
        ...

    def can_train(self, client: int) -> bool:
        """Whether a client has a batch that can be trained on, as far as is known."""
        ...

    def gather(self, cohort: list[int], round: int) -> None:
        """Return when enough of the cohort are there, and there is room for them, to begin a round (from 0).

        Raises:
            ConfigError: it cannot begin as configured.
        """
        ...

    def train(
        self, cohort: list[int], round: int, drop: Callable[[int], None], server: Serving, ledger: Ledger
    ) -> RoundReport:
        """One round of a cohort.

        Args:
            round: from 0. drop: called with each client that is lost.

        Raises:
            RoundLostError: too few are left; the round has to be begun again.
        """
        ...

    def on_counted(self, report: RoundReport) -> None:
        """A round is over: what its survivors staged counts."""
        ...

    def on_recorded(self, record: RoundRecord) -> None:
        """A round has been tested, if it was time to, and its figures are complete."""
        ...

    def scores(self, evaluator: Evaluator) -> dict[int, ClientScores]:
        """What the round's test asks of each client."""
        ...

    def tuned(self, tuner: Tuner, clients: Sequence[int]) -> Iterator[list[Measured]]:
        """What fine-tuning finds of each of these clients, in their order."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to say of clients elsewhere."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be as at a checkpoint."""
        ...

    def on_checkpoint(self) -> None:
        """A checkpoint is in place: nothing from before it will be asked for again."""
        ...


MakeClients: TypeAlias = Callable[[Setup, Store], Clients]
"""Makes the clients of a setup; the rows that those in this process keep are in the store."""
