"""`engine=ray` at a cluster in a network of its own: the bits of one process, whatever is lost."""

import json
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.workers import actors
from cutlayer.runtime.workers.clients import WorkerClients
from tests.launchers.namespace import ADDRESS, Namespace, describe, finish
from tests.launchers.test_ray import PORT, RAY, WHY_NOT
from tests.places import program

OTHER = "127.0.0.3"
RUN = ("dataset=digits", "model=mlp", "algorithm=fed_avg", "device=cpu", "num_clients=4", "workers=2", "engine=ray")
at_a_cluster = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")
pytestmark = pytest.mark.timeout(560)


class Cluster(NamedTuple):
    """Two machines, as far as Ray knows, of one CPU each."""

    namespace: Namespace
    keys: dict[str, str]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Namespace() as namespace:
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        own = ("--num-cpus=1", "--object-store-memory=100000000")
        head = (f"--node-ip-address={ADDRESS}", f"--port={PORT}", "--include-dashboard=false")
        namespace.start_servers([RAY, "start", "--head", *head, *own], **auth)
        namespace.start_servers(
            [RAY, "start", f"--address={ADDRESS}:{PORT}", f"--node-ip-address={OTHER}", *own], **auth
        )
        yield Cluster(namespace, {**auth, "RAY_ADDRESS": f"{ADDRESS}:{PORT}"})


def run(cluster: Cluster, *words: str, seconds: float = 400) -> dict[str, bool]:
    """What a task of ``on_ray`` finds."""
    command = [sys.executable, "-m", "tests.workers.on_ray", *words]
    out = cluster.namespace.run(*command, seconds=seconds, **cluster.keys, OMP_NUM_THREADS="1")
    found: dict[str, bool] = json.loads(out.splitlines()[-1])
    return found


@at_a_cluster
def test_every_method_gives_the_bits_and_the_ledger_of_one_process(cluster: Cluster) -> None:
    found = run(cluster, "methods")
    assert len(found) == 19
    assert [name for name, same in found.items() if not same] == []


@at_a_cluster
def test_an_actor_that_is_killed_costs_only_time(cluster: Cluster) -> None:
    assert all(run(cluster, "lost_actor").values())


@at_a_cluster
def test_a_machine_that_is_lost_costs_only_time(cluster: Cluster) -> None:
    """Each has room for one actor: a third machine takes the lost one's place."""
    options = ("--num-cpus=1", f"--address={ADDRESS}:{PORT}", "--node-ip-address=127.0.0.4")
    auth = {key: value for key, value in cluster.keys.items() if key != "RAY_ADDRESS"}
    cluster.namespace.start_servers([RAY, "start", *options, "--object-store-memory=100000000"], **auth)
    assert all(run(cluster, "lost_machine").values())


@at_a_cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_actors_end_with_the_run_and_the_cluster_stays(
    number: signal.Signals, cluster: Cluster, tmp_path: Path
) -> None:
    keys = (f"save_dir={tmp_path}", "progress=lines", "rounds=100000")
    process = cluster.namespace.start([*program("main"), *RUN, *keys], **cluster.keys)
    assert process.stdout is not None
    assert any("round 1/" in line for line in process.stdout), finish(process)
    assert actors_of(cluster) == 2
    cluster.namespace.run("pkill", f"-{number.name.removeprefix('SIG')}", "-f", "engine=ray")
    process.communicate(timeout=60)
    until = time.monotonic() + 60
    while actors_of(cluster) and time.monotonic() < until:
        time.sleep(0.2)
    assert actors_of(cluster) == 0
    assert "raylet" in cluster.namespace.run("ps", "-A", "-o", "comm")


def actors_of(cluster: Cluster) -> int:
    """How many there are."""
    return cluster.namespace.run("ps", "-A", "-o", "args").count("ray::RayWorker")


@at_a_cluster
@pytest.mark.parametrize(
    ("keys", "auth", "line"),
    [
        (("workers=3",), {}, "workers=3: expected at most 2, the CPUs of the cluster"),
        (("threads=2",), {}, "workers=2: expected at most 1, the CPUs of the cluster by those of a worker (threads=2)"),
        ((), {"RAY_ADDRESS": f"{ADDRESS}:1"}, "RAY_ADDRESS: Ray does not start: nothing answers at "),
        ((), {"RAY_AUTH_TOKEN": ""}, "engine=ray: the cluster's token is needed, in RAY_AUTH_TOKEN or "),
    ],
)
def test_what_cannot_be_is_one_line(
    keys: tuple[str, ...], auth: dict[str, str], line: str, cluster: Cluster, tmp_path: Path
) -> None:
    command = [*program("main"), *RUN, f"save_dir={tmp_path / 'saves'}", *keys]
    result = finish(cluster.namespace.start(command, **{**cluster.keys, **auth}))
    assert result[0] == 1, describe(result)
    assert result[2].splitlines()[-1].startswith(line), describe(result)
    assert "Traceback" not in result[2]
    assert not (tmp_path / "saves").exists()


def test_without_the_package_it_is_refused(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"engine=ray: expected processes, or the extra: pip install .*\[ray\]"):
        Federation(configure("algorithm=fed_avg", "workers=2", "engine=ray"), clients=WorkerClients)


def test_a_run_over_the_network_has_no_engine(configure: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="engine=ray: expected processes with transport=grpc"):
        configure("algorithm=fed_avg", "engine=ray", "transport=grpc", "role=server")
