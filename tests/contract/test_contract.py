"""What holds for every registered algorithm; a new one is picked up by itself."""

import gc
import types
from dataclasses import replace

import pytest
import torch

from cutlayer import algorithms
from cutlayer.models.frozen import FrozenTensor
from cutlayer.runtime.costs.traffic import expected_bytes
from cutlayer.runtime.messages.boundary import Message
from cutlayer.runtime.messages.ledger import CONTROL_KINDS
from cutlayer.runtime.rounds.federation import Federation
from tests.conftest import play, same, weights
from tests.round_trips import expected_round_trips

NAMES = algorithms.names()
every_algorithm = pytest.mark.parametrize("name", NAMES)
# With buffers, as of a ResNet, at a fifth of the time.
CONVOLUTIONS = ("model=cnn4", "model.options.width=4", "batch_size=200")


# ------------------------------------------------------------------ bytes


@every_algorithm
@pytest.mark.parametrize(
    "setting",
    [
        (),
        ("frac=0.5", "local_epochs=2", "batch_size=60", "rounds=3"),
        (*CONVOLUTIONS, "dataset.distribution=dirichlet", "dataset.alpha=0.3", "precision=fp64", "rounds=1"),
        (*CONVOLUTIONS, "aggregate.buffers=keep_local", "precision=bf16"),
    ],
    ids=["plain", "part of the clients, two epochs", "unequal sizes, fp64", "buffers kept, bf16"],
)
def test_bytes_equal_the_closed_form(configure, name: str, setting: tuple[str, ...]) -> None:
    federation = play(Federation(configure(f"algorithm={name}", *quick(name), *setting)))
    measured: dict[tuple[str, str], int] = {}
    for direction, kind, _, count in federation.ledger.totals():
        if kind not in CONTROL_KINDS:
            measured[direction, kind] = measured.get((direction, kind), 0) + count.payload
    assert measured == expected_bytes(federation.setup, range(federation.round))
    assert federation.ledger.round_trips == expected_round_trips(federation.setup, range(federation.round))


def test_bytes_of_a_warm_start(configure) -> None:
    keys = ("warm_start=true", "align_interval=2", "align_epochs=1")
    federation = play(Federation(configure("algorithm=fsl_sage", *(f"algorithm.{key}" for key in keys), "rounds=4")))
    measured = {(way, kind): 0 for way, kind, _, _ in federation.ledger.totals() if kind not in CONTROL_KINDS}
    for way, kind, _, count in federation.ledger.totals():
        if (way, kind) in measured:
            measured[way, kind] += count.payload
    assert measured == expected_bytes(federation.setup, range(4))
    # Four rounds of four clients; aligned in the second and the fourth.
    assert federation.ledger.round_trips == expected_round_trips(federation.setup, range(4)) == 4 * 4 + 4 * 2


