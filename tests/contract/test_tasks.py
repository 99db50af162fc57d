"""What holds for every registered task, and what each method makes of it."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, hamming_loss, log_loss

from cutlayer import algorithms
from cutlayer.datasets import DatasetInfo
from cutlayer.runtime.after.probe import probe
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.tasks import IGNORED, TASKS, Score, Task

INFO = DatasetInfo("made", 1, 8, 8, 3, tuple("abc"), outputs=5, length=7)
EVERY = TASKS.names()
OURS = ("causal_lm", "classification", "multi_label")
every_task = pytest.mark.parametrize("name", EVERY)


def drawn(task: Task, samples: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An output in double precision, and targets of any values that the task has."""
    generator = torch.Generator().manual_seed(seed)
    y = task.targets(INFO, samples)
    most = 2 if y.is_floating_point() else INFO.outputs
    y = torch.randint(most, y.shape, generator=generator).to(y.dtype)
    output = torch.randn(task.output_shape(INFO, samples), generator=generator, dtype=torch.float64)
    return output, y


def score_of(task: Task, output: torch.Tensor, y: torch.Tensor) -> Score:
    losses, counts = task.each(output, y)
    assert losses.shape == (len(y),)
    assert counts.dtype == torch.int64
    right, asked, *found = counts.unbind(1)
    return Score(losses.double(), right, asked, torch.zeros(len(y), dtype=torch.int64), *found)


def ignored(task: Task, y: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """The targets without some of them: of each place, or where a target is one class of each sample."""
    chosen = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)) < share
    return y.masked_fill(chosen, IGNORED)


@every_task
@given(samples=st.integers(1, 9), share=st.sampled_from([0.0, 0.3, 0.8]), seed=st.integers(0, 10**6))
def test_what_is_trained_is_what_is_tested_and_ignored_targets_count_nowhere(
    name: str, samples: int, share: float, seed: int
) -> None:
    task = TASKS[name]
    output, y = drawn(task, samples, seed)
    y = ignored(task, y, share, seed)
    score = score_of(task, output, y)
    assert int(score.asked.sum()) == int((y != IGNORED).sum())
    if not int(score.asked.sum()):
        return
    assert score.loss == pytest.approx(float(task.loss(0.0)(output, y)), rel=1e-9)
    assert 0 <= score.accuracy <= 1
    # Whatever the output says where nothing is asked, neither loss nor score nor gradient has any of it.
    for smoothing in (0.0, 0.2):
        leaf = output.clone().requires_grad_()
        task.loss(smoothing)(leaf, y).backward()
        where = (y == IGNORED) if y.shape == output.shape else (y == IGNORED)[..., None].expand(output.shape)
        assert leaf.grad is not None
        assert not leaf.grad[where].any()
        assert leaf.grad[~where].any()
    other = torch.where(where, 100.0, output)
    assert score_of(task, other, y).both == pytest.approx(score.both)


@pytest.mark.parametrize("name", OURS)
def test_smoothing_is_the_loss_of_softened_targets(name: str) -> None:
    task, share = TASKS[name], 0.3
    output, y = drawn(task, 6)
    if y.is_floating_point():
        p, wanted = output.sigmoid(), y * (1 - share) + share / 2
        expected = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()
    else:
        wanted = torch.nn.functional.one_hot(y, INFO.outputs) * (1 - share) + share / INFO.outputs
        expected = -(wanted * output.log_softmax(-1)).sum(-1).mean()
    assert float(task.loss(share)(output, y)) == pytest.approx(float(expected))


@every_task
def test_targets_that_come_from_elsewhere(name: str) -> None:
    task = TASKS[name]
    _, y = drawn(task, 4)
    assert task.wrong(y, INFO) is None
    outside = (y + INFO.outputs, y - 1000) if name in OURS else ()
    for bad in (y.double(), y.to(torch.int32), y[..., None], *outside):
        if bad.shape == y.shape or name != "classification":
            assert task.wrong(bad, INFO), bad


