"""Fine-tuning from the round with the best test, and by the method's own loss."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cutlayer import algorithms
from cutlayer import personalize as command
from cutlayer.runtime.after.personalize import earlier_personalization, personalize, personalized_folder
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.serial import load_state, save_state
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from tests.algorithms.test_kept_and_fresh import own_loss
from tests.conftest import play, same

SETTING = ("dataset.distribution=shards", "dataset.classes_per_client=3", "optimizer=sgd", "lr=0.1", "eval_interval=1")
TUNE = ("personalize.part=full", "personalize.epochs=[0,2]", "personalize.lr=0.05", "progress=none", "threads=1")
BEST = PersonalizeConfig("full", (0, 2), 0.05, start="best")
# Of four rounds the second is the best, and the third no better.
ACCURACIES = (0.5, 0.75, 0.75, 0.6)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests give the accuracies that are wanted."""
    evaluate = Federation.evaluate
    monkeypatch.setattr(
        Federation, "evaluate", lambda self: evaluate(self)._replace(accuracy=ACCURACIES[self.round - 1])
    )


def finished(configure, folder: Path, *overrides: str) -> Path:
    config = configure(*SETTING, *TUNE, *overrides)
    with RunFolder.claim(folder, config.identity()) as claimed:
        run(config, claimed)
    return folder


@pytest.mark.parametrize("name", ["fed_avg", "fed_babu", "sl_multi_server"])
def test_what_a_run_of_as_many_rounds_would_have_given(configure, tmp_path: Path, scripted, name: str) -> None:
    path = finished(configure, tmp_path / "run", f"algorithm={name}", "rounds=4", "personalize.start=best")
    shorter = play(Federation(configure(f"algorithm={name}", *SETTING, "rounds=2")))
    model = shorter.full_model()
    assert model is not None
    assert same(load_file(path / "best_model.safetensors"), model)
    assert not same(load_file(path / "model.safetensors"), model)
    found = earlier_personalization(path, BEST)
    expected = personalize(shorter, replace(BEST, start="final"), tmp_path)
    assert found is not None
    assert (found.start, found.round, expected.start) == ("best", 2, "final")
    assert replace(found, start="final") == expected
    later = tmp_path / "later"
    path.rename(later)  # what was found goes: it is measured again, from the checkpoint
    (personalized_folder(later, BEST) / "summary.json").unlink()
    assert command.main([str(later)]) == 0
    assert earlier_personalization(later, BEST) == found
    started = Federation(configure("algorithm=fed_avg", f"model.init={later / 'best_model.safetensors'}"))
    assert same(started.full_model() or {}, model)


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_resumed_run_ends_with_the_same_best(configure, tmp_path: Path, scripted, monkeypatch, stopped: int) -> None:
    """Stopped after the checkpoint of a round and in the middle of the next, before and after the best one."""
    keys = ("algorithm=mhmd", "model.auxiliary_heads.blocks=[relu1]", "rounds=4", "personalize.start=best",
            "personalize.loss=method", "lr=0.01", "personalize.lr=0.002")  # fmt: skip
    whole = finished(configure, tmp_path / "whole", *keys)
    step = Federation.step

    def stop(self: Federation):
        if self.round == stopped:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Federation, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        finished(configure, tmp_path / "stopped", *keys, "checkpoint_interval=1")
    monkeypatch.setattr(Federation, "step", step)
    resumed = finished(configure, tmp_path / "stopped", *keys, "checkpoint_interval=1")
    names = ("model.safetensors", "best_model.safetensors")
    assert all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in names)
    setting = personalized_folder(Path(), replace(BEST, loss="method", lr=0.002))
    for name in ("summary.json", "clients.csv"):
        assert (whole / setting / name).read_bytes() == (resumed / setting / name).read_bytes()
    assert json.loads((whole / setting / "summary.json").read_text())["objective"] == "method"


def test_nothing_is_kept_unless_it_is_asked_for(configure, tmp_path: Path, capsys) -> None:
    path = finished(configure, tmp_path / "run", "algorithm=fed_avg", "rounds=2")
    assert not (path / "best_model.safetensors").exists()
    (state,) = (path / "checkpoint").glob("server-*.safetensors")
    assert load_state(state).keys() == {"parts", "optimizers"}
    assert command.main([str(path), "personalize.start=best"]) == 1
    expected = "personalize.start=best: expected final, as this run was begun without keeping its best weights"
    assert expected in capsys.readouterr().err
    with pytest.raises(ConfigError, match="begun without keeping its best weights"):
        _resume(configure, path, "algorithm=fed_avg", "rounds=2", "personalize.start=best")


