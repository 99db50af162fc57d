"""What holds for every method that takes text where it trains low-rank adapters alone."""

import pytest
import torch

from cutlayer import algorithms
from cutlayer.models.frozen import frozen_in
from cutlayer.models.lora import is_adapter, is_below
from cutlayer.runtime.costs.traffic import expected_bytes
from cutlayer.runtime.messages.ledger import CONTROL_KINDS
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.workers.clients import WorkerClients
from tests.conftest import play, same, weights
from tests.contract.adapting import cut, prepare, rate
from tests.contract.test_contract import quick
from tests.contract.test_text import takes_text

pytest.importorskip("peft", reason="the extra huggingface is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, which say what they change by themselves
NAMES = [name for name in algorithms.names() if takes_text(name)]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return prepare(tmp_path_factory.mktemp("adapters"))


def frozen(federation: Federation) -> list[torch.Tensor]:
    blueprint = federation.setup.blueprint
    parts = [*blueprint._parts.values(), *federation.server.ctx.parts.values()]
    return [tensor.as_subclass(torch.Tensor) for part in parts for _, _, tensor in frozen_in(part)]


def setting(name: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    return (f"algorithm={name}", *quick(name), *keys, *cut(name), *rate(name))


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_sends_adapters_alone_and_leaves_the_base_as_it_is(
    configure, keys: tuple[str, ...], name: str
) -> None:
    federation = Federation(configure(*setting(name, keys)))
    base = frozen(federation)
    before = [tensor.clone() for tensor in base]
    assert before
    for state in federation.setup.blueprint.initial.values():
        assert all(is_adapter(key) or is_below(key) for key in state)
        assert any(is_below(key) for key in state) == (name == "flora")
    losses = [federation.evaluate().loss, *(federation.step()[0].test_loss for _ in range(2))]
    assert losses[-1] is not None
    assert losses[-1] < losses[0] - (0.04 if name == "fed_babu" else 0.1)  # the head keeps its B of zero
    measured: dict[tuple[str, str], int] = {}
    for direction, kind, _, count in federation.ledger.totals():
        if kind not in CONTROL_KINDS:
            measured[direction, kind] = measured.get((direction, kind), 0) + count.payload
    assert measured == expected_bytes(federation.setup, range(2))
    assert all(torch.equal(a, b) for a, b in zip(base, before, strict=True))
    assert same(weights(play(Federation(configure(*setting(name, keys))))), weights(federation))


@pytest.mark.parametrize("name", ["flora", "sl_multi_server"])
def test_two_workers_give_the_bits_of_one_process(configure, keys: tuple[str, ...], name: str) -> None:
    """Clients' own weights go there and back, and a copy of the server computes beside its client."""
    alone, rounds = Federation(configure(*setting(name, keys))), []
    while not alone.done:
        record, _ = alone.step()
        rounds.append((record.test_loss, record.client_rows))
    made = Federation(configure(*setting(name, keys), "workers=2"), clients=WorkerClients)
    try:
        for expected in rounds:
            record, _ = made.step()
            assert (record.test_loss, record.client_rows) == expected
        assert same(weights(made), weights(alone))
        assert sorted(made.ledger.totals()) == sorted(alone.ledger.totals())
    finally:
        made.clients.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["fed_avg", "fsl_sage", "sl_single_server", "flora"])
def test_bf16_learns_what_fp32_learns(configure, keys: tuple[str, ...], name: str) -> None:
    begun = Federation(configure(*setting(name, keys))).evaluate().loss
    fp32, bf16 = (
        play(Federation(configure(*setting(name, keys), f"precision={each}"))).evaluate().loss
        for each in ("fp32", "bf16")
    )
    assert abs(bf16 - fp32) < 0.1 * (begun - fp32)
