"""What the launchers do that needs neither Slurm nor Ray."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.ray_cluster import secure
from cutlayer.runtime.launching.clusters.base import ClusterLauncher
from cutlayer.runtime.launching.clusters.slurm import SlurmLauncher, last_words, task_states
from cutlayer.runtime.launching.hydra_errors import CONFIG_DIR
from cutlayer.runtime.launching.sweeps.sweep import JobFolder
from tests.launchers.namespace import sweep_command
from tests.places import ROOT, program

CONFIGS = CONFIG_DIR / "hydra" / "launcher"
FOUND = {f"{each.__module__}.{each.__name__}": each for each in Plugins.instance().discover(Launcher)}
TARGETS = {path.stem: str(OmegaConf.load(path).get("_target_", "")) for path in sorted(CONFIGS.glob("*.yaml"))}
TARGETS = {name: target for name, target in TARGETS.items() if target.startswith("hydra_plugins.")}
LAUNCHERS = {name: each for name, target in TARGETS.items() if issubclass(each := FOUND[target], ClusterLauncher)}
EXTRAS = [name for name, each in LAUNCHERS.items() if each.package]


@pytest.mark.parametrize("name", TARGETS)
def test_hydra_finds_the_class_that_the_configuration_names(name: str) -> None:
    assert name == "parallel" or LAUNCHERS[name].name == name


def test_every_launcher_has_a_configuration() -> None:
    own = {target for target in FOUND if target.startswith("hydra_plugins.cutlayer_launchers.")}
    assert own == set(TARGETS.values())


@pytest.mark.parametrize("name", EXTRAS)
def test_without_its_extra_a_launcher_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    launcher = LAUNCHERS[name]()
    config = OmegaConf.create({"hydra": {"sweep": {"dir": "."}}})
    with pytest.raises(ConfigError) as caught:
        launcher.setup(hydra_context=None, task_function=lambda _: None, config=config)  # pyright: ignore
    advice = f'needs the extra: pip install -e ".[{launcher.extra}]"'
    assert str(caught.value) == f"hydra/launcher={name}: {advice}"


@pytest.mark.parametrize("name", [name for name in EXTRAS if not importlib.util.find_spec(LAUNCHERS[name].package)])
def test_a_sweep_without_the_extra_says_so_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HYDRA_FULL_ERROR": "0"}
    command = sweep_command(tmp_path / "saves", name, "seed=0,1")
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert result.stderr.startswith(f"hydra/launcher={name}: needs the extra: ")
    assert not (tmp_path / "saves").exists()


def test_a_start_imports_neither_package() -> None:
    command = [sys.executable, "-X", "importtime", *program("main")[1:], "--cfg", "job"]
    imported = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    modules = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert {"cutlayer.runtime.launching.clusters.ray", "cutlayer.runtime.launching.clusters.slurm"} <= modules
    assert not {module.partition(".")[0] for module in modules} & {"ray", "submitit"}


# ---------------------------------------------------------------------- Slurm


def fake(monkeypatch: pytest.MonkeyPatch, status: int, out: str, err: str = "") -> list[list[str]]:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, status, out, err)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_one_question_asks_for_all_tasks_of_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake(monkeypatch, 0, "12_0 RUNNING\n12_1 CANCELLED\n12_2 NODE_FAIL\n\n")
    assert task_states(["12_0", "12_1", "12_2"]) == {"12_0": "RUNNING", "12_1": "CANCELLED", "12_2": "NODE_FAIL"}
    (command,) = asked
    assert "--jobs=12" in command
    assert "--array" in command, "pending tasks would come as one line"


def test_a_job_that_slurm_has_forgotten_is_not_a_slurm_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, 1, "", "slurm_load_jobs error: Invalid job id specified")
    assert task_states(["12_0"]) == {}
    fake(monkeypatch, 1, "", "slurm_load_jobs error: Unable to contact slurm controller")
    assert task_states(["12_0"]) is None


def test_the_last_line_of_a_traceback_is_the_reason() -> None:
    report = "Job (task=0) failed during processing with trace:\n----------------------\nTraceback:\n  File\n"
    report += "OSError: gone\n\n----------------------\nYou can check full logs with 'job.stderr(0)'"
    assert last_words(report) == "OSError: gone"
    assert last_words("something else\nmore") == "something else"


def test_a_lost_task_is_a_killed_job_unless_the_job_had_its_say(tmp_path: Path) -> None:
    launcher = SlurmLauncher()
    launcher._sweep = tmp_path
    launcher.lost(0, ["seed=0"], "Slurm task 1_0 ended:\n NODE_FAIL")
    job = JobFolder(tmp_path / "jobs" / "0").read()
    assert (job.state, job.overrides, job.error) == ("killed", ("seed=0",), "Slurm task 1_0 ended: NODE_FAIL")
    JobFolder(tmp_path / "jobs" / "1").start(1, ["seed=1"])
    JobFolder(tmp_path / "jobs" / "1").update(state="finished")
    launcher.lost(1, ["seed=1"], "Slurm task 1_1 ended: NODE_FAIL")
    assert JobFolder(tmp_path / "jobs" / "1").read().state == "finished"


# ---------------------------------------------------------------------- Ray


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED"):
        # Set, and so taken away again: what the code sets itself would stay for other tests.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


def test_a_ray_of_ones_own_gets_a_token_of_its_own(no_ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secure("hydra/launcher=ray", alone=True)
    first = os.environ["RAY_AUTH_TOKEN"]
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(bytes.fromhex(first)) == 32
    secure("hydra/launcher=ray", alone=True)
    assert os.environ["RAY_AUTH_TOKEN"] == first
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    secure("hydra/launcher=ray", alone=True)
    assert os.environ["RAY_AUTH_TOKEN"] != first


def test_a_cluster_needs_the_token_that_it_was_given(no_ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the cluster's token is needed"):
        secure("hydra/launcher=ray", alone=False)
    (no_ray / ".ray").mkdir()
    (no_ray / ".ray" / "auth_token").write_text("secret")
    secure("hydra/launcher=ray", alone=False)
    assert "RAY_AUTH_TOKEN" not in os.environ, "Ray reads the file itself"
    (no_ray / ".ray" / "auth_token").unlink()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    secure("hydra/launcher=ray", alone=False)
    assert "RAY_AUTH_TOKEN" not in os.environ
