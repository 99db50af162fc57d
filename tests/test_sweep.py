"""Real sweeps in real processes: jobs, workers and the launcher are killed, and what is left is compared."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.hydra_support import load_config
from runtime.locks import FileLock
from runtime.run_folder import read_status

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 40
SETTING = (
    *("dataset=digits", "model=mlp", "num_clients=3", f"rounds={ROUNDS}", "batch_size=100", "device=cpu"),
    *("checkpoint_interval=1", "hydra.launcher.n_jobs=2"),
)
SWEEP = ("algorithm=fed_avg,cse_fsl", "seed=0,1")
JOBS = 4


def start(saves: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A sweep in a process group of its own, as a terminal gives it."""
    arguments = arguments or SWEEP
    return subprocess.Popen(
        [sys.executable, "main.py", "-m", *SETTING, f"save_dir={saves}", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A parent that ignores the signal (a job in a shell's background) would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], seconds: float = 200) -> tuple[int, str, str]:
    try:
        process.wait(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    out, err = process.communicate()
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


def processes_of(sweep: subprocess.Popen[str]) -> list[str]:
    """Command lines of the live processes of a sweep's session: launcher, workers, jobs."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, session = (process / "stat").read_text().rpartition(") ")[2].split()[:4]
            if int(session) == sweep.pid and state != "Z":
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


def wait_until_gone(sweep: subprocess.Popen[str], what: str = "", seconds: float = 60) -> None:
    """Until no live process of the sweep has `what` in its command line."""
    end = time.monotonic() + seconds
    while left := [line for line in processes_of(sweep) if what in line]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


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
    assert any("forkserver" in line for line in processes_of(process))
    process.kill()
    process.wait()
    wait_until_gone(process, "forkserver")  # jobs have the command line of the server that they are forked from
    finish(process)
    code, _, err = finish(start(tmp_path))
    assert (code, err) == (0, "")
    compare(tmp_path, undisturbed)


def test_an_interrupted_sweep_ends_cleanly_and_says_how_to_go_on(
    tmp_path: Path, undisturbed: dict[str, dict[str, Any]]
) -> None:
    process = start(tmp_path)
    wait_for(lambda: job_in_mid_run(tmp_path), process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)  # an impatient second one
    process.wait(200)
    wait_until_gone(process, seconds=20)
    code, out, err = finish(process)
    assert code == 130
    assert "Traceback" not in out + err
    last = err.strip().splitlines()[-1]
    assert last.startswith("interrupted (")
    assert last.endswith(f"save_dir={tmp_path} {' '.join(SWEEP)}")
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


def test_no_job_begins_for_a_launcher_that_was_killed_before_its_first_one(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for(lambda: any("loky.backend.popen" in line for line in processes_of(process)), process)
    process.kill()
    process.wait()
    time.sleep(15)  # a worker that had begun to start would have its job's process by now
    wait_until_gone(process, "forkserver")
    for state in tmp_path.glob("multirun/*/jobs/*/state.json"):
        assert json.loads(state.read_text())["state"] != "running"
    finish(process)  # joblib's workers that had not been given a job yet wait for one for good, and hold our pipes


def test_sweeps_of_the_same_instant_never_run_a_configuration_twice(tmp_path: Path) -> None:
    sweeps = [start(tmp_path, "algorithm=fed_avg", f"seed={seeds}", "rounds=5") for seeds in ("0,1", "1,0")]
    assert [finish(process)[0] for process in sweeps] == [0, 0]
    assert {run["state"] for run in left(tmp_path).values()} == {"finished"}
    assert len(left(tmp_path)) == 2


def test_a_configuration_whose_lock_another_process_holds_is_waited_for(tmp_path: Path) -> None:
    setting = ("algorithm=fed_avg", "seed=0", "rounds=5")
    identity = load_config([*SETTING[:-1], *setting]).identity()
    (tmp_path / "multirun" / "running").mkdir(parents=True)
    lock = FileLock.take(tmp_path / "multirun" / "running" / identity)
    assert lock is not None
    process = start(tmp_path, *setting)
    (state,) = wait_for(lambda: list(tmp_path.glob("multirun/*/jobs/0/state.json")), process)
    wait_for(lambda: "waits for another process" in state.read_text(), process)
    assert not left(tmp_path)
    lock.release(remove=True)
    assert finish(process)[0] == 0
    assert [run["state"] for run in left(tmp_path).values()] == ["finished"]


def test_a_sweep_whose_workers_die_again_and_again_is_given_up_and_says_so(tmp_path: Path) -> None:
    process = start(tmp_path, "algorithm=fed_avg", "seed=0", "rounds=100000")
    killed: set[int] = set()
    end = time.monotonic() + 200
    while process.poll() is None:
        assert time.monotonic() < end
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                _, _, _, session = status.read_text().rpartition(") ")[2].split()[:4]
                pid = int(status.parent.name)
                if int(session) == process.pid and "loky.backend.popen" in (status.parent / "cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
        time.sleep(0.5)
    code, _, err = finish(process)
    assert killed
    assert code == 1
    assert err.endswith("1 of 1 jobs are not done; the same command goes on with them\n")


def test_a_single_run_that_finished_while_a_job_waited_for_a_gpu_is_not_run_again(tmp_path: Path) -> None:
    """A tool that lists one GPU makes the job wait for its slot; without CUDA the job would then fail to use it."""
    tools, slots = tmp_path / "tools", tmp_path / "slots" / "cutlayer-gpu-slots"
    tools.mkdir()
    slots.mkdir(parents=True)
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho '0, GPU-a, H100'\n")
    (tools / "nvidia-smi").chmod(0o755)
    lock = FileLock.take(slots / "GPU-a-0")
    assert lock is not None
    saves = tmp_path / "saves"
    setting = ("algorithm=fed_avg", "seed=0", "rounds=5", "device=auto")
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(slots.parent)}
    process = start(saves, *setting, **environment)
    (state,) = wait_for(lambda: list(saves.glob("multirun/*/jobs/0/state.json")), process)
    wait_for(lambda: "waits for a free GPU" in state.read_text(), process)
    command = [sys.executable, "main.py", *SETTING[:-1], f"save_dir={saves}", *setting]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lock.release()
    assert finish(process)[0] == 0
    assert [run["state"] for run in left(saves).values()] == ["finished"]
    assert [row["state"] for row in table(saves)] == ["skipped"]


def test_a_sweep_personalises_and_probes_what_an_earlier_one_trained(
    tmp_path: Path, undisturbed: dict[str, dict[str, Any]]
) -> None:
    """Two settings of two runs and a probe: nothing is trained again, each run gets all; then nothing is left to do."""
    saves = tmp_path / "saves"
    shutil.copytree(Path(os.path.commonpath([run["folder"] for run in undisturbed.values()])), saves)
    before = {path: path.stat().st_mtime_ns for path in saves.rglob("model.safetensors")}
    tune = ("algorithm=fed_avg", "seed=0,1", "personalize.part=head,full", "personalize.epochs=[0,1]")
    tune = (*tune, "probe.after=true", "probe.train_samples=100", "probe.labels=[1.0]")
    written: dict[Path, int] = {}
    for _ in range(2):
        assert finish(start(saves, *tune))[0] == 0
        found = {path: path.stat().st_mtime_ns for path in saves.rglob("*/summary.json")}
        names = sorted(path.parent.name.partition(",")[0] for path in found)
        assert names == ["k=200"] * 2 + ["part=full"] * 2 + ["part=head"] * 2
        written = written or found
        assert found == written
    assert {path: path.stat().st_mtime_ns for path in saves.rglob("model.safetensors")} == before
    compare(saves, undisturbed)
