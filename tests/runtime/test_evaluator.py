"""What is tested of whom: each client's own model or the global one, on all test data or on its share, by numpy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.settings import RunConfig
from tests.contract.test_reported import Perceptron, pixels

SETTING = ("num_clients=5", "frac=0.5", "lr=0.01", "dataset.distribution=dirichlet", "dataset.alpha=0.3",
           "dataset.min_samples=60", "dataset.validation=0.2", "eval_interval=1", "eval_batch_size=100")  # fmt: skip
Scores = list[tuple[int, tuple[float, float]]]


def models(federation: Federation) -> list[Perceptron]:
    """What each client would use: what it keeps, and the server's for the rest."""
    found = []
    for client in range(5):
        state: dict[str, torch.Tensor] = {}
        for name in federation.setup.algorithm.layout.whole:
            own = (
                federation.stores["clients"].get(client, name) if name in federation.setup.algorithm.personal else None
            )
            held = federation.server.ctx.parts.get(name)
            initial = federation.setup.blueprint.initial[name]
            state |= own or (initial if held is None else held.state_dict())
        found.append(Perceptron(state))
    return found


def spread(values: list[float]) -> dict[str, object]:
    return {"mean": pytest.approx(np.mean(values)), "std": pytest.approx(np.std(values)),
            "worst_decile": pytest.approx(min(values))}  # fmt: skip


def on_all(federation: Federation, part: str) -> Scores:
    x, y = pixels(federation, part)
    return [(len(y), model.scores(x, y)) for model in models(federation)]


def on_shares(federation: Federation, part: str) -> Scores:
    x, y = pixels(federation, part)
    parts = federation.evaluator.shares(getattr(federation.setup.dataset, part))
    lists = [parts.indices(client).numpy() for client in range(5)]
    return [(len(own), model.scores(x[own], y[own])) for own, model in zip(lists, models(federation), strict=True)]


def mean(scores: Scores) -> tuple[float, float]:
    return tuple(float(np.mean(values)) for values in zip(*(score for _, score in scores), strict=True))  # type: ignore[return-value]


def rows(metric: str, scores: Scores) -> list[tuple[str, int, int, object]]:
    return [(metric, client, count, pytest.approx(score[0])) for client, (count, score) in enumerate(scores)]


@pytest.mark.parametrize("name", ["fed_per", "local_only", "lg_fed_avg"])
def test_clients_own_models(configure: Callable[..., RunConfig], name: str) -> None:
    """Also of clients that were never there."""
    federation = Federation(configure(f"algorithm={name}", *SETTING, "dataset.local_test=true"))
    record, _ = federation.step()
    whole, shares, validation = (
        on_all(federation, "test"),
        on_shares(federation, "test"),
        on_all(federation, "validation"),
    )
    assert (record.test_acc, record.test_loss) == pytest.approx(mean(whole), abs=1e-6)
    assert (record.metrics["val_acc"], record.metrics["val_loss"]) == pytest.approx(mean(validation), abs=1e-6)
    assert record.client_rows == rows("client_acc", whole) + rows("local_acc", shares)
    for metric, scores in (("client_acc", whole), ("local_acc", shares)):
        found = {key: record.metrics[f"{metric}/{key}"] for key in ("mean", "std", "worst_decile")}
        assert found == spread([score[0] for _, score in scores])
    assert len({score for _, score in whole}) > 2


@pytest.mark.parametrize("name", ["fed_per", "fed_avg"])
def test_on_shares_alone(configure: Callable[..., RunConfig], name: str) -> None:
    federation = Federation(configure(f"algorithm={name}", *SETTING, "dataset.local_test=only"))
    record, _ = federation.step()
    shares = on_shares(federation, "test")
    assert (record.test_acc, record.test_loss) == pytest.approx(mean(shares), abs=1e-6)
    found = record.metrics["val_acc"], record.metrics["val_loss"]
    assert found == pytest.approx(mean(on_shares(federation, "validation")), abs=1e-6)
    assert record.client_rows == rows("local_acc", shares)
    assert {key for key in record.metrics if "/" in key} == {f"local_acc/{key}" for key in spread([0.0])}


def test_the_one_client_of_pooled_data_is_no_line_of_a_table(configure: Callable[..., RunConfig]) -> None:
    federation = Federation(configure("algorithm=centralized", *SETTING))
    record, _ = federation.step()
    assert record.client_rows == []
    assert not [key for key in record.metrics if "/" in key]
    model = Perceptron(federation.stores["clients"].get(0, "model") or {})
    assert (record.test_acc, record.test_loss) == pytest.approx(model.scores(*pixels(federation, "test")), abs=1e-6)


@pytest.mark.parametrize("alone", ["true", "only"])
def test_statistics_that_do_not_travel_are_those_of_what_is_tested(
    configure: Callable[..., RunConfig], alone: str
) -> None:
    """Of the whole test set; of a share where nothing else is tested."""
    federation = Federation(
        configure("algorithm=fed_avg", "model=import/tests.contract.elsewhere.Net", "model.cut=norm", *SETTING,
                  "aggregate.buffers=reset", f"dataset.local_test={alone}", "eval_batch_size=400")
    )  # fmt: skip
    record, _ = federation.step()
    model, test = federation.server.ctx.part("model"), federation.setup.dataset.test
    ((x, y),) = test.batches(torch.arange(len(test)), batch_size=len(test))
    parts = federation.evaluator.local_test
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with torch.no_grad():  # in training mode
        whole = model(x)
        logits = [model(x[own]) if alone == "only" else whole[own] for own in map(parts.indices, range(5))]
    hits = [float((each.argmax(1) == y[parts.indices(c)]).double().mean()) for c, each in enumerate(logits)]
    losses = [float(cross_entropy(each, y[parts.indices(c)])) for c, each in enumerate(logits)]
    sizes = [len(parts.indices(client)) for client in range(5)]
    assert record.client_rows == [("local_acc", c, sizes[c], pytest.approx(hits[c])) for c in range(5)]
    if alone == "only":
        assert (record.test_acc, record.test_loss) == pytest.approx((np.mean(hits), np.mean(losses)), rel=1e-5)
        return
    expected = float((whole.argmax(1) == y).double().mean()), float(cross_entropy(whole, y))
    assert (record.test_acc, record.test_loss) == pytest.approx(expected, rel=1e-5)


def test_models_that_are_alike_are_tested_once_and_anew_in_each_round(configure: Callable[..., RunConfig]) -> None:
    federation = Federation(configure("algorithm=fed_avg", *SETTING, "dataset.local_test=true"))
    tested: list[int] = []
    original = federation.evaluator._test

    def counted(modules, source, *args, **how):
        tested.append(len(source))
        return original(modules, source, *args, **how)

    federation.evaluator._test = counted
    for round in range(2):
        federation.step()
        assert len(tested) == 2 * (round + 1), "the test set and the validation set"
