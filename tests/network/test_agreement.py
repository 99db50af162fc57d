"""What a client takes of the server's configuration, and what it keeps of its own; what it keeps between rounds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.network.agreement import client_config, compare_data, fingerprint, shared
from cutlayer.runtime.network.client.kept import KeptState
from cutlayer.runtime.network.client.site import Site
from tests.conftest import SMALL

SERVER = load_config(["transport=grpc", "role=server", *SMALL, "algorithm=sl_single_server", "rounds=7", "lr=0.03"])
OWN = ["transport=grpc", "role=client", "server=127.0.0.1:1", "client_id=3"]


def join(*overrides: str, theirs: dict[str, Any] | None = None):
    given = [*OWN, *overrides]
    return client_config(load_config(given), shared(SERVER) if theirs is None else theirs, given)


def test_a_client_works_with_the_servers_setting_on_its_own_machine(tmp_path: Path) -> None:
    mine = (f"dataset.root={tmp_path}", "dataset.workers=1", "threads=2", f"save_dir={tmp_path}", "transport.timeout=5")
    config = join(*mine)
    assert fingerprint(shared(config)) == fingerprint(shared(SERVER))
    assert (config.rounds, config.lr, config.algorithm_name, config.model.name) == (7, 0.03, "sl_single_server", "mlp")
    assert (config.role, config.server, config.client_id) == ("client", "127.0.0.1:1", 3)
    assert (config.dataset.root, config.dataset.workers, config.threads) == (tmp_path, 1, 2)
    assert config.transport.timeout == 5  # type: ignore[union-attr]
    assert config.dataset.name == "digits"


@pytest.mark.parametrize("said", ["dataset=digits", "model=mlp", "rounds=7", "algorithm=sl_single_server", "lr=0.03"])
def test_what_a_client_says_may_be_what_the_server_says(said: str) -> None:
    assert fingerprint(shared(join(said))) == fingerprint(shared(SERVER))


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("dataset=synthetic", "dataset=synthetic: expected digits, as at the server"),
        ("model=cnn2", "model=cnn2: expected mlp, as at the server"),
        ("rounds=8", "rounds=8: expected 7, as at the server"),
        ("algorithm=fed_avg", "algorithm=fed_avg: expected sl_single_server, as at the server"),
        ("dataset.distribution=dirichlet", "dataset.distribution=dirichlet: expected iid, as at the server"),
        ("optimizer=sgd", "optimizer=sgd: expected adam, as at the server"),
    ],
)
def test_a_client_that_wants_something_else_gets_one_line(said: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        join(said)
    assert str(caught.value) == line


def test_a_client_imports_no_code_that_its_own_command_line_does_not_name() -> None:
    theirs = shared(SERVER)
    theirs["model"] = {**theirs["model"], "name": "import/os.system", "options": {"depth": 3}}
    with pytest.raises(ConfigError) as caught:
        join(theirs=theirs)
    assert str(caught.value) == (
        "model.name=import/os.system: expected a model of this project, as only the server says so; "
        "if you trust it, add: model=import/os.system model.options.depth=3"
    )
    with pytest.raises(ConfigError, match=r"^model.options.depth=3: expected no option of import/os.system, as only"):
        join("model=import/os.system", theirs=theirs)
    with pytest.raises(ConfigError, match=r"^model=import/os.systems: expected import/os.system, as at the server$"):
        join("model=import/os.systems", theirs=theirs)
    named = join("model=import/os.system", "model.options.depth=3", theirs=theirs)
    assert (named.model.name, named.model.options) == ("import/os.system", {"depth": 3})
    variants = {
        **theirs,
        "model": {**theirs["model"], "name": "mlp", "personal": {"variants": [{"name": "import/a.b"}]}},
    }
    with pytest.raises(ConfigError, match=r"model.personal.variants.0.name=import/a.b: expected a module of the model"):
        join(theirs=variants)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num_clients": 10**9}, "num_clients=1000000000: expected a number up to 100,000, as only the server says so"),
        ({"model": {"init": "/etc/passwd"}}, "model.init=/etc/passwd: expected null, as only the server says so"),
        ({"dataset": {"root": "/etc"}}, "dataset.root: no key that the server may set"),
        ({"logger": {"mlflow": {"tracking_uri": "http://x"}}}, "logger.mlflow.tracking_uri: no key that the server"),
        ({"hydra": {"run": {"dir": "/tmp"}}}, "hydra.run.dir: no key that the server may set"),
        ({"threads": 10**6}, "threads: no key that the server may set"),
        ({"model": {"name": "huggingface/timm_wrapper"}}, "model.name=huggingface/timm_wrapper: expected a model of"),
        ({"dataset": {"name": "image_folder", "options": {"train": "../../etc"}}}, "dataset.options.train=../../etc: "),
        (
            {"dataset": {"name": "image_folder", "options": {"group": "../../etc/fstab.txt:a"}}},
            "dataset.options.group=../../etc/fstab.txt:a: expected a table within the data, or a short pattern",
        ),
        (
            {"dataset": {"name": "image_folder", "options": {"group": "(a+)+$"}}},
            "dataset.options.group=(a+)+$: expected a",
        ),
        ({"model": {"options": {"hidden": [10**6]}}}, "model.options.hidden=[1000000]: expected a number up to 4,096"),
        ({"a": {"b": {"c": {"d": {"e": {"f": {"g": 1}}}}}}}, "a.b: more keys below it than the server may set"),
        ({"batch_size": [1] * 9}, "batch_size=[1,1,1,1,1,1,1,1,1]: expected another kind of value"),
        ({"x\x1b[2J": 1}, ": no key that the server may set"),
    ],
    ids=range(14),
)
def test_a_server_sets_what_it_may_and_nothing_else(change: dict[str, Any], line: str) -> None:
    theirs = shared(SERVER)
    for key, value in change.items():
        theirs[key] = {**theirs.get(key, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError) as caught:
        join(theirs=theirs)
    assert line in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("group", [2, "(p[0-9]+)_", "tables/of.csv:patient"])
def test_a_server_may_say_what_a_group_is(group: str | int) -> None:
    theirs = shared(SERVER)
    theirs["dataset"] = {**theirs["dataset"], "name": "image_folder", "options": {"group": group}}
    assert join(theirs=theirs).dataset.options["group"] == group


@pytest.mark.parametrize("change", [{"rounds": "many"}, {"surprise": 1}, {"algorithm": {"name": "nobody"}}, {"lr": -1}])
def test_what_the_server_sends_is_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        join(theirs={**shared(SERVER), **change})


def test_data_that_do_not_go_together_are_distinguished() -> None:
    here = {"name": "mnist", "classes": 10, "training samples": 100}
    assert compare_data(here, dict(here)) is None
    assert compare_data(here, {**here, "more": 1}) is None
    assert compare_data(here, {**here, "classes": 9}) == (
        "the client's data have classes 9, the server's 10; "
        "for image folders dataset.options.classes=[...] at the server names all of them"
    )
    assert "dataset.distribution=own" in str(compare_data(here, {**here, "training samples": 99}))


@given(
    kept=st.sets(st.integers(0, 30), max_size=8),
    last=st.none() | st.integers(0, 30),
    needed=st.none() | st.integers(0, 30),
)
def test_states_that_may_be_asked_for_again_stay(
    tmp_path_factory: pytest.TempPathFactory, kept: set[int], last: int | None, needed: int | None
) -> None:
    state = KeptState(tmp_path_factory.mktemp("kept"))
    for round in sorted(kept):
        state.write(round, {"part": {"w": torch.full((2,), float(round))}})
    state.forget(before=needed, after=last)
    first = -1 if needed is None else needed
    end = -1 if last is None else last
    assert state.rounds() == [round for round in sorted(kept) if first <= round <= end or round == needed]
    for round in state.rounds():
        assert state.read(round)["part"]["w"].tolist() == [round, round]


def test_a_client_is_as_it_was_after_the_round_that_counted(tmp_path: Path) -> None:
    """Also where a later round, which did not count, left it with nothing to keep."""
    site = Site(join(f"save_dir={tmp_path}"), tmp_path / "kept")
    store, row = site._store, {"w": torch.arange(3.0)}

    def after(round: int, row: dict[str, torch.Tensor] | None) -> bool:
        site._round = round
        if row is None:
            store.drop(site.client, "own")
        else:
            store.put(site.client, "own", row)
        return site.keep()

    assert after(0, row) is True
    assert after(1, {"w": row["w"] + 1}) is True
    assert after(2, None) is False
    site.restore(0, None)
    assert torch.equal(store.rows(site.client)["own"]["w"], row["w"])
    assert site.kept.rounds() == [0]
    assert after(1, None) is False
    site.restore(0, 0)
    assert torch.equal(store.rows(site.client)["own"]["w"], row["w"])
    site.restore(None, 0)  # that it kept nothing counted, but is in no checkpoint yet
    assert store.rows(site.client) == {}
    site.restore(0, 0)
    assert torch.equal(store.rows(site.client)["own"]["w"], row["w"])
    site.restore(None, None)
    assert store.rows(site.client) == {}
    with pytest.raises(ConfigError, match="this client's state after its round 6"):
        site.restore(5, 5)


def test_a_state_that_is_damaged_is_reported_in_one_line(tmp_path: Path) -> None:
    site = Site(join(f"save_dir={tmp_path}"), tmp_path / "kept")
    site.kept.write(0, {"own": {"w": torch.arange(300.0)}})
    (file,) = (tmp_path / "kept").glob("state-0.*")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"this client's state after its round 1 \(.*state-0"):
        site.restore(0, 0)


@pytest.mark.parametrize("run", ["../../../../../../elsewhere", "/elsewhere", "a\0b"])
def test_a_server_cannot_say_where_a_client_writes(tmp_path: Path, run: str) -> None:
    from cutlayer.runtime.network.client.program import _Client

    config = join(f"save_dir={tmp_path}")
    folder = _Client(config, [])._folder(config, run)
    assert folder.resolve().is_relative_to(tmp_path)
    assert folder.name not in ("", "client=3")
    assert _Client(config, [])._folder(config, "2026-11-22_02-00-00-000000-1-abcd").name.startswith("2026-11-22_")
