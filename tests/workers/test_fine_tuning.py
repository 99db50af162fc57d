"""Clients fine-tune the trained model at the workers: what is found is the same to the bit, however many there are."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cutlayer import algorithms
from cutlayer import personalize as command
from cutlayer.runtime.after.personalize import CLIENTS, Personalized, personalize, personalized_folder
from cutlayer.runtime.after.saved import read_config
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.tuner import Tuner
from cutlayer.runtime.run_folder import RunFolder
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.workers.clients import WorkerClients
from tests.conftest import play, same, weights
from tests.workers.test_workers import federation

Configure = Callable[..., RunConfig]
SETTING = ("model=cnn2", "num_clients=5", "rounds=1", "dataset.distribution=shards", "dataset.classes_per_client=3")
TUNED = PersonalizeConfig("full", (0, 1, 2), 0.05)
# Clients without parts, with a body, a head or a model of their own, with a cut model, and without a server.
METHODS = ("fed_avg", "lg_fed_avg", "fed_per", "ditto", "sl_multi_server", "local_only")


def found(made: Federation, config: PersonalizeConfig, folder: Path) -> tuple[Personalized, bytes]:
    """What personalisation finds, and its table."""
    result = personalize(made, config, folder)
    return result, (personalized_folder(folder, config) / CLIENTS).read_bytes()


def test_the_methods_are_of_all_kinds() -> None:
    kinds = {algorithms.get(name).personal for name in METHODS}
    assert {(), ("body",), ("head",)} <= kinds


@pytest.mark.parametrize("name", METHODS)
def test_several_workers_find_what_one_process_finds(
    name: str, configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone = play(Federation(configure(f"algorithm={name}", *SETTING)))
    expected, before = found(alone, TUNED, tmp_path / "alone"), weights(alone)
    assert expected[0].mean[1:] != expected[0].mean[:-1]
    monkeypatch.delattr(Tuner, "scores")  # nothing is computed here
    for count in (2, 3):
        with federation(configure(f"algorithm={name}", *SETTING, f"workers={count}")) as made:
            play(made)
            assert found(made, TUNED, tmp_path / str(count)) == expected
            assert found(made, TUNED, tmp_path / str(count)) == expected, "again"
            assert same(weights(made), before)


@pytest.mark.parametrize(
    ("name", "tuned"),
    [
        ("fed_avg", replace(TUNED, start="best", part="head")),
        ("mhmd", replace(TUNED, loss="method")),
    ],
)
def test_it_begins_with_the_best_weights_and_minimises_the_method_s_loss_there(
    name: str, tuned: PersonalizeConfig, configure: Configure, tmp_path: Path
) -> None:
    """The best round is not the last one, whose weights would give other figures."""
    keys = (f"algorithm={name}", *SETTING, "rounds=3", "eval_interval=1", f"personalize.start={tuned.start}")
    alone = Federation(configure(*keys))
    accuracies = [alone.step()[0].test_acc for _ in range(3)]
    if alone.best is not None:
        alone.best.round, alone.best.states = 1, _halved(alone.best.states)
    with federation(configure(*keys, "workers=2")) as made:
        assert [made.step()[0].test_acc for _ in range(3)] == accuracies
        if made.best is not None:
            made.best.round, made.best.states = 1, _halved(made.best.states)
        expected = found(alone, tuned, tmp_path / "alone")
        assert found(made, tuned, tmp_path / "made") == expected
    final = replace(tuned, start="final", loss="cross_entropy")
    assert found(alone, final, tmp_path / "final")[1] != expected[1]


def _halved(states: dict) -> dict:
    return {name: {key: tensor / 2 for key, tensor in state.items()} for name, state in states.items()}


@pytest.mark.parametrize("name", ["fed_avg", "fed_per"])
def test_workers_that_are_killed_change_nothing(name: str, configure: Configure, tmp_path: Path) -> None:
    keys = (f"algorithm={name}", *SETTING)
    expected = found(play(Federation(configure(*keys))), TUNED, tmp_path / "alone")
    with federation(configure(*keys, "workers=2")) as made:
        play(made)
        assert isinstance(made.clients, WorkerClients)
        pool, killed = made.clients.pool, list[int]()

        def shown(done: int, _: int) -> None:
            """Kill a worker before each client but the first and the last."""
            for process in pool.living()[:1] if 0 < done < 5 else ():
                killed.append(process)
                os.kill(process, signal.SIGKILL)

        result = personalize(made, TUNED, tmp_path / "made", shown)
        assert (result, (personalized_folder(tmp_path / "made", TUNED) / CLIENTS).read_bytes()) == expected
        assert len(set(killed)) >= 2


def test_a_mistake_at_a_worker_is_one_line_and_leaves_nothing(configure: Configure, tmp_path: Path) -> None:
    with federation(configure("algorithm=fed_avg", *SETTING, "workers=2")) as made:
        with pytest.raises(ConfigError, match=r"^personalize.lr=1e\+20: expected a rate that converges"):
            personalize(play(made), replace(TUNED, lr=1e20), tmp_path)
        assert [*tmp_path.iterdir()] == []


def test_a_run_fine_tunes_at_its_workers_and_so_does_the_command_later(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("algorithm=fed_per", *SETTING, "personalize.part=full", "personalize.epochs=[0,1,2]", "progress=none")
    tables: list[bytes] = []
    for count in (1, 2):
        if count == 2:
            monkeypatch.delattr(Tuner, "scores")
        config = configure(*keys, "frac=0.4", "personalize.lr=0.05", f"workers={count}")
        with RunFolder.claim(tmp_path / str(count), config.identity()) as folder:
            run(config, folder)
        tables.append((personalized_folder(folder.path, config.personalize) / CLIENTS).read_bytes())
    made = tmp_path / "2"
    table = personalized_folder(made, TUNED) / CLIENTS
    table.unlink()
    assert command.main([str(made), "workers=3"]) == 0
    assert tables == [table.read_bytes()] * 2
    assert read_config(made, {}).config.workers == 1, "a folder from elsewhere starts no processes"
    assert command.main([str(made), "workers=9"]) == 1
    assert "workers=9: expected at most 5, the clients of a run" in capsys.readouterr().err