def test_against_scikit_learn() -> None:
    task = TASKS["classification"]
    output, y = drawn(task, 50)
    score = score_of(task, output, y)
    assert score.loss == pytest.approx(log_loss(y, output.softmax(1), labels=range(5)))
    assert score.accuracy == pytest.approx(accuracy_score(y, output.argmax(1)))
    task = TASKS["multi_label"]
    output, y = drawn(task, 50)
    score = score_of(task, output, y)
    p = output.sigmoid()
    each = [log_loss(y[:, i], torch.stack([1 - p[:, i], p[:, i]], 1), labels=[0, 1]) for i in range(5)]
    assert score.loss == pytest.approx(sum(each) / 5)
    assert score.accuracy == pytest.approx(1 - hamming_loss(y, output > 0))
    assert task.figures(score)["exact_acc"] == pytest.approx(accuracy_score(y, output > 0))


def test_the_perplexity_of_guessing_is_the_number_of_tokens() -> None:
    task = TASKS["causal_lm"]
    _, y = drawn(task, 4)
    score = score_of(task, torch.zeros(4, 7, 5, dtype=torch.float64), ignored(task, y, 0.5, 0))
    assert task.figures(score)["perplexity"] == pytest.approx(5)
    certain = torch.nn.functional.one_hot(y, 5).double() * 1000
    assert task.figures(score_of(task, certain, y))["perplexity"] == pytest.approx(1)
    assert score_of(task, certain, y).accuracy == 1


def test_no_class_is_predicted_where_there_are_several() -> None:
    task = TASKS["multi_label"]
    with pytest.raises(ConfigError, match="what needs no predicted class"):
        _ = score_of(task, *drawn(task, 3)).predicted


@pytest.mark.parametrize("name", algorithms.names())
def test_a_method_learns_several_labels_or_refuses_them(configure, name: str) -> None:
    """Nine of sixteen labels are guessed by the commonest answer to each; a model that learns finds more."""
    more = ("optimizer=sgd", "lr=0.3") if name == "scaffold" else ()
    more = ("model.auxiliary_heads.blocks=[relu1]",) if name == "mhmd" else more
    setting = ("dataset=digit_facts", "lr=0.01", "batch_size=32", "rounds=4", "local_epochs=2", *more)
    tasks = algorithms.get(name).tasks
    if tasks is not None and "multi_label" not in tasks:
        with pytest.raises(ConfigError) as caught:
            Federation(configure(f"algorithm={name}", *setting))
        assert str(caught.value).startswith(f"algorithm={name}: expected another for digit_facts, whose task is multi")
        return
    federation = Federation(configure(f"algorithm={name}", *setting, "eval_interval=4"))
    record = [federation.step()[0] for _ in range(4)][-1]
    targets = federation.setup.dataset.test.targets
    guessed = float(torch.maximum(targets.mean(0), 1 - targets.mean(0)).mean())
    assert record.test_acc is not None
    assert record.test_acc > guessed + 0.1, f"{record.test_acc:.3f}, {guessed:.3f} by guessing"
    assert math.isfinite(record.test_loss or math.nan)
    assert "exact_acc" in record.metrics


def test_labels_still_divide_the_data_and_probes_refuse(configure, tmp_path: Path) -> None:
    setting = (
        "algorithm=fed_avg",
        "dataset=digit_facts",
        "dataset.distribution=shards",
        "dataset.classes_per_client=3",
        "evaluations=[class_acc]",
    )
    federation = Federation(configure(*setting, "eval_interval=1"))
    labels = federation.setup.dataset.train.labels
    held = [len(labels[federation.setup.partition.indices(client)].unique()) for client in range(4)]
    assert max(held) < 10, "shards hold some of the ten digits, of which targets know nothing"
    record, _ = federation.step()
    assert {f"class_acc/{digit}" for digit in range(10)} <= record.metrics.keys()
    with pytest.raises(ConfigError, match="kNN and linear classifiers find classes"):
        probe(federation, federation.setup.config.probe, tmp_path)
