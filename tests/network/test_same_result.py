"""Over the network every algorithm gives the bits that it gives in one process: weights, ledger, accuracy."""

import json
from pathlib import Path

import pytest

from cutlayer import algorithms
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.rounds.federation import Federation
from tests.conftest import play, same, weights
from tests.contract.test_contract import quick
from tests.network.serving import kept_rows, served

pytest.importorskip("grpc", reason="the extra grpc is not installed")

SETTING = ("rounds=2", "eval_interval=1", "num_clients=3", "batch_size=160", "optimizer.keep=run")
DATALESS = ("dataset.distribution=quantity_skew", "dataset.alpha=0.001", "dataset.min_samples=0", "frac=0.4")
BY_GROUP = (
    "dataset=synthetic", "dataset.distribution=natural", "dataset.local_test=true", "batch_size=20",
    "dataset.options={n_train:120,n_test:60,groups:7,height:8,width:8}", "dataset.validation=0.2",
)  # fmt: skip


def totals(federation: Federation) -> list[list]:
    return sorted(federation.ledger.state_dict()["totals"])


CASES = {name: (name, ()) for name in algorithms.names()}
CASES |= {"clients without data": ("fed_avg", DATALESS), "clients by group": ("fed_avg", BY_GROUP)}
TEXT = (
    *("dataset=shakespeare", "dataset.options.length=24", "dataset.fraction=0.02", "dataset.distribution=iid"),
    *("batch_size=16", "model=gpt", "model.options={hidden:16,heads:2,depth:3}"),
)
CASES |= {f"text, {name}": (name, TEXT) for name in ("fed_avg", "sl_single_server", "sl_u_shape", "fsl_sage")}
CASES |= {"text, ranks": ("flora", (*TEXT, "algorithm.ranks=[2,5]", "frac=0.6"))}
FEW = (
    "dataset.options.plays=[Macbeth]",
    "dataset.fraction=0.1",
)  # each client tests its own model on all of the test set
CASES |= {"text, A": ("fed_sa_lora", (*TEXT, *FEW))}
CASES |= {"several labels": ("fsl_sage", ("dataset=digit_facts",))}
CASES |= {"a schedule by step": ("sl_multi_server", ("scheduler=linear", "scheduler.warmup=2"))}
CASES |= {"evaluations": ("fed_babu", ("evaluations=[class_acc]", "dataset.local_test=true"))}


@pytest.mark.parametrize(("name", "more"), CASES.values(), ids=CASES)
def test_weights_ledger_and_accuracy(configure, name: str, more: tuple[str, ...], tmp_path: Path) -> None:
    setting = (*SETTING, f"algorithm={name}", *quick(name), *more)
    local = Federation(configure(*setting))
    expected = [local.step() for _ in range(2)]
    with served(tmp_path, *setting) as remote:
        found = [remote.step() for _ in range(2)]
        here = weights(remote)
    here |= kept_rows(tmp_path, local.setup.population)
    assert same(here, weights(local)), sorted(here.keys() ^ weights(local).keys())
    for (record, lines), (other, others) in zip(found, expected, strict=True):
        assert lines == others
        assert record.round_trips == other.round_trips
        assert (record.test_acc, record.test_loss, record.train_loss) == (
            other.test_acc,
            other.test_loss,
            other.train_loss,
        )
        assert record.metrics == other.metrics
        assert record.client_rows == other.client_rows
    assert remote.ledger.state_dict() == local.ledger.state_dict() or sorted(remote.ledger.totals()) == sorted(
        local.ledger.totals()
    )


@pytest.mark.parametrize(("name", "first"), [("sl_u_shape", 2), ("cse_fsl", 20)])
def test_batches_of_texts_of_any_length(configure, name: str, first: int, tmp_path: Path) -> None:
    """As long as its longest text each: a server that knows its clients' shapes takes them all.

    Also where the texts that it sees first are of one length, cut off or not.
    """
    lines = [
        json.dumps({"prompt": f"say {n:02}", "completion": "abc " * (1 + n % 5 if n > 29 else first)})
        for n in range(60)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    setting = (*SETTING, f"algorithm={name}", *quick(name), *TEXT, "dataset=jsonl", f"dataset.root={tmp_path}")
    setting += ("dataset.options.length=40", "dataset.options.test=null", "dataset.fraction=1", "batch_size=1")
    local = play(Federation(configure(*setting)))
    with served(tmp_path / "network", *setting, of_clients=[f"dataset.root={tmp_path}"]) as remote:
        here = weights(play(remote))
        assert sorted(remote.ledger.totals()) == sorted(local.ledger.totals())
    assert same(here | kept_rows(tmp_path / "network", local.setup.population), weights(local))


def test_clients_of_their_own_data_of_whom_none_can_train(configure, tmp_path: Path) -> None:
    """Only they know their data: the server refuses the run once all have told, instead of rounds in which none is."""
    own = ("dataset.distribution=own", "dataset.normalize=none", "dataset.drop_last=always", "batch_size=2000")
    with served(tmp_path, *SETTING, "algorithm=fed_avg", *own) as remote:
        with pytest.raises(ConfigError) as caught:
            remote.step()
        assert str(caught.value).startswith("batch_size=2000: expected fewer, or dataset.drop_last=auto")
