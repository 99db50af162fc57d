"""`hydra/launcher=ray`, on a Ray that it starts and on a cluster that runs, in a network of its own."""

import importlib.util
import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launchers.conftest import LONG, SHORT, Found, in_mid_run, jobs, left
from tests.launchers.namespace import ADDRESS, Namespace, describe, finish, missing, sweep_command

PORT = 6399
RAY = str(Path(sys.executable).with_name("ray"))


def _why_not() -> str:
    if importlib.util.find_spec("ray") is None:
        return 'Ray is not installed (pip install -e ".[ray]": 240 MB, about 20 s)'
    return missing()


WHY_NOT = _why_not()
# Half a minute each on a machine with nothing else to do.
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-"), pytest.mark.timeout(560)]


def test_a_sweep_on_a_ray_of_its_own_equals_one_by_joblib(
    namespace: Namespace, tmp_path: Path, by_joblib: Callable[[tuple[str, ...]], Found]
) -> None:
    command = sweep_command(tmp_path, "ray", *SHORT, "hydra.launcher.ray.init.num_cpus=2")
    result = finish(namespace.start(command))
    assert result[0] == 1, describe(result)
    assert [job["state"] for job in jobs(tmp_path)] == ["finished", "finished", "failed"], describe(result)
    assert "1 of 3 jobs failed; the same command tries them again\n" in result[2]
    assert {job["place"] for job in jobs(tmp_path)[:2]} == {"processor, threads: 1"}
    assert left(tmp_path) == by_joblib(SHORT)
    # Its token was nobody else's, and Ray ended with the sweep.
    assert not (namespace.folder / "home" / ".ray").exists()
    assert "raylet" not in namespace.run("ps", "-A", "-o", "comm")


def start_cluster(namespace: Namespace) -> str:
    """Start a Ray that asks for a token, away from the sweep's folder; gives the token."""
    token = secrets.token_hex(32)
    options = ("--num-cpus=2", f"--node-ip-address={ADDRESS}", f"--port={PORT}", "--include-dashboard=false")
    namespace.start_servers([RAY, "start", "--head", *options], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    return token


def test_a_killed_worker_on_a_cluster_costs_only_time(
    namespace: Namespace, tmp_path: Path, by_joblib: Callable[[tuple[str, ...]], Found]
) -> None:
    token = start_cluster(namespace)
    # A relative save_dir means what it means where the command was given, whatever folder Ray runs in.
    command = sweep_command("saves", "ray", *LONG, f"hydra.launcher.ray.init.address={ADDRESS}:{PORT}")
    process = namespace.start(command, cwd=tmp_path, RAY_AUTH_TOKEN=token)
    in_mid_run(tmp_path / "saves", process)
    worker = namespace.run("pgrep", "-f", "^ray::_work").split()[0]
    namespace.run("kill", "-KILL", worker)
    result = finish(process)
    assert result[0] == 0, describe(result)
    assert left(tmp_path / "saves") == by_joblib(LONG)
    outputs = [path.read_text() for path in tmp_path.glob("saves/multirun/*/jobs/*/output.log")]
    assert sum("resumed after round" in output for output in outputs) == 1
    assert "raylet" in namespace.run("ps", "-A", "-o", "comm"), "the cluster is not the sweep's to stop"


def test_a_cluster_asks_for_its_token(namespace: Namespace, tmp_path: Path) -> None:
    start_cluster(namespace)
    command = sweep_command(tmp_path, "ray", *SHORT, f"hydra.launcher.ray.init.address={ADDRESS}:{PORT}")
    status, out, err = finish(namespace.start(command))
    assert (status, err.count("\n")) == (1, 1), out + err
    assert err.startswith("hydra/launcher=ray: the cluster's token is needed, in RAY_AUTH_TOKEN or ~/.ray/auth_token")
    refused = finish(namespace.start(command, RAY_AUTH_TOKEN=secrets.token_hex(32)))
    assert refused[0] == 1
    assert "InvalidAuthToken" in refused[2]
    assert refused[2].splitlines()[-1].startswith("hydra.launcher.ray.init: Ray does not start: ")
    assert list(tmp_path.rglob("identity")) == []


def test_ray_says_what_it_was_told(namespace: Namespace, tmp_path: Path) -> None:
    """Two jobs at a time on four processors, as they ask for two each."""
    command = sweep_command(
        tmp_path,
        "ray",
        *("num_clients=2", "rounds=1", "threads=2", "seed=0,1"),
        *("hydra.launcher.ray.init.num_cpus=4", "hydra.launcher.ray.remote.num_cpus=2"),
    )
    result = finish(namespace.start(command))
    assert result[0] == 0, describe(result)
    content = [json.loads(path.read_text()) for path in tmp_path.glob("multirun/*/jobs/*/job.json")]
    assert [job["threads"] for job in content] == [2, 2]
