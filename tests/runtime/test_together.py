"""Clients that are computed as one come to what each comes to by itself, and where that cannot be they are not."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlayer.algorithms as algorithms
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.parties.per_client import ApartError
from cutlayer.runtime.parties.together import TogetherContext
from cutlayer.runtime.rounds import choosing
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.local_clients import LocalClients
from cutlayer.runtime.rounds.seats import Seats
from cutlayer.runtime.settings import RunConfig
from tests.conftest import play, same, weights

Configure = Callable[..., RunConfig]
NAMES = [name for name in algorithms.names() if not algorithms.get(name).pooled]
WAITS = "the program waits for an answer that depends on the clients before"
# Why clients of these are not computed as one; of `sl` that is not tried.
APART = {
    "fl_moco": "the program draws random numbers of its own",
    "fsmkd": WAITS,
    "mhmd": "__getitem__: vmap",
    "sl": None,
    "sl_single_server": WAITS,
}
TOGETHER = (
    *(
        "cse_fsl",
        "ditto",
        "fed_avg",
        "fed_babu",
        "fed_per",
        "fed_prox",
        "fed_rep",
        "fsl_sage",
        "lg_fed_avg",
        "local_only",
    ),
    *("moco_sfl", "per_fed_avg", "scaffold", "sl_multi_server"),
)
EVEN = (
    *("num_clients=5", "frac=0.8", "dataset.fraction=0.3", "batch_size=30", "dataset.drop_last=always"),
    *("precision=fp64", "rounds=3", "optimizer.keep=run"),
)


def settings(name: str, *keys: str) -> tuple[str, ...]:
    own = {
        "fsl_sage": ("algorithm.align_interval=2", "algorithm.align_epochs=2"),
        "moco_sfl": ("algorithm.together=never",),
        "fl_moco": ("algorithm.symmetric=false", "algorithm.queue=64", "dataset.augment=none"),
    }
    return (f"algorithm={name}", *EVEN, *own.get(name, ()), *keys)


def played(config: RunConfig) -> tuple[Federation, list[dict[str, float]]]:
    """The end of a run, and its rounds' metrics."""
    federation, metrics = Federation(config), list[dict[str, float]]()
    while not federation.done:
        record, _ = federation.step()
        metrics.append({"loss": record.train_loss or 0.0, **record.metrics})
    return federation, metrics


def apart_by(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of a value, over its size."""
    assert one.keys() == other.keys()
    pairs = [(one[key].double(), other[key].double()) for key in one]
    return max((float(((a - b).abs() / (1 + b.abs())).max()) for a, b in pairs if a.numel()), default=0.0)


def rows(federation: Federation) -> dict[str, Tensor]:
    """All that clients keep."""
    store = federation.stores["clients"]
    return {f"{row}/{name}": value for row in store.all() for name, value in (store.get(*row) or {}).items()}


def reasons(federation: Federation) -> list[str]:
    assert isinstance(federation.clients, LocalClients)
    return federation.clients.reasons


def check_same(name: str, keys: tuple[str, ...], configure: Configure, together: int) -> None:
    """Both ways of computing agree, to the bit where clients cannot be computed as one."""
    alone, expected = played(configure(*keys))
    several, found = played(configure(*keys, f"cohort.together={together}"))
    assert several.ledger.state_dict() == alone.ledger.state_dict()
    if name in APART:
        assert same(weights(several), weights(alone))
        assert same(rows(several), rows(alone))
        assert all(reason.startswith(str(APART[name])) for reason in reasons(several))
    else:
        assert apart_by(weights(several), weights(alone)) < 1e-9
        assert apart_by(rows(several), rows(alone)) < 1e-9
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_clients_together_come_to_what_each_comes_to(name: str, configure: Configure) -> None:
    check_same(name, settings(name, "model=cnn2"), configure, 3)


@pytest.mark.parametrize("name", TOGETHER)
def test_none_of_them_runs_by_itself(name: str, configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four clients in groups of two, of a method that need not wait."""
    keys = settings(name, "cohort.together=2", "eval_interval=100")
    waits = ("algorithm.warm_start=true", "algorithm.align_interval=100", "rounds=1") if name == "fsl_sage" else ()
    federation = Federation(configure(*keys, *waits))
    monkeypatch.delattr(Seats, "open")
    federation.step()
    assert federation.ledger.training().payload > 0 or name == "local_only"


DIFFERENT = ("dataset.distribution=dirichlet", "dataset.alpha=0.5", "batch_size=20", "dataset.drop_last=never")
# Not Adam, which makes a large step of what only rounding tells from zero, as a bias before BatchNorm.
NORMALISED = (
    "model=cnn4",
    "model.options.width=4",
    "optimizer=sgd",
    "lr=0.05",
    "optimizer.momentum=0.9",
    "batch_size=50",
)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in APART])
@pytest.mark.parametrize(
    "keys",
    [
        (*DIFFERENT, "optimizer.keep=null"),
        (*DIFFERENT, "frac=1"),
        (*NORMALISED, "dataset.distribution=dirichlet", "dataset.alpha=1"),
        (*NORMALISED, "aggregate.buffers=keep_local"),
    ],
    ids=["batches differ", "optimizers kept", "normalised over the batch", "buffers kept"],
)
def test_clients_with_other_batches_and_with_statistics(name: str, keys: tuple[str, ...], configure: Configure) -> None:
    if name == "scaffold":
        keys = tuple(key for key in keys if not key.startswith("optimizer.momentum"))
    check_same(name, settings(name, *keys), configure, 4)