def _resume(configure, path: Path, *overrides: str) -> Federation:
    federation = Federation(configure(*SETTING, *TUNE, *overrides), path)
    federation.resume()
    return federation


def test_best_weights_of_another_model_are_damage(configure, tmp_path: Path) -> None:
    keys = ("algorithm=fed_avg", "rounds=2", "personalize.start=best")
    path = finished(configure, tmp_path / "run", *keys)
    federation = _resume(configure, path, *keys)
    assert federation.best is not None
    for wrong in (torch.zeros(3), torch.zeros(10, dtype=torch.float64)):
        state = federation.best.state_dict()
        states = {"model": {**state["states"]["model"], "fc3.bias": wrong}}
        save_state(tmp_path / "state", {**state, "states": states})
        with pytest.raises(RuntimeError, match="not those of this run's model"):
            federation.best.load_state_dict(load_state(tmp_path / "state"))


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (("algorithm=fed_per", "personalize.start=best"), r"personalize\.start=best: expected final, .*: head$"),
        (("algorithm=local_only", "personalize.start=best"), r"personalize\.start=best: expected final, .*: model$"),
        (("algorithm=fed_avg", "personalize.start=first"), r"personalize\.start=first: expected"),
        (("algorithm=fed_avg", "personalize.loss=own"), r"personalize\.loss=own: expected"),
        (("algorithm=fed_avg", "personalize.loss=method"), r"personalize\.loss=method: .*algorithm=mhmd$"),
    ],
)
def test_mistakes_are_reported_in_one_line(configure, tmp_path: Path, setting: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        finished(configure, tmp_path / "run", "rounds=1", *setting)


@pytest.mark.parametrize("part", ["body", "head", "full"])
def test_fine_tuning_by_the_loss_of_mhmd(configure, tmp_path: Path, monkeypatch, part: str) -> None:
    """All heads are of the head, and each client begins with the initial auxiliary ones."""
    blocks = ("relu1", "fc2")
    names = f"model.auxiliary_heads.blocks=[{','.join(blocks)}]"
    federation = play(Federation(configure("algorithm=mhmd", names, "precision=fp64", *SETTING, "lr=0.01")))
    seen: list[dict[str, torch.Tensor]] = []
    score = type(federation.evaluator).score

    def watch(self, modules, source, samples=None):
        seen.append({f"{i}/{k}": v.clone() for i, m in enumerate(modules) for k, v in m.state_dict().items()})
        return score(self, modules, source, samples)

    monkeypatch.setattr(type(federation.evaluator), "score", watch)
    personalize(federation, PersonalizeConfig(part, (2,), 0.005, loss="method"), tmp_path)
    assert len(seen) == 4
    for client, found in enumerate(seen):
        parts = federation.setup.blueprint.parts(["body", "head", "auxiliary_heads"])
        body, head, heads = parts.values()
        body.load_state_dict(federation.server.ctx.part("body").state_dict())
        learning: list[nn.Module] = [*([body] if part != "head" else []), *([head, heads] if part != "body" else [])]
        weights = [w for module in learning for w in module.parameters()]
        before = [w.detach().clone() for w in heads.parameters()]
        generator = rng.torch_generator(federation.setup.config.seed, client=client, stream="personalize batches")
        for _ in range(2):
            for x, y in federation.setup.data(client).batches(generator, 1):
                slopes = torch.autograd.grad(own_loss(body, head, list(heads.children()), blocks, x, y), weights)
                with torch.no_grad():
                    for w, g in zip(weights, slopes, strict=True):
                        w -= 0.005 * g
        moved = any(not torch.equal(a, b) for a, b in zip(before, heads.parameters(), strict=True))
        assert moved == (part != "body")
        expected = {f"{i}/{k}": v for i, m in enumerate((body, head)) for k, v in m.state_dict().items()}
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10)


def test_the_loss_changes_what_is_found_and_where_it_lies(configure, tmp_path: Path) -> None:
    federation = play(Federation(configure("algorithm=mhmd", "model=cnn4", *SETTING)))
    configs = [PersonalizeConfig("full", (1,), 0.05, loss=loss) for loss in ("cross_entropy", "method")]
    plain, own = (personalize(federation, config, tmp_path) for config in configs)
    assert plain.loss != own.loss
    assert (plain.objective, own.objective) == ("cross_entropy", "method")
    assert [config.setting for config in configs] == [
        "part=full,lr=0.05,epochs=1", "part=full,lr=0.05,epochs=1,loss=method"
    ]  # fmt: skip


def test_every_method_with_a_loss_of_its_own_is_named(configure) -> None:
    from cutlayer.algorithms.mixins import OwnLoss

    assert [name for name in algorithms.names() if issubclass(algorithms.get(name), OwnLoss)] == ["mhmd"]