@pytest.mark.parametrize(
    ("name", "trips"),
    # Two rounds of four clients with 4 batches each (1437 samples, 100 in a batch); alignment in both rounds.
    [
        *(("centralized", 0), ("local_only", 0), ("fed_avg", 8), ("fed_prox", 8), ("scaffold", 8), ("cse_fsl", 8)),
        *(("sl", 8 + 2 * 4 * 4), ("sl_single_server", 8 + 2 * 4 * 4), ("sl_multi_server", 8 + 2 * 4 * 4)),
        ("fsl_sage", 8 + 8),
    ],
)
def test_round_trips_by_hand(configure, name: str, trips: int) -> None:
    more = ("algorithm.align_interval=1", "algorithm.align_epochs=1") if name == "fsl_sage" else ()
    federation = Federation(configure(f"algorithm={name}", *more))
    assert {-(-int(size) // 100) for size in federation.setup.partition.sizes} == {
        4 if federation.setup.population > 1 else 15
    }
    records = [federation.step()[0] for _ in range(2)]
    assert records[1].round_trips == 2 * records[0].round_trips == trips
    assert {record.in_turn for record in records} == {name == "sl"}


@every_algorithm
def test_rounds_of_the_ledger_sum_to_its_totals(configure, name: str) -> None:
    federation = Federation(configure(f"algorithm={name}", *quick(name)))
    lines = []
    while not federation.done:
        record, traffic = federation.step()
        lines += traffic
        training = [line for line in lines if line.kind not in CONTROL_KINDS]
        assert record.comm_load == sum(line.payload for line in training) == record.comm_up + record.comm_down
        assert record.comm_framed == sum(line.framed for line in training) >= record.comm_load
    for direction, kind, field, count in federation.ledger.totals():
        found = [line for line in lines if (line.direction, line.kind, line.field) == (direction, kind, field)]
        assert count.payload == sum(line.payload for line in found)
        assert count.framed == sum(line.framed for line in found)


# ------------------------------------------------------------------ reproducibility


QUICK = {
    "fsl_sage": ("algorithm.align_epochs=2", "algorithm.align_interval=2"),
    "moco_sfl": ("algorithm.together=never",),  # computed as one, clients are no programs of their own
    "fl_moco": ("algorithm.symmetric=false", "algorithm.queue=64", "dataset.augment=none"),
    "ressfl": ("algorithm.attacker_width=4", "dataset.fraction=0.3"),  # as many batches as a client of others has
}


def quick(name: str) -> tuple[str, ...]:
    return QUICK.get(name, ())


@every_algorithm
def test_same_seed_same_bits_other_seed_other_weights(configure, name: str) -> None:
    config = configure(f"algorithm={name}", *quick(name))
    first, second = play(Federation(config)), play(Federation(config))
    assert same(weights(first), weights(second))
    assert first.ledger.state_dict() == second.ledger.state_dict()
    other = play(Federation(configure(f"algorithm={name}", *quick(name), "seed=1")))
    assert not same(weights(first), weights(other))


@every_algorithm
def test_global_random_state_is_neither_used_nor_moved(configure, name: str) -> None:
    config = configure(f"algorithm={name}", *quick(name))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = play(Federation(config))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(weights(first), weights(play(Federation(config))))


@every_algorithm
@pytest.mark.parametrize("buffers", ["average", "keep_local"])
def test_resume_is_bitwise(configure, tmp_path, name: str, buffers: str) -> None:
    setting = [f"algorithm={name}", *quick(name), "rounds=4", "frac=0.75", f"aggregate.buffers={buffers}"]
    if buffers == "average":
        setting += ["scheduler=cosine", "optimizer.keep=run"]
    else:
        setting += CONVOLUTIONS
    config = configure(*setting)
    whole = play(Federation(config))
    broken = play(Federation(config, tmp_path), rounds=2)
    broken.checkpoint({"marker": 1})
    broken.step()  # a round after the checkpoint, lost with the process
    resumed = Federation(config, tmp_path)
    assert resumed.resume() == {"marker": 1}
    assert resumed.round == 2
    play(resumed)
    assert same(weights(whole), weights(resumed))
    assert whole.ledger.state_dict() == resumed.ledger.state_dict()
    assert whole.evaluate() == resumed.evaluate()


# ------------------------------------------------------------------ separation


def reachable_storages(root: object) -> set[int]:
    """Data pointers of all tensors that can be reached from an object, classes, modules and functions left out."""
    seen: set[int] = set()
    found: set[int] = set()
    queue = [root]
    while queue:
        item = queue.pop()
        skip = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType)
        if id(item) in seen or isinstance(item, skip):
            continue
        seen.add(id(item))
        if isinstance(item, FrozenTensor):
            continue  # everyone has it, and nothing changes it
        if isinstance(item, torch.Tensor):
            if item.numel():
                found.add(item.untyped_storage().data_ptr())
            if item.is_leaf and item.grad is not None:
                queue.append(item.grad)
        queue.extend(gc.get_referents(item))
    return found


