"""What holds for every registered evaluation, and where what it finds goes."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score

from cutlayer.datasets import DatasetInfo
from cutlayer.evaluations import EVALUATIONS, measure
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.network.server.remote_clients import RemoteClients
from cutlayer.runtime.network.wire import WireError
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.scoring.scores import Measured, mean_values
from cutlayer.tasks import TASKS, Score

INFO = DatasetInfo("made", 1, 8, 8, 10, tuple("abcdefghij"))
EVERY = EVALUATIONS.names()


def score(samples: int, classes: int = 10, seed: int = 0) -> Score:
    generator = torch.Generator().manual_seed(seed)
    predicted, labels = (torch.randint(classes, (samples,), generator=generator) for _ in range(2))
    losses = torch.rand(samples, generator=generator, dtype=torch.float64)
    return Score(losses, (predicted == labels).long(), torch.ones_like(labels), labels, predicted)


@pytest.mark.parametrize("name", EVERY)
def test_it_measures_any_samples_and_the_same_each_time(name: str) -> None:
    for samples, classes in ((1, 1), (1, 10), (5, 2), (500, 10)):
        found = measure([name], score(samples, classes), INFO)
        assert all(key.startswith(f"{name}/") and math.isfinite(value) for key, value in found.items())
        assert found == measure([name], score(samples, classes), INFO)
        shares = [value for key, value in found.items() if key.split("/")[0].endswith("acc")]
        assert all(0 <= value <= 1 for value in shares)
    assert found


def test_what_is_not_finite_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVALUATIONS, "made", lambda *_: {"a": math.nan, "b": 2, "c": math.inf})
    assert measure(["made"], score(3), INFO) == {"made/b": 2.0}


def test_accuracy_by_class_against_scikit_learn() -> None:
    made = score(300, 7)
    found = measure(["class_acc"], made, INFO)
    wanted = recall_score(made.labels, made.predicted, average=None)
    assert [found[f"class_acc/{label}"] for label in range(7)] == pytest.approx(wanted)
    assert found["class_acc/mean"] == pytest.approx(balanced_accuracy_score(made.labels, made.predicted))
    assert found["class_acc/worst"] == pytest.approx(wanted.min())
    assert "class_acc/7" not in found


def test_of_the_global_model_and_of_every_client_it_is_a_metric_of_the_round(configure: Any) -> None:
    setting = ("dataset.local_test=true", "dataset.distribution=shards", "num_clients=5", "eval_interval=1")
    plain, asked = (
        Federation(configure("algorithm=fed_avg", *setting, *more)) for more in ((), ("evaluations=[class_acc]",))
    )
    (before, _), (record, _) = plain.step(), asked.step()
    assert (before.test_acc, before.test_loss) == (record.test_acc, record.test_loss)
    assert {name: record.metrics[name] for name in before.metrics} == before.metrics
    # The classes are equally many in the test set: to a sample.
    assert record.metrics["class_acc/mean"] == pytest.approx(record.test_acc, abs=0.01)
    shares = [record.metrics[f"class_acc/{label}"] for label in range(10)]
    assert record.metrics["class_acc/mean"] == pytest.approx(np.mean(shares))
    clients = [asked.evaluator.of_client(client)["local_acc"] for client in range(5)]
    of_one = [each.values["class_acc/0"] for each in clients if "class_acc/0" in each.values]
    assert 0 < len(of_one) < 5
    assert record.metrics["local_acc/class_acc/0"] == pytest.approx(np.mean(of_one))


def test_of_clients_with_models_of_their_own_it_is_the_mean_over_them(configure: Any) -> None:
    federation = Federation(configure("algorithm=local_only", "num_clients=3", "evaluations=[class_acc]"))
    metrics = federation.evaluate().metrics
    clients = [federation.evaluator.of_client(client)["client_acc"] for client in range(3)]
    assert metrics["class_acc/mean"] == pytest.approx(np.mean([each.values["class_acc/mean"] for each in clients]))
    assert mean_values(clients).keys() <= metrics.keys()


def test_one_that_is_not_registered_is_refused(configure: Any) -> None:
    with pytest.raises(
        ConfigError, match="evaluations=class_ac: expected a registered evaluation; did you mean class_acc"
    ):
        configure("evaluations=[class_ac]")


def test_a_client_tells_what_was_asked_for_and_nothing_else() -> None:
    def reported(each: Any, *asked: str, task: str = "classification") -> Measured:
        blueprint = SimpleNamespace(task=TASKS[task])
        setup = SimpleNamespace(config=SimpleNamespace(evaluations=asked), blueprint=blueprint)
        return RemoteClients._score_of(SimpleNamespace(_setup=setup), each)  # type: ignore[arg-type]

    found = Measured(3, 0.5, 1.0, {"class_acc/1": 0.25})
    assert reported(found.to_json(), "class_acc") == found
    assert reported([3, 0.5, 1.0], "class_acc").values == {}
    assert reported([3, 0.5, 1.0, {"perplexity": 2.0}], task="causal_lm").values == {"perplexity": 2.0}
    with pytest.raises(WireError, match="'accuracy', which is not asked for"):
        reported([3, 0.5, 1.0, {"accuracy": 2.0}], task="causal_lm")
    for wrong, asked in (
        (found.to_json(), ()),
        (found.to_json(), ("other",)),
        ([3, 0.5, 1.0, {"class_acc/1": 1}], ("class_acc",)),
        ([3, 0.5, 1.0, {"class_acc/1": math.nan}], ("class_acc",)),
        ([3, 0.5, 1.0, {"class_acc/1": 1e40}], ("class_acc",)),
        ([3, 0.5, 1.0, {f"class_acc/{at}": 0.0 for at in range(5000)}], ("class_acc",)),
        ([3, 0.5, 1.0, []], ("class_acc",)),
        (3, ("class_acc",)),
    ):
        with pytest.raises(WireError):
            reported(wrong, *asked)
