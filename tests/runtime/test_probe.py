"""Features of trained models: where they are, what a probe finds at a run's end and later, and the monitor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cutlayer import algorithms
from cutlayer import probe as command
from cutlayer.algorithms.fed_avg import FedAvg
from cutlayer.models import leave_out
from cutlayer.runtime.after.personalize import personalize
from cutlayer.runtime.after.probe import earlier_probe, feature_parts, probe, probed_folder
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.locks import FileLock
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder
from cutlayer.runtime.scoring.classifiers import ProbeConfig, knn_accuracy
from cutlayer.runtime.scoring.features import features
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from tests.conftest import play, same, weights

NET = "model=import/tests.contract.elsewhere.Net"
KEEP = ("aggregate.buffers=keep_local", "model=resnet20", "model.options.width=4", "batch_size=200")
SMALL = ("probe.labels=[1.0,0.1]", "probe.train_samples=300", "probe.k=20", "progress=none", "threads=1")
CONFIG = ProbeConfig(labels=(1.0, 0.1), train_samples=300, k=20)


def of(federation: Federation, source: str = "test") -> tuple[torch.Tensor, torch.Tensor, str]:
    """The features of a set, their labels, and where they are."""
    modules, where = feature_parts(federation)
    found = features(
        modules,
        getattr(federation.setup.dataset, source),
        federation.setup.blueprint,
        batch_size=250,
        batch_statistics=federation.evaluator.batch_statistics,
    )
    return *found, where


# ---------------------------------------------------------------------- features


@pytest.mark.parametrize(
    ("setting", "dimension", "classifier"),
    [
        (("algorithm=fed_avg",), 64, "fc3"),
        (("algorithm=centralized", "model=cnn2"), 128, "fc2"),
        (("algorithm=mhmd", "model=cnn4", "model.options.width=8"), 8, "fc"),
        (("algorithm=sl_single_server", *KEEP), 16, "fc"),
        (("algorithm=fed_avg", *KEEP, "precision=bf16"), 16, "fc"),
        (("algorithm=fsmkd", NET, "model.cut=[stem,norm]"), 12, "out"),
        (("algorithm=sl_multi_server", NET, "model.cut=stem", "precision=fp64"), 12, "out"),
        (("algorithm=fed_avg", NET), 12, "out"),
        (("algorithm=fed_babu", NET), 12, "out"),
    ],
    ids=lambda value: "-".join(part.rpartition("=")[2] for part in value[:2]) if isinstance(value, tuple) else "",
)
def test_features_are_what_the_classifier_takes(
    configure, setting: tuple[str, ...], dimension: int, classifier: str
) -> None:
    federation = play(Federation(configure(*setting, "rounds=1", "num_clients=2", "lr=0.01")))
    before = weights(federation)
    found, labels, where = of(federation)
    assert where == classifier
    assert found.shape == (360, dimension)
    assert found.dtype == torch.float32
    assert torch.equal(labels, federation.setup.dataset.test.labels)
    # The model's own classifier on them is the model.
    state = {key: tensor for part in federation.learnt.client_states(0).values() for key, tensor in part.items()}
    logits = F.linear(found, *(state[f"{classifier}.{name}"].float() for name in ("weight", "bias")))
    evaluation = federation.evaluate()
    rough = 0.01 if "precision=bf16" in setting else 1e-4
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(evaluation.loss, rel=rough)
    assert float((logits.argmax(1) == labels).double().mean()) == pytest.approx(evaluation.accuracy, abs=rough)
    assert same(before, weights(federation))


@pytest.mark.parametrize("shape", [(4, 3, 3), (5, 4), (4,)], ids=["map", "tokens", "vector"])
def test_maps_and_tokens_are_replaced_by_their_means(shape: tuple[int, ...]) -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten())
    leave_out(model[1])
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    expected = {3: x.mean((-2, -1)), 2: x.mean(1), 1: x}[len(shape)]
    assert expected.shape == (2, 4)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["local_only", "lg_fed_avg"])
def test_a_method_without_features_for_all_is_refused(configure, name: str) -> None:
    with pytest.raises(ConfigError, match=f"algorithm.name={name}: expected a method with features that all clients"):
        feature_parts(Federation(configure(f"algorithm={name}")))
    feature_parts(Federation(configure(f"algorithm={name}", "num_clients=1")))


@pytest.mark.parametrize("name", ["fed_per", "ditto"])
def test_of_personal_methods_it_is_what_the_server_holds(configure, name: str) -> None:
    federation = play(Federation(configure(f"algorithm={name}", "rounds=1")))
    modules, _ = feature_parts(federation)
    held = [federation.server.ctx.part(part) for part in federation.setup.algorithm.layout.whole]
    for module, part in zip(modules, held, strict=True):
        assert same(module.state_dict(), part.state_dict())


# ---------------------------------------------------------------------- the protocol


def test_training_makes_better_features(configure, tmp_path: Path) -> None:
    config = configure("algorithm=fed_avg", "rounds=6", "lr=0.003", "batch_size=20")
    start = probe(Federation(config), ProbeConfig(), tmp_path / "start")
    federation = play(Federation(config))
    before = weights(federation)
    end = probe(federation, ProbeConfig(), tmp_path / "end")
    assert same(before, weights(federation))
    assert start.knn is not None
    assert end.knn is not None
    assert end.knn > start.knn + 0.02
    assert all(end.linear[share] > start.linear[share] for share in ("0.1", "0.01"))
    assert end.linear["1.0"] >= max(start.linear["1.0"], 0.9)
    assert end.labels == {"1.0": 1437, "0.1": 140, "0.01": 10}
    assert (end.round, end.dimension, end.features) == (6, 64, "input of fc3")
    assert probe(federation, ProbeConfig(), tmp_path / "again") == end
    other = probe(federation, ProbeConfig(knn=False, labels=(0.01,)), tmp_path / "other")
    assert (other.knn, other.linear) == (None, {"0.01": end.linear["0.01"]})


def test_samples_are_drawn_from_the_seed(configure, tmp_path: Path) -> None:
    few = ProbeConfig(train_samples=200, test_samples=50, labels=())
    config = configure("algorithm=fed_avg", "rounds=1")
    found = {seed: probe(Federation(replace(config, seed=seed)), few, tmp_path / str(seed)) for seed in (0, 1)}
    assert {(each.train_samples, each.test_samples, each.k) for each in found.values()} == {(200, 50, 200)}
    assert found[0] != found[1]


def test_features_that_are_not_finite_leave_nothing(configure, tmp_path: Path) -> None:
    federation = Federation(configure("algorithm=fed_avg"))
    next(federation.server.ctx.part("model").parameters()).data.fill_(float("nan"))
    with pytest.raises(ConfigError, match="model: its features of training samples are not finite"):
        probe(federation, CONFIG, tmp_path)
    assert list(tmp_path.iterdir()) == []


def finished(configure, tmp_path: Path, *overrides: str) -> Path:
    config = configure("rounds=2", *SMALL, *overrides)
    with RunFolder.claim(tmp_path / "run", config.identity()) as folder:
        run(config, folder)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def saved(configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for those who leave it as it is."""
    return finished(configure, tmp_path_factory.mktemp("saved"), "algorithm=fed_avg", "rounds=1")


