"""Personalisation: what it finds, what it leaves alone, and that it can be had later from a saved run."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cutlayer import algorithms
from cutlayer import personalize as command
from cutlayer.runtime.after.personalize import earlier_personalization, personalize, personalized_folder
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.locks import FileLock
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from tests.conftest import play, same, weights
from tests.contract.test_contract import quick

SETTING = ("dataset.distribution=shards", "dataset.classes_per_client=3", "rounds=2", "optimizer=sgd", "lr=0.1")
TUNE = ("personalize.part=full", "personalize.epochs=[0,2]", "personalize.lr=0.05", "progress=none", "threads=1")
CONFIG = PersonalizeConfig("full", (0, 2), 0.05)
OVERALL = ("aggregate.buffers=average", "aggregate.buffers=keep_local", "aggregate.buffers=reset")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "clients.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


WITH_CLASSIFIER = [name for name in algorithms.names() if not algorithms.get(name).evaluates_features]


@pytest.mark.parametrize("name", WITH_CLASSIFIER)
def test_every_algorithm_can_be_personalised_and_is_left_as_it_was(configure, tmp_path: Path, name: str) -> None:
    federation = play(Federation(configure(f"algorithm={name}", *quick(name), "dataset.local_test=true", *SETTING)))
    before, evaluation = weights(federation), federation.evaluate()
    found = personalize(federation, PersonalizeConfig("full", (0, 3), 0.05), tmp_path)
    assert same(before, weights(federation))
    assert federation.evaluate() == evaluation
    assert federation.round == found.round == 2
    local = {client: accuracy for metric, client, _, accuracy in evaluation.clients if metric == "local_acc"}
    table = rows(tmp_path / "personalized" / "part=full,lr=0.05,epochs=0-3")
    assert {int(row["client"]): float(row["accuracy"]) for row in table if row["epochs"] == "0"} == local
    assert found.mean[0] == pytest.approx(np.mean(list(local.values())))
    if not federation.setup.algorithm.pooled:
        assert found.mean[1] > found.mean[0], "clients of three classes gain by looking at their own data"


def test_against_a_bare_loop(configure, tmp_path: Path) -> None:
    federation = play(Federation(configure("algorithm=fed_avg", "precision=fp64", *SETTING)))
    found = personalize(federation, PersonalizeConfig("full", (1, 2), 0.05), tmp_path)
    shares = federation.evaluator.shares(federation.setup.dataset.test)
    accuracies: dict[int, list[float]] = {1: [], 2: []}
    from cutlayer.runtime.ground import rng

    for client in range(4):
        (model,) = federation.setup.blueprint.parts(["model"]).values()
        model.load_state_dict(federation.server.ctx.part("model").state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        generator = rng.torch_generator(federation.setup.config.seed, client=client, stream="personalize batches")
        own = shares.indices(client)
        x_test, y_test = next(federation.setup.dataset.test.batches(own, batch_size=len(own)))
        for epoch in (1, 2):
            for x, y in federation.setup.data(client).batches(generator, 1):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            with torch.no_grad():
                accuracies[epoch].append(float((model(x_test).argmax(1) == y_test).double().mean()))
    assert found.mean == [pytest.approx(np.mean(accuracies[epoch])) for epoch in (1, 2)]
    assert found.std == [pytest.approx(np.std(accuracies[epoch])) for epoch in (1, 2)]
    assert found.worst_decile == [min(accuracies[epoch]) for epoch in (1, 2)]
    assert [sum(counts) for counts in found.counts] == [4, 4]


def test_a_list_of_epochs_in_one_pass_gives_what_each_alone_does(configure, tmp_path: Path) -> None:
    federation = play(
        Federation(
            configure("algorithm=fed_babu", "model=cnn4", "model.options.width=4", "aggregate.buffers=reset", *SETTING)
        )
    )
    together = personalize(federation, PersonalizeConfig("full", (0, 1, 4), 0.05), tmp_path)
    for at, epochs in enumerate((0, 1, 4)):
        alone = personalize(federation, PersonalizeConfig("full", (epochs,), 0.05), tmp_path)
        assert (alone.mean, alone.std, alone.loss) == ([together.mean[at]], [together.std[at]], [together.loss[at]])
    assert PersonalizeConfig("full", 4).tested_after == (0, 4)


@pytest.mark.parametrize("buffers", OVERALL)
@pytest.mark.parametrize("part", ["body", "head", "full"])
def test_only_the_part_moves(configure, tmp_path: Path, monkeypatch, part: str, buffers: str) -> None:
    federation = play(Federation(configure("algorithm=fed_avg", "model=cnn4", buffers, *SETTING)))
    start = federation.server.ctx.part("model").state_dict()
    seen: list[dict[str, torch.Tensor]] = []
    score = type(federation.evaluator).score

    def watch(self, modules, source, samples=None):
        seen.append({k: v.clone() for module in modules for k, v in module.state_dict().items()})
        return score(self, modules, source, samples)

    monkeypatch.setattr(type(federation.evaluator), "score", watch)
    personalize(federation, PersonalizeConfig(part, (0, 1), 0.05), tmp_path)
    assert len(seen) == 2 * 4
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert all(torch.equal(before[key], start[key]) for key in before), "each client starts from the global model"
        head = {key for key in before if key.startswith("fc.")}
        weighty = {key for key in before if key.endswith(("weight", "bias"))}
        assert moved & head == (head if part != "body" else set())
        if part == "head" and buffers == OVERALL[0]:
            assert moved == head, "running statistics belong to the body"
        assert moved & (weighty - head) == (set() if part == "head" else weighty - head)


def finished(configure, tmp_path: Path, *overrides: str) -> tuple[Path, Federation]:
    config = configure(*SETTING, *overrides)
    with RunFolder.claim(tmp_path / "run", config.identity()) as folder:
        run(config, folder)
    return tmp_path / "run", Federation(config)


@pytest.mark.parametrize("name", ["fed_avg", "fed_per", "ditto", "sl_single_server"])
def test_a_saved_run_gives_what_its_own_end_gave(configure, tmp_path: Path, capsys, name: str) -> None:
    path, _ = finished(configure, tmp_path, f"algorithm={name}", *TUNE)
    first = earlier_personalization(path, CONFIG)
    table = rows(personalized_folder(path, CONFIG))
    assert first is not None
    (personalized_folder(path, CONFIG) / "summary.json").unlink()
    assert earlier_personalization(path, CONFIG) is None
    (personalized_folder(path, CONFIG) / "clients.csv").unlink()
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert command.main([str(tmp_path)]) == 0
    assert earlier_personalization(path, CONFIG) == first
    assert rows(personalized_folder(path, CONFIG)) == table
    assert all(file.read_bytes() == content for file, content in files.items()), "nothing else in the run changed"
    assert command.main([str(path), "personalize.part=head", "personalize.epochs=1", "personalize.lr=0.2"]) == 0
    other = earlier_personalization(path, PersonalizeConfig("head", 1, 0.2))
    assert other is not None
    assert other.epochs == [0, 1]
    assert other.mean[0] == first.mean[0]


def test_a_run_without_its_checkpoint_is_restored_from_its_model(configure, tmp_path: Path) -> None:
    path, _ = finished(configure, tmp_path, "algorithm=fed_babu", *TUNE)
    first = earlier_personalization(path, CONFIG)
    for file in (path / "checkpoint").rglob("*"):
        if file.is_file():
            file.unlink()
    (personalized_folder(path, CONFIG) / "summary.json").unlink()
    assert command.main([str(path)]) == 0
    again = earlier_personalization(path, CONFIG)
    assert first is not None
    assert again is not None
    assert again.mean == first.mean


def test_the_summary_on_disk(configure, tmp_path: Path) -> None:
    path, _ = finished(configure, tmp_path, "algorithm=fed_avg", *TUNE)
    content = json.loads((personalized_folder(path, CONFIG) / "summary.json").read_text())
    table = rows(personalized_folder(path, CONFIG))
    assert content["finished"] is True
    for at, epochs in enumerate(content["epochs"]):
        values = [float(row["accuracy"]) for row in table if int(row["epochs"]) == epochs]
        assert content["mean"][at] == pytest.approx(np.mean(values))
        assert content["std"][at] == pytest.approx(np.std(values))
        counts, edges = np.histogram(values, bins=20, range=(0, 1))
        assert content["histogram"]["counts"][at] == counts.tolist()
        assert content["histogram"]["edges"] == pytest.approx(edges.tolist())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["personalize.part=full"], "name the folder of a run"),
        (["nowhere"], "run=nowhere: expected the folder of a run"),
        (["RUN", "personalize.part=hed"], "body, head, full"),
        (["RUN", "personalize.part=full", "personalize.epochs=-1"], "personalize.epochs=-1: expected an integer >= 0"),
        (["RUN", "personalize.part=full", "personalize.epochs=[]"], "personalize.epochs=[]: expected"),
        (["RUN", "personalize.part=full", "personalize.lr=0"], "personalize.lr=0.0: expected a finite number > 0"),
        (
            ["RUN", "personalize.part=full", "personalize.lr=1e20"],
            "personalize.lr=1e+20: expected a rate that converges",
        ),
        (["RUN", "personalize.epochs=["], "personalize.epochs=[: expected a value such as 5"),
        (["RUN", "personalise.part=full"], "did you mean personalize.part"),
        (["RUN", "lr=0.5"], "key=lr: expected one that may be set for a run that is over"),
        (["RUN"], "personalize.part=null: expected what is fine-tuned"),
    ],
)
def test_mistakes_are_reported_in_one_line(configure, tmp_path: Path, capsys, arguments: list[str], line: str) -> None:
    path, _ = finished(configure, tmp_path, "algorithm=fed_avg", "progress=none", "threads=1", "rounds=1")
    capsys.readouterr()
    assert command.main([str(path) if text == "RUN" else text for text in arguments]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert line in error
    assert not (path / "personalized").exists()


def test_a_run_in_use_is_refused(configure, tmp_path: Path, capsys) -> None:
    path, _ = finished(configure, tmp_path, "algorithm=fed_avg", "progress=none", "threads=1", "rounds=1")
    lock = FileLock.take(path / ".lock")
    assert lock is not None
    assert command.main([str(path), "personalize.part=full"]) == 1
    assert "a run that no other process is using" in capsys.readouterr().err
    lock.release()


def test_own_test_data_only(configure) -> None:
    """With ``only`` the accuracy of a round is the mean over clients of what ``true`` reports as local_acc."""
    for name in ("fed_avg", "fed_per", "ditto", "local_only"):
        found = {}
        for value in ("true", "only"):
            config = configure(f"algorithm={name}", f"dataset.local_test={value}", "dataset.validation=0.2", *SETTING)
            found[value] = play(Federation(config)).evaluate()
        whole, own = found["true"], found["only"]
        assert own.accuracy == pytest.approx(whole.metrics["local_acc/mean"])
        assert [row for row in whole.clients if row[0] == "local_acc"] == own.clients
        assert 0 <= own.metrics["val_acc"] <= 1


def test_a_client_without_data_is_tested_and_one_without_test_data_is_counted(configure, tmp_path: Path) -> None:
    config = configure("algorithm=fed_avg", "num_clients=300", "frac=0.02", "rounds=1", "batch_size=8")
    federation = play(Federation(replace(config)))
    found = personalize(federation, PersonalizeConfig("full", 1, 0.01), tmp_path)
    assert found.clients + found.skipped == 300
    assert found.skipped == int((federation.evaluator.shares(federation.setup.dataset.test).sizes == 0).sum()) > 0


def test_a_bad_config_object_names_its_key() -> None:
    with pytest.raises(ConfigError, match="lr"):
        PersonalizeConfig("full", 5, float("inf"))
