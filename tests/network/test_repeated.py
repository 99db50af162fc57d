"""What a round that was given up leaves behind, and what a server that is started again finds at its clients: nothing
that the result shows."""

from pathlib import Path
from typing import Any

import pytest

from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.local_clients import LocalClients
from cutlayer.runtime.rounds.schedule import RoundLostError, RoundReport
from tests.conftest import play, same, weights
from tests.network.serving import kept_rows, served

SETTING = ("algorithm=fsl_sage", "algorithm.align_epochs=2", "num_clients=2", "rounds=4")


@pytest.mark.parametrize("times", [1, 3])
def test_a_round_is_lost_and_repeated(configure, times: int) -> None:
    whole = play(Federation(configure(*SETTING)))
    lost: list[int] = []

    class Failing(LocalClients):
        may_repeat = True

        def train(self, cohort: list[int], round: int, *rest: Any) -> RoundReport:
            report = super().train(cohort, round, *rest)
            if round == 2 and len(lost) < times:
                lost.append(round)
                raise RoundLostError("lost client 0 of 2")
            return report

    federation = play(Federation(configure(*SETTING), clients=Failing))
    assert len(lost) == times
    assert same(weights(federation), weights(whole))
    assert federation.ledger.state_dict() == whole.ledger.state_dict()


def test_a_server_that_goes_on_finds_its_clients_as_they_were(configure, tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="the extra grpc is not installed")
    whole = play(Federation(configure(*SETTING)))
    with served(tmp_path, *SETTING) as federation:
        play(federation, 2)
        federation.checkpoint({})
        # This round counts for the clients, and is forgotten by the server.
        play(federation, 1)
    with served(tmp_path, *SETTING) as federation:
        assert federation.round == 2
        play(federation)
        found = weights(federation) | kept_rows(tmp_path, 2)
    assert same(found, weights(whole)), sorted(found.keys() ^ weights(whole).keys())


def test_what_the_test_sends_to_all_is_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc", reason="the extra grpc is not installed")
    from cutlayer.runtime.network.server.connection import Connection
    from cutlayer.runtime.network.wire import What

    sent: list[bytes] = []
    with served(tmp_path, "algorithm=fed_per", "num_clients=3", "rounds=1", "eval_interval=1") as federation:
        put = Connection._put

        def watching(self: Connection, piece: bytes | None) -> None:
            sent.extend([piece] if piece is not None and piece[1] == What.EVALUATE else [])
            put(self, piece)

        monkeypatch.setattr(Connection, "_put", watching)
        record, _ = federation.step()
    assert len(record.client_rows) == 3
    assert len(sent) == 3
    assert len({id(piece) for piece in sent}) == 1
