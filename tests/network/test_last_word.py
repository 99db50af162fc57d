"""A server that is killed after its last round, before its run is marked as finished, ends that run when started again.

And the beginning: what `status.py` shows of a server that has not begun to listen.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from cutlayer import status
from cutlayer.runtime import experiment
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.job import claim
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.network.server.status import NETWORK, Status, read_status_of
from cutlayer.runtime.network.server.status_file import announce
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder
from tests.conftest import SMALL
from tests.network import scenarios
from tests.network.serving import served, start_client
from tests.network.test_tls_run import free_port

pytest.importorskip("grpc", reason="the extra grpc is not installed")

SETTING = (*SMALL, "algorithm=fed_avg", "num_clients=1", "rounds=2", "transport=grpc", "progress=none")


class KilledError(BaseException):
    """What stands for SIGKILL: nothing that the run does at its end is done after it."""


def _die(*_: object, **__: object) -> None:
    raise KilledError


def _silently(hub: Any, *_: object, **__: object) -> None:
    """The end of a server's process as clients see it."""
    if not hub.closing:
        hub.closing = True
        hub.network.call(hub._care.cancel)
        hub.network.submit(hub._server.stop(None)).result(30)
        hub.network.release()


def test_a_server_killed_after_its_last_round_ends_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cutlayer.runtime.network.server.hub import Hub
    from cutlayer.runtime.network.server.remote_clients import RemoteClients

    port = free_port()
    overrides = [*SETTING, "role=server", f"transport.port={port}", f"save_dir={tmp_path / 'server'}", "device=cpu"]
    config = load_config(overrides)
    waited: list[bool] = []
    disconnect_all = RemoteClients.disconnect_all
    monkeypatch.setattr(experiment, "_save_partition", lambda *_: None)  # a picture that takes long to draw
    monkeypatch.setattr(experiment, "first_picture", lambda *_: None)

    def serve() -> None:
        with claim(config, overrides) as folder:
            experiment.run(config, folder)

    def only_run() -> Path:
        (mark,) = (tmp_path / "server").rglob("identity")
        return mark.parent

    def counted(self: RemoteClients, *, everyone: bool = False) -> None:
        waited.append(everyone)
        disconnect_all(self, everyone=everyone)

    def mark(self: RunFolder, state: str, error: str | None = None) -> None:
        if state == "finished":
            self.release()  # as the kernel does
            _die()
        marked(self, state, error)  # pyright: ignore[reportArgumentType]

    left: list[dict[str, Any]] = []

    def is_killed(state: str, *, has_model: bool) -> None:
        with pytest.raises(KilledError):
            serve()
        run = only_run()
        assert json.loads((run / "status.json").read_text())["state"] == "running"
        assert (run / "model.safetensors").exists() == has_model
        assert read_status_of(run).state == state
        left.append(json.loads((run / "results.json").read_text()))

    marked = RunFolder.mark
    client = start_client(0, port, tmp_path, "dataset=digits")
    try:
        with monkeypatch.context() as patch:  # before it has told anybody
            patch.setattr(RemoteClients, "disconnect_all", _die)
            patch.setattr(Hub, "close", _silently)
            is_killed("stopped", has_model=False)
        monkeypatch.setattr(RemoteClients, "disconnect_all", counted)
        with monkeypatch.context() as patch:
            patch.setattr(experiment, "save_tensors", _die)
            is_killed("finished", has_model=False)
        assert client.error() == ""  # it has been told
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "mark", mark)
            is_killed("finished", has_model=True)
        serve()
    finally:
        client.kill()
    assert waited == [True]  # nobody is waited for who has been told
    run = only_run()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    for results in (*left, json.loads((run / "results.json").read_text())):
        assert results["rounds"][-1] == 2
        assert results["comm_load"] == left[0]["comm_load"]


def test_a_client_that_was_lost_long_ago_is_waited_for_as_long_as_its_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cutlayer.runtime.network.client import program as client
    from cutlayer.runtime.network.server import remote_clients as remote

    with served(tmp_path, "algorithm=fed_avg", "num_clients=2", "rounds=2", clients=0) as federation:
        clients: Any = federation.clients
        waited: list[tuple[list[int], float]] = []
        monkeypatch.setattr(clients, "_wait", lambda away, needed, what, seconds: waited.append((away, seconds)))
        clients.disconnect_all()
        assert waited == []  # nobody has ever come
        seen = clients.hub.seen[1]
        seen.joined, seen.failed = 1, time.time() - 3600
        clients.disconnect_all()
        seen.failed = time.time() - 5
        clients.disconnect_all()
        assert [away for away, _ in waited] == [[1], [1]]
        assert waited[0][1] == remote._LONGEST_PAUSE_S
        assert 5.5 < waited[1][1] < 10
        clients.disconnect_all(everyone=True)
        assert waited[2] == ([0, 1], remote._LONGEST_PAUSE_S)
    assert 1.2 * client._LONGEST_S < remote._LONGEST_PAUSE_S


# ---------------------------------------------------------------------- the beginning


def test_a_server_that_starts_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    config = load_config([*SETTING, "role=server", f"save_dir={tmp_path}"])
    shown: list[str] = []

    class EnoughError(Exception):
        pass

    def looked_at(*_: object, **__: object) -> None:
        assert status.main([f"save_dir={tmp_path}", "once=true"]) == 0
        shown.append(capsys.readouterr().out)
        raise EnoughError

    monkeypatch.setattr(experiment, "Federation", looked_at)  # what takes long
    with pytest.raises(EnoughError), claim(config, list(SETTING)) as folder:
        experiment.run(config, folder)
    (text,) = shown
    assert f"the server is starting, since 0 s (process {os.getpid()}" in text
    assert "round 0/2" in text
    assert "Traceback" not in text


def test_a_server_that_goes_on_leaves_what_was_told_until_it_listens(tmp_path: Path) -> None:
    config = load_config([*SETTING, "role=server"])
    announce(tmp_path, config)
    assert read_status_of(tmp_path).state == "starting"
    before = Status(state="stopped", round=7)
    (tmp_path / NETWORK).write_text(json.dumps({"state": "stopped", "round": before.round}))
    announce(tmp_path, config)
    assert read_status_of(tmp_path) == before


def test_nothing_found_says_that_a_server_takes_some_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status.main([f"save_dir={tmp_path}"]) == 1
    assert "some seconds after its server was started" in capsys.readouterr().err


def test_a_client_without_a_test_folder_learns_which_key_helps(tmp_path: Path) -> None:
    scenarios.images(tmp_path / "mine", 0, 4)
    shutil.rmtree(tmp_path / "mine" / "test")
    config = load_config(["dataset=image_folder", f"dataset.root={tmp_path / 'mine'}", "dataset.options.channels=1"])
    with pytest.raises(ConfigError, match="or dataset.options.test=null, which holds out 20% of each class") as raised:
        Federation(config)
    assert "of a run over the network at the server" in str(raised.value)