# ------------------------------------------------------------------ what is chosen, and what is refused


@pytest.mark.parametrize(
    ("name", "faster", "chosen"), [("fed_avg", True, 4), ("fed_avg", False, 1), ("fsl_sage", True, 4)]
)
def test_auto_keeps_what_is_faster(
    name: str, faster: bool, chosen: int, configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both ways are really run; only the clock is told what they take. The choice lasts, and its number repeats it."""
    clock = Clock(faster)
    monkeypatch.setattr(choosing, "_seconds", clock.seconds)
    keys = settings(name, "num_clients=4", "frac=1", "cohort.together")
    auto = (*keys[:-1], "cohort.together=auto")
    federation = Federation(configure(*auto), tmp_path)
    federation.step()
    federation.checkpoint({})
    assert clock.sides == 2
    resumed = Federation(configure(*auto), tmp_path)
    resumed.resume()
    play(resumed)
    assert clock.sides == 2
    number = "never" if chosen == 1 else chosen
    assert same(weights(resumed), weights(play(Federation(configure(*keys[:-1], f"cohort.together={number}")))))


class Clock:
    """Says that clients together take half of the time, or twice as long."""

    def __init__(self, faster: bool) -> None:
        self._faster = faster
        self._seen: list[Any] = []

    @property
    def sides(self) -> int:
        return len({id(side) for side in self._seen})

    def seconds(self, _device: torch.device, side: Any, cohort: list[int], round: int) -> float:
        report = side.play(cohort, round)
        assert len(report.survivors) == len(cohort)
        self._seen.append(side)
        together = side._clients.setup.config.cohort.together != "never"
        return 0.5 if together == self._faster else 1.0


DRAWS = ("sl_multi_server", "model=vit", "model.options.dropout=0.5", "model.options.depth=4")


@pytest.mark.parametrize("method", [("sl_single_server",), DRAWS], ids=["waits", "draws"])
def test_auto_leaves_alone_what_cannot_be_computed_as_one(method: tuple[str, ...], configure: Configure) -> None:
    keys = settings(*method)
    auto, never = (play(Federation(configure(*keys, f"cohort.together={each}"))) for each in ("auto", "never"))
    assert same(weights(auto), weights(never))


def test_auto_takes_fewer_where_there_is_no_memory(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trial says of memory is not the end of the run."""
    keys = settings("fed_avg")

    def refused(_: TogetherContext) -> Any:
        raise MemoryError

    monkeypatch.setattr(TogetherContext, "metrics", refused)
    auto, never = (play(Federation(configure(*keys, f"cohort.together={each}"))) for each in ("auto", "never"))
    assert same(weights(auto), weights(never))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("cohort.together=1",), "cohort.together=1: expected auto, never, or an integer >= 2"),
        (("cohort.together=some",), "cohort.together=some: expected "),
        (("cohort.together=4", "workers=2"), "cohort.together=4: expected never with transport=grpc, or with several"),
        (
            ("cohort.together=auto", "transport=grpc", "role=server", "transport.insecure=true"),
            "cohort.together=auto: expected never with transport=grpc",
        ),
    ],
)
def test_refusals(keys: tuple[str, ...], line: str, configure: Configure) -> None:
    with pytest.raises(ConfigError) as refused:
        configure(*keys)
    assert str(refused.value).startswith(line)


def test_a_client_that_is_no_longer_like_the_others_goes_on_by_itself(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a round: what it has said is not said again, and bits are those of its own program."""
    keys = settings("sl_multi_server", "optimizer.keep=round")
    alone = play(Federation(configure(*keys)))
    joined, steps = TogetherContext.join, Counter[int]()

    def join(ctx: TogetherContext, replies: Any) -> Any:
        steps[id(ctx)] += 1
        if steps[id(ctx)] == 3:
            raise ApartError("for the test")
        return joined(ctx, replies)

    monkeypatch.setattr(TogetherContext, "join", join)
    several = play(Federation(configure(*keys, "cohort.together=4")))
    assert reasons(several) == ["for the test"]
    assert several.ledger.state_dict() == alone.ledger.state_dict()
    assert apart_by(weights(several), weights(alone)) < 1e-9


def test_a_server_that_draws_for_its_copies_keeps_their_order(configure: Configure) -> None:
    keys = settings(*DRAWS)
    alone, several = (play(Federation(configure(*keys, f"cohort.together={each}"))) for each in ("never", 4))
    assert same(weights(several), weights(alone))


@pytest.mark.parametrize("name", ["fed_avg", "cse_fsl"])
def test_in_half_precision_each_is_computed_by_itself(name: str, configure: Configure) -> None:
    """Torch's autocast does not reach convolutions under vmap: other values, and other bytes, would come of it."""
    keys = settings(name, "model=cnn2", "precision=bf16")
    alone, several = (play(Federation(configure(*keys, f"cohort.together={each}"))) for each in ("never", 4))
    assert same(weights(several), weights(alone))
    assert several.ledger.state_dict() == alone.ledger.state_dict()
    assert reasons(several) == ["torch.vmap computes convolutions without autocast (precision=bf16)"]


@pytest.mark.parametrize("keys", [("dataset.augment=moco", "local_epochs=2"), ("memory_format=channels_last",)])
def test_clients_whose_images_are_augmented_or_lie_otherwise(keys: tuple[str, ...], configure: Configure) -> None:
    check_same("fed_avg", settings("fed_avg", "model=cnn2", *keys), configure, 4)
