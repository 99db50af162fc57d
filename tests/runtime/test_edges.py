"""Limits at their edges: exactly the limit passes, one more does not, in the units that the documentation gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cutlayer.runtime.costs.cuts import list_cuts, prepared
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.messages.bounds import Limits, WireError
from cutlayer.runtime.messages.frames import chunks
from cutlayer.runtime.messages.ledger import Count
from cutlayer.runtime.network.wire import CHUNK_BYTES, Head, Incoming, What, outgoing
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.transport import GrpcTransport

SETTING = ("algorithm=fed_avg", "num_clients=3", "rounds=4")


def ends_after(configure, limit: str) -> int:
    federation = Federation(configure(*SETTING, f"comm_threshold_mb={limit}"))
    while not federation.done:
        federation.step()
    return federation.round


def test_the_budget_of_bytes_is_spent_by_the_byte_that_reaches_it(configure) -> None:
    """In MB of 10^6 bytes."""
    federation = Federation(configure(*SETTING))
    federation.step()
    spent = federation.ledger.training().payload
    model = sum(value.numel() * 4 for value in federation.setup.blueprint.initial["model"].values())
    assert spent == 2 * 3 * model
    two = 2 * spent
    assert ends_after(configure, f"{two / 1e6:.6f}") == 2
    assert ends_after(configure, f"{(two + 1) / 1e6:.6f}") == 3
    assert ends_after(configure, f"{(two - 1) / 1e6:.6f}") == 2


@pytest.fixture(scope="module")
def federation(configure) -> Federation:
    return Federation(configure(*SETTING))


@given(st.integers(2, 10**15))
@example(123)  # 0.000123 * 10^6 is more than 123
def test_a_budget_is_met_by_its_number_of_bytes_whatever_floating_point_makes_of_it(federation, count: int) -> None:
    for spent, done in ((count - 1, False), (count, True)):
        federation.ledger._totals = {("up", "model", "model"): Count(spent, spent)}
        federation.setup.config = replace(federation.setup.config, comm_threshold_mb=count / 1e6)
        assert federation.done == done


def test_rows_of_clients_up_to_the_limit_are_in_memory(tmp_path: Path) -> None:
    row = {"w": torch.zeros(250)}
    for limit, held in ((3000, 3000), (2999, 2000)):
        store = Store(tmp_path / str(limit), memory_limit=limit)
        for client in range(3):
            store.put(client, "w", row)
        store.commit()
        assert store.memory_bytes == held
        assert len(list((tmp_path / str(limit)).glob("*"))) == (3000 - held) // 1000


def test_the_memory_of_rows_is_given_in_mb(configure, tmp_path: Path) -> None:
    federation = Federation(configure(*SETTING, "state_memory_mb=2.5"), tmp_path)
    assert {store._limit for store in federation.stores.values()} == {2_500_000}


# ------------------------------------------------------------------ messages between machines

FRAME: Payload = {"a": torch.arange(6, dtype=torch.float32), "n": 3}


def received(pieces, limits: Limits) -> dict | None:
    incoming, found = Incoming(limits, set(What)), None
    for piece in pieces:
        found = incoming.feed(piece)
    return None if found is None else dict(found.body)


def body_bytes(head: Head, body: object) -> int:
    return sum(map(len, outgoing(head, body))) - 16 - len(head.kind.encode())


def test_bytes_of_a_frame() -> None:
    head = Head(What.TELL, kind="smashed")
    size = body_bytes(head, FRAME)
    assert received(outgoing(head, FRAME), Limits(message_bytes=size)) is not None
    with pytest.raises(WireError, match=f"a frame of {size} bytes; 8 to {size - 1} are accepted"):
        received(outgoing(head, FRAME), Limits(message_bytes=size - 1))


def test_bytes_of_a_text() -> None:
    head, text = Head(What.ROUND), {"round": 12}
    size = body_bytes(head, text)
    assert received(outgoing(head, text), Limits(message_bytes=0, text_bytes=size)) == text
    with pytest.raises(WireError, match=f"a text of {size} bytes; {size - 1} are accepted"):
        received(outgoing(head, text), Limits(message_bytes=0, text_bytes=size - 1))


def test_bytes_of_a_header() -> None:
    head = Head(What.TELL)
    size = body_bytes(head, FRAME) - 8 - 6 * 4 - 8
    limits = Limits(message_bytes=2**20, header_bytes=size)
    assert received(outgoing(head, FRAME), limits) is not None
    with pytest.raises(WireError, match=f"a header of {size} bytes"):
        received(outgoing(head, FRAME), Limits(message_bytes=2**20, header_bytes=size - 1))


def test_dimensions_of_a_tensor() -> None:
    for dimensions in (3, 4):
        body = {"a": torch.zeros([1] * dimensions)}
        if dimensions == 3:
            assert received(outgoing(Head(What.TELL), body), Limits(message_bytes=2**20, dimensions=3)) is not None
            continue
        with pytest.raises(WireError, match="has 4 dimensions; 3 are accepted"):
            received(outgoing(Head(What.TELL), body), Limits(message_bytes=2**20, dimensions=3))


@pytest.mark.parametrize("value", [1, torch.ones(1)], ids=["numbers", "tensors"])
def test_number_of_tensors(value: object) -> None:
    """Each of one dimension less than it may have, so that the count of signs alone does not decide."""
    for count in (5, 6):
        body = {str(index): value for index in range(count)}
        if count == 5:
            assert received(outgoing(Head(What.TELL), body), Limits(message_bytes=2**20, tensors=5)) is not None
            continue
        with pytest.raises(WireError, match="a header of more than 5 tensors"):
            received(outgoing(Head(What.TELL), body), Limits(message_bytes=2**20, tensors=5))


def test_bytes_of_a_name() -> None:
    for count in (512, 513):
        name = "é" * 256 + "a" * (count - 512)
        if count == 512:
            found = received(outgoing(Head(What.TELL), {name: 1}), Limits(message_bytes=2**20))
            assert found == {name: 1}
            continue
        with pytest.raises(ValueError, match="1 to 512 bytes"):
            list(outgoing(Head(What.TELL), {name: 1}))


def test_bytes_of_a_kind_and_numbers_of_a_session() -> None:
    assert received(outgoing(Head(What.TELL, 2**32 - 1, "é" * 32), {}), Limits(message_bytes=0)) == {}
    for session, kind in ((2**32, ""), (-1, ""), (0, "é" * 32 + "a")):
        with pytest.raises(WireError, match="does not fit in 32 bits|longer than 64 bytes"):
            Head(What.TELL, session, kind)


@pytest.mark.parametrize(("count", "pieces"), [(0, 0), (1, 1), (99, 1), (100, 1), (101, 2), (200, 2), (201, 3)])
def test_pieces_of_a_message(count: int, pieces: int) -> None:
    made = list(chunks([bytes(count)], 100))
    assert [len(piece) for piece in made] == [100] * (count // 100) + [count % 100] * bool(count % 100)
    assert len(made) == pieces


def test_a_piece_is_a_mib() -> None:
    """Of the body; the envelope of the first is beside it."""
    assert CHUNK_BYTES == 1_048_576
    body = {"a": torch.zeros(CHUNK_BYTES * 2 // 4)}
    sizes = [len(piece) for piece in outgoing(Head(What.TELL), body)]
    assert sizes[:2] == [16 + 1_048_576, 1_048_576]
    assert len(sizes) == 3


@pytest.mark.parametrize(("mb", "count"), [(1024.0, 1_024_000_000), (1.5, 1_500_000), (0.000_123, 123)])
def test_the_largest_message_is_given_in_mb(mb: float, count: int) -> None:
    config = load_config(["transport=grpc", "role=server", f"transport.max_message_mb={mb:f}"])
    assert isinstance(config.transport, GrpcTransport)
    assert config.transport.message_bytes == count


@pytest.mark.parametrize("measure", ["client_params", "client_mflop", "round_mb"])
def test_a_budget_of_a_cut_holds_the_cut_that_uses_it_up(configure, measure: str) -> None:
    setting = ("algorithm=sl_single_server", "num_clients=2")
    cuts = list(list_cuts(configure(*setting)))
    of = {"client_params": lambda cut: cut.client_parameters, "client_mflop": lambda cut: cut.client_flops / 1e6,
          "round_mb": lambda cut: cut.bytes / 1e6}[measure]  # fmt: skip
    least = min(map(of, cuts))
    one = 1 if measure == "client_params" else 1e-6
    config, _ = prepared(configure(*setting, f"model.cut=auto:{measure}<={least:.6f}"))
    assert of(next(cut for cut in cuts if cut.name == config.model.cut)) == least
    with pytest.raises(ConfigError, match="a budget that some cut keeps"):
        prepared(configure(*setting, f"model.cut=auto:{measure}<={least - one:.6f}"))