@every_algorithm
def test_a_client_cannot_reach_the_server_nor_the_server_a_client(configure, monkeypatch, name: str) -> None:
    federation = Federation(configure(f"algorithm={name}", *quick(name)))
    looked = []

    def check(program: object, ctx: object) -> None:
        server = reachable_storages(federation.server.ctx.parts) | reachable_storages(federation.stores["server"])
        inside = {key: value for key, value in vars(ctx).items() if key != "state"}
        frame = program.gi_frame.f_locals if isinstance(program, types.GeneratorType) else {}
        mine = reachable_storages(inside) | reachable_storages({k: v for k, v in frame.items() if k != "ctx"})
        assert mine, "the walk must find the client's tensors"
        assert not mine & server
        data = federation.setup.dataset.train._store._images.untyped_storage().data_ptr()  # type: ignore[attr-defined]
        assert data not in reachable_storages(vars(federation.server))
        looked.append(1)

    original = federation.setup.algorithm.client

    def watched(ctx, down):
        program = original(ctx, down)
        if not isinstance(program, types.GeneratorType):
            check(program, ctx)
            return program

        def relay():
            message, reply = next(program, None), None
            while isinstance(message, Message):
                check(program, ctx)
                reply = yield message
                check(program, ctx)
                try:
                    message = program.send(reply)
                except StopIteration as end:
                    return end.value
            return {}

        return relay()

    spied = type(name, (federation.setup.algorithm,), {"client": staticmethod(watched)})
    monkeypatch.setattr(federation.setup, "algorithm", spied)
    federation.step()
    assert looked


# ------------------------------------------------------------------ equivalences

ONE = ("num_clients=1", "optimizer=sgd", "lr=0.05", "rounds=1", "local_epochs=2", "precision=fp64")


def whole_model(federation: Federation) -> dict[str, torch.Tensor]:
    model = federation.full_model() or federation.stores["clients"].get(0, "model")
    assert model is not None
    return model


EXACT = [
    ("local_only",),
    ("fed_avg",),
    ("fed_prox", "algorithm.mu=0"),
    ("scaffold",),  # control variates are zero in the first round
    ("sl",),
    ("sl_multi_server",),
    ("sl_single_server",),
]


@pytest.mark.parametrize("model", ["mlp", "cnn4"])
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case[0])
def test_one_client_equals_centralized(configure, case: tuple[str, ...], model: str) -> None:
    more = ("model.options.width=4", "batch_size=400") if model == "cnn4" else ()
    reference = play(Federation(configure("algorithm=centralized", *ONE, f"model={model}", *more)))
    federation = play(Federation(configure(f"algorithm={case[0]}", *case[1:], *ONE, f"model={model}", *more)))
    expected, found = whole_model(reference), whole_model(federation)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, rtol=1e-9, atol=1e-12), key


def test_centralized_equals_a_bare_loop(configure) -> None:
    config = configure("algorithm=centralized", *ONE, "rounds=3")
    federation = Federation(config)
    model = federation.setup.blueprint.parts(["model"])["model"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for round in range(3):
        context = replace_round(federation, round)
        for x, y in context:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    play(federation)
    for key, tensor in model.state_dict().items():
        assert torch.equal(whole_model(federation)[key], tensor)


def replace_round(federation: Federation, round: int):
    from cutlayer.runtime.ground import rng

    generator = rng.torch_generator(federation.setup.config.seed, round=round, client=0, stream="batches")
    return federation.setup.data(0).batches(generator)


def test_splitfed_v1_equals_fed_avg(configure) -> None:
    """A server copy per client, averaged with the clients' weights, is FedAvg cut in two."""
    setting = ("dataset.distribution=dirichlet", "precision=fp64", "rounds=3")
    cut = play(Federation(configure("algorithm=sl_multi_server", *setting)))
    whole = play(Federation(configure("algorithm=fed_avg", *setting)))
    for key, tensor in whole_model(whole).items():
        assert torch.allclose(whole_model(cut)[key], tensor, rtol=1e-9, atol=1e-12), key


def test_the_budget_of_bytes_ends_the_run(configure) -> None:
    """The run stops after the round in which the budget is spent."""
    config = replace(configure("algorithm=fed_avg", "rounds=50"), comm_threshold_mb=1e-6)
    federation = play(Federation(config))
    assert federation.round == 1
