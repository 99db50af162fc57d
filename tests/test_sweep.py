"""Real sweeps in real processes: jobs, workers and the launcher are killed, and what is left is compared."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.run_folder import read_status

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 40
SETTING = (
    *("dataset=digits", "model=mlp", "num_clients=3", f"rounds={ROUNDS}", "batch_size=100", "device=cpu"),
    *("checkpoint_interval=1", "hydra.launcher.n_jobs=2"),
)
SWEEP = ("algorithm=fed_avg,cse_fsl", "seed=0,1")
JOBS = 4


def start(saves: Path, *arguments: str) -> subprocess.Popen[str]:
    """A sweep in a process group of its own, as a terminal gives it."""
    arguments = arguments or SWEEP
    return subprocess.Popen(
        [sys.executable, "main.py", "-m", *SETTING, f"save_dir={saves}", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A parent that ignores the signal (a job in a shell's background) would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], seconds: float = 200) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def wait_for(found: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 150) -> Any:
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, "it never happened"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return result


def job_in_mid_run(saves: Path) -> dict[str, Any] | None:
    """The state of a job whose run is some rounds old and not near its end."""
    for path in saves.glob("multirun/*/jobs/*/state.json"):
        job = json.loads(path.read_text())
        metrics = Path(job["folder"] or "/nowhere") / "metrics.csv"
        if job["state"] == "running" and metrics.exists():
            rounds = metrics.read_text().count("\n") - 1
            if 3 <= rounds <= ROUNDS - 10:
                return job
    return None


def left(saves: Path) -> dict[str, dict[str, Any]]:
    """What each configuration left, without its times; a configuration that has several runs fails the test."""
    found: dict[str, dict[str, Any]] = {}
    for mark in saves.rglob("identity"):
        folder, identity = mark.parent, mark.read_text()
        assert identity not in found, f"{folder} and {found[identity]['folder']} are runs of the same configuration"
        results = json.loads((folder / "results.json").read_text())
        found[identity] = {
            "folder": folder,
            "state": read_status(folder)["state"],
            "results": {name: value for name, value in results.items() if not name.startswith("time_")},
            "communication": (folder / "communication.csv").read_text(),
            "model": (folder / "model.safetensors").read_bytes(),
        }
    return found


def compare(saves: Path, undisturbed: dict[str, dict[str, Any]]) -> None:
    found = left(saves)
    assert found.keys() == undisturbed.keys()
    for identity, expected in undisturbed.items():
        for name in ("state", "results", "communication", "model"):
            assert found[identity][name] == expected[name], (identity, name)


def table(saves: Path) -> list[dict[str, str]]:
    """The last sweep's table."""
    with open(max(saves.glob("multirun/*/jobs.csv")), encoding="utf-8") as file:
        return list(csv.DictReader(file))


def processes_of(saves: Path) -> list[int]:
    """Processes that have something open below `saves`."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(str(saves) in os.readlink(handle) for handle in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    saves = tmp_path_factory.mktemp("undisturbed")
    code, out, err = finish(start(saves))
    assert (code, err) == (0, "")
    assert out.count("finished") >= JOBS
    found = left(saves)
    for run in found.values():
        assert ": processor, threads: 1\n" in (run["folder"] / "run.log").read_text()
    assert len(found) == JOBS
    assert {run["state"] for run in found.values()} == {"finished"}
    return found


def test_a_killed_job_stops_nothing_else_and_the_same_command_completes_the_sweep(
    tmp_path: Path, undisturbed: dict[str, dict[str, Any]]
) -> None:
    process = start(tmp_path)
    victim = wait_for(lambda: job_in_mid_run(tmp_path), process)
    os.kill(victim["pid"], signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 1
    assert "1 of 4 jobs failed" in err
    assert "killed by SIGKILL" in out
    states = {int(row["job"]): row["state"] for row in table(tmp_path)}
    assert states == {number: "killed" if number == victim["number"] else "finished" for number in range(JOBS)}

    code, out, err = finish(start(tmp_path))
    assert (code, err) == (0, "")
    rows = table(tmp_path)
    assert [row["state"] for row in rows] == [
        "finished" if number == victim["number"] else "skipped" for number in range(JOBS)
    ]
    assert "resumed after round" in (Path(victim["folder"]) / "run.log").read_text()
    compare(tmp_path, undisturbed)
    for row in rows:
        results = json.loads((Path(row["folder"]) / "results.json").read_text())
        assert float(row["test_acc"]) == pytest.approx(results["test_acc"][-1], abs=1e-12)
        assert int(row["comm_load"]) == results["comm_load"][-1]


def test_a_killed_worker_of_the_launcher_stops_nothing(tmp_path: Path, undisturbed: dict[str, dict[str, Any]]) -> None:
    process = start(tmp_path)
    victim = wait_for(lambda: job_in_mid_run(tmp_path), process)
    status = Path(f"/proc/{victim['pid']}/status").read_text()
    server = int(status.split("PPid:")[1].split()[0])
    worker = int(Path(f"/proc/{server}/status").read_text().split("PPid:")[1].split()[0])
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    code, _, err = finish(process)
    assert (code, err) == (0, "")
    assert {row["state"] for row in table(tmp_path)} <= {"finished", "skipped"}
    compare(tmp_path, undisturbed)


def test_nothing_runs_on_after_the_launcher_was_killed_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: dict[str, dict[str, Any]]
) -> None:
    process = start(tmp_path)
    wait_for(lambda: job_in_mid_run(tmp_path), process)
    process.kill()
    process.communicate()
    end = time.monotonic() + 40
    while processes_of(tmp_path):
        assert time.monotonic() < end, "jobs outlive their launcher"
        time.sleep(0.1)
    code, _, err = finish(start(tmp_path))
    assert (code, err) == (0, "")
    compare(tmp_path, undisturbed)


def test_an_interrupted_sweep_ends_cleanly_and_says_how_to_go_on(
    tmp_path: Path, undisturbed: dict[str, dict[str, Any]]
) -> None:
    process = start(tmp_path)
    wait_for(lambda: job_in_mid_run(tmp_path), process)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130
    assert "Traceback" not in out + err
    last = err.strip().splitlines()[-1]
    assert last.startswith("interrupted (")
    assert last.endswith(f"save_dir={tmp_path} {' '.join(SWEEP)}")
    assert processes_of(tmp_path) == []
    states = [row["state"] for row in table(tmp_path)]
    assert "interrupted" in states
    assert set(states) <= {"interrupted", "finished", "queued"}
    code, _, err = finish(start(tmp_path))
    assert (code, err) == (0, "")
    compare(tmp_path, undisturbed)


def test_two_sweeps_at_once_share_the_work(tmp_path: Path, undisturbed: dict[str, dict[str, Any]]) -> None:
    """The second one has the same combinations and one more; no configuration has two runs."""
    first = start(tmp_path)
    wait_for(lambda: job_in_mid_run(tmp_path), first)
    second = start(tmp_path, "algorithm=fed_avg,cse_fsl", "seed=1,0")
    for process in (first, second):
        code, _, err = finish(process)
        assert (code, err) == (0, "")
    compare(tmp_path, undisturbed)
    for path in tmp_path.glob("multirun/*/jobs.csv"):
        with open(path, encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert {row["state"] for row in rows} <= {"finished", "skipped"}
        assert all(row["test_acc"] and row["folder"] for row in rows)
    assert not (tmp_path / "multirun" / "running").exists()