@pytest.mark.parametrize("name", ["sl_single_server", "fed_per"])
def test_a_saved_run_gives_what_its_own_end_gave(configure, tmp_path: Path, name: str) -> None:
    path = finished(configure, tmp_path, f"algorithm={name}", "probe.after=true")
    first = earlier_probe(path, CONFIG)
    assert first is not None
    summary = probed_folder(path, CONFIG) / "summary.json"
    content = json.loads(summary.read_text())
    assert {"features", "round", "dimension", "train_samples", "test_samples", "knn", "linear"} <= content.keys()
    assert (content["finished"], content["round"], content["train_samples"]) == (True, 2, 300)
    summary.unlink()
    assert earlier_probe(path, CONFIG) is None
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert command.main([str(tmp_path)]) == 0
    assert earlier_probe(path, CONFIG) == first
    assert all(file.read_bytes() == content for file, content in files.items()), "nothing else in the run changed"
    assert command.main([str(path), "probe.labels=[0.5]", "probe.knn=false", "progress=lines"]) == 0
    other = earlier_probe(path, replace(CONFIG, labels=(0.5,), knn=False))
    assert other is not None
    assert (list(other.linear), other.knn, earlier_probe(path, CONFIG)) == (["0.5"], None, first)


def test_the_tables_show_it(configure, tmp_path: Path, capsys, caplog) -> None:
    caplog.set_level("INFO")
    path = finished(configure, tmp_path, "algorithm=fed_avg", "probe.after=true", "progress=lines")
    found = earlier_probe(path, CONFIG)
    assert found is not None
    assert found.knn is not None
    rows = {"kNN": found.knn}
    rows |= {f"linear, {name} of labels": found.linear[share] for name, share in (("100%", "1.0"), ("10%", "0.1"))}
    assert command.main([str(path)]) == 0
    for text in (capsys.readouterr().out, caplog.text):
        for name, accuracy in rows.items():
            (line,) = [line for line in text.splitlines() if f" {name} " in line]
            assert f"{accuracy:.2%}" in line
    assert "64, input of fc3" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["probe.knn=true"], "name the folder of a run"),
        (["nowhere"], "run=nowhere: expected the folder of a run"),
        (["RUN", "probe.k=0"], "probe.k=0: expected an integer >= 1"),
        (["RUN", "probe.labels=[2]"], "probe.labels=[2.0]: expected different shares > 0 and <= 1"),
        (["RUN", "probe.labels=0.1"], "probe.labels=0.1: expected a list"),
        (["RUN", "probe.labels=[]", "probe.knn=false"], "probe.labels=[]: expected at least one share"),
        (["RUN", "probe.labels=["], "probe.labels=[: expected a value such as 200"),
        (["RUN", "probe.l2=0"], "probe.l2=0.0: expected a finite number > 0"),
        (["RUN", "probe.kn=3"], "did you mean probe.k"),
        (["RUN", "probe.after=true"], "key=probe.after: expected one that may be set for a run that is over"),
        (["RUN", "personalize.part=full"], "key=personalize.part: expected one that may be set"),
    ],
)
def test_mistakes_are_reported_in_one_line(saved: Path, capsys, arguments: list[str], line: str) -> None:
    assert command.main([str(saved) if text == "RUN" else text for text in arguments]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert line in error
    assert not (saved / "probed").exists()


def test_a_run_that_is_in_use_or_has_no_shared_model_is_refused(configure, tmp_path: Path, capsys) -> None:
    path = finished(configure, tmp_path, "algorithm=lg_fed_avg", "rounds=1")
    assert command.main([str(path)]) == 1
    assert "features that all clients share; in this one each client has its own" in capsys.readouterr().err
    lock = FileLock.take(path / ".lock")
    assert lock is not None
    assert command.main([str(path)]) == 1
    assert "a run that no other process is using" in capsys.readouterr().err
    lock.release()
    assert not (path / "probed").exists()
    with pytest.raises(ConfigError, match="features that all clients share"):
        finished(configure, tmp_path / "other", "algorithm=local_only", "probe.after=true", "rounds=10000")


def test_a_run_of_an_earlier_version_can_be_probed(configure, tmp_path: Path) -> None:
    path = finished(configure, tmp_path, "algorithm=fed_avg", "rounds=1")
    text = (path / "config.yaml").read_text()
    content = command_free(text, "monitor", "probe")
    (path / "config.yaml").write_text(content)
    assert command.main([str(path), "probe.labels=[]", "progress=none"]) == 0
    assert earlier_probe(path, ProbeConfig(labels=())) is not None


def command_free(text: str, *sections: str) -> str:
    """A yaml text without some of its sections."""
    import yaml

    return yaml.safe_dump({key: value for key, value in yaml.safe_load(text).items() if key not in sections})


# ---------------------------------------------------------------------- the monitor


@pytest.fixture
def learner(configure, monkeypatch):
    """A method whose model's output counts as features: ``learner(...)`` gives a federation of it."""
    kind = type("Learner", (FedAvg,), {"evaluates_features": True, "name": "learner"})
    monkeypatch.setitem(algorithms.ALGORITHMS, "learner", kind)

    def make(*overrides: str) -> Federation:
        config = configure("algorithm=fed_avg", "monitor.train_samples=500", "monitor.k=15", *overrides)
        return Federation(replace(config, algorithm_name="learner"))

    return make


def test_a_method_that_learns_features_is_tested_by_the_knn(learner) -> None:
    federation = play(learner("rounds=3", "eval_interval=1", "dataset.validation=0.1", "dataset.local_test=true"))
    evaluation = federation.evaluate()
    assert evaluation == federation.evaluate()
    train, labels, where = of(federation, "train")
    test, wanted, _ = of(federation)
    assert where == "output"
    bank = federation.evaluator._test.__self__._bank
    assert len(bank) == 500
    found = knn_accuracy(train[bank], labels[bank], test, wanted, 10, 15, 0.1)
    assert evaluation.accuracy == found > 0.5
    assert 0 < evaluation.metrics["val_acc"] <= 1
    local = [accuracy * samples for metric, _, samples, accuracy in evaluation.clients if metric == "local_acc"]
    assert len(local) == 4
    assert 0 < evaluation.loss < -torch.tensor(1e-12).log()
    tree = F.normalize(test, dim=1) @ F.normalize(train[bank], dim=1).T
    nearest = tree.topk(15, dim=1)
    weight = (nearest.values / 0.1).exp()
    right = (weight * (labels[bank][nearest.indices] == wanted.unsqueeze(1))).sum(1) / weight.sum(1)
    assert evaluation.loss == pytest.approx(float(-right.clamp_min(1e-12).log().mean()), rel=1e-4)


def test_what_the_monitor_looks_at_decides_the_result_and_what_comes_after_does_not(configure) -> None:
    base = configure("algorithm=moco_sfl").identity()
    assert configure("algorithm=moco_sfl", "monitor.k=5").identity() != base
    assert configure("algorithm=moco_sfl", "probe.after=true", "probe.k=5").identity() == base


def test_such_a_method_can_be_probed_and_not_personalised(learner, tmp_path: Path) -> None:
    federation = play(learner("rounds=3"))
    with pytest.raises(ConfigError, match="personalize.part=head: expected null after a method that learns features"):
        personalize(federation, PersonalizeConfig("head"), tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
    found = probe(federation, replace(CONFIG, train_samples=None), tmp_path)
    assert (found.features, found.dimension) == ("output", 10)
    assert found.linear["1.0"] > 0.5
