"""Real sweeps in real processes: jobs, workers and the launcher are killed, and what is left is compared."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.locks import FileLock
from cutlayer.runtime.job import claim
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.launching.sweeps import job_process as sweep_job
from cutlayer.runtime.launching.sweeps.sweep import JobFolder
from cutlayer.runtime.run_folder import read_status
from tests.places import ROOT, program

ROUNDS = 40
SETTING = (
    *("dataset=digits", "model=mlp", "num_clients=3", f"rounds={ROUNDS}", "batch_size=100", "device=cpu"),
    *("checkpoint_interval=1", "hydra.launcher.n_jobs=2"),
)
SWEEP = ("algorithm=fed_avg,cse_fsl", "seed=0,1")
JOBS = 4
ONE = "hydra.launcher.n_jobs=1"  # where no test needs two workers, each of which loads everything


def start(saves: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A sweep in a process group of its own, as a terminal gives it."""
    arguments = arguments or SWEEP
    return subprocess.Popen(
        [*program("main"), "-m", *SETTING, f"save_dir={saves}", *arguments],
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


def job_in_mid_run(saves: Path, sweep: subprocess.Popen[str], but: int | None = None) -> dict[str, Any] | None:
    """The state of a job of this sweep, with another number, whose run is some rounds old and not near its end."""
    alive = processes_of(sweep)
    for path in saves.glob("multirun/*/jobs/*/state.json"):
        job = json.loads(path.read_text())
        metrics = Path(job["folder"] or "/nowhere") / "metrics.csv"
        if job["state"] == "running" and job["pid"] in alive and job["number"] != but and metrics.exists():
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


def processes_of(sweep: subprocess.Popen[str]) -> dict[int, str]:
    """The live processes of a sweep's session, launcher, workers and jobs: their command lines by number."""
    found: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, session = (process / "stat").read_text().rpartition(") ")[2].split()[:4]
            if int(session) == sweep.pid and state != "Z":
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found


def wait_until_gone(sweep: subprocess.Popen[str], what: str = "", seconds: float = 60) -> None:
    """Until no live process of the sweep has `what` in its command line."""
    end = time.monotonic() + seconds
    while left := [line for line in processes_of(sweep).values() if what in line]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def wait_until_idle(sweep: subprocess.Popen[str], seconds: float = 100) -> None:
    """Until the live processes of the sweep sleep, all of them, and have done nothing for two seconds."""
    end = time.monotonic() + seconds
    before: dict[int, list[str]] | None = None
    while True:
        now: dict[int, list[str]] = {}
        for number in processes_of(sweep):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2].split()
                now[number] = [fields[0], *fields[11:13]]  # its state and its time on a processor
        if now == before and all(state == "S" for state, *_ in now.values()):
            return
        assert time.monotonic() < end, now
        before = now
        time.sleep(2)


def parent(number: int) -> int:
    return int(Path(f"/proc/{number}/status").read_text().split("PPid:")[1].split()[0])


def run_alone(saves: Path, *setting: str) -> None:
    """What `python main.py` does without -m."""
    overrides = (*SETTING[:-1], *setting)
    config = load_config([*overrides, f"save_dir={saves}", "progress=none"])
    with claim(config, overrides) as folder:
        run(config, folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the sweep's runs leave, each on its own in this process."""
    saves = tmp_path_factory.mktemp("undisturbed")
    for algorithm in ("fed_avg", "cse_fsl"):
        for seed in (0, 1):
            run_alone(saves, f"algorithm={algorithm}", f"seed={seed}")
    found = left(saves)
    assert len(found) == JOBS
    assert {run["state"] for run in found.values()} == {"finished"}
    return found


@pytest.mark.timeout(560)
def test_whatever_dies_the_same_command_resumes_to_the_same_bits(
    tmp_path: Path, undisturbed: dict[str, dict[str, Any]]
) -> None:
    """The launcher is killed, then the sweep interrupted, then a job and a worker killed; a fourth time is enough."""
    nothing_runs_on_after_the_launcher_was_killed(tmp_path)
    an_interrupted_sweep_ends_cleanly_and_says_how_to_go_on(tmp_path)
    victim = a_killed_job_and_a_killed_worker_stop_nothing_else(tmp_path)
    code, _, err = finish(start(tmp_path, *SWEEP, ONE))
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


def nothing_runs_on_after_the_launcher_was_killed(saves: Path) -> None:
    process = start(saves)
    wait_for(lambda: job_in_mid_run(saves, process), process)
    assert any("forkserver" in line for line in processes_of(process).values())
    process.kill()
    process.wait()
    wait_until_gone(process, "forkserver")  # jobs have the command line of the server that they are forked from
    finish(process)


def an_interrupted_sweep_ends_cleanly_and_says_how_to_go_on(saves: Path) -> None:
    process = start(saves)
    wait_for(lambda: job_in_mid_run(saves, process), process)
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
    assert last.endswith(f"save_dir={saves} {' '.join(SWEEP)}")
    states = [row["state"] for row in table(saves)]
    assert "interrupted" in states
    assert set(states) <= {"interrupted", "finished", "skipped", "queued"}


def a_killed_job_and_a_killed_worker_stop_nothing_else(saves: Path) -> dict[str, Any]:
    """The state of the killed job, which is the only one that the sweep leaves undone."""
    process = start(saves)
    victim = wait_for(lambda: job_in_mid_run(saves, process), process)
    os.kill(victim["pid"], signal.SIGKILL)
    state = max(saves.glob(f"multirun/*/jobs/{victim['number']}/state.json"))
    wait_for(lambda: json.loads(state.read_text())["state"] == "killed", process)
    other = wait_for(lambda: job_in_mid_run(saves, process, but=victim["number"]), process)
    worker = parent(parent(other["pid"]))  # between them is the server of forks
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 1
    assert "1 of 4 jobs failed" in err
    assert "killed by SIGKILL" in out
    states = {int(row["job"]): row["state"] for row in table(saves)}
    assert states.pop(victim["number"]) == "killed"
    assert len(states) == JOBS - 1
    assert states[other["number"]] == "finished"
    assert set(states.values()) <= {"finished", "skipped"}
    return victim


def test_two_sweeps_of_the_same_instant_share_the_work(tmp_path: Path, undisturbed: dict[str, dict[str, Any]]) -> None:
    """The second one has the same combinations in another order; no configuration has two runs."""
    sweeps = [start(tmp_path, "algorithm=fed_avg,cse_fsl", f"seed={seeds}") for seeds in ("0,1", "1,0")]
    for process in sweeps:
        code, out, err = finish(process)
        assert (code, err) == (0, "")
        assert out.count("finished") >= JOBS
    compare(tmp_path, undisturbed)
    tables = list(tmp_path.glob("multirun/*/jobs.csv"))
    assert len(tables) == 2
    for path in tables:
        with open(path, encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == JOBS
        assert {row["state"] for row in rows} <= {"finished", "skipped"}
        assert all(row["test_acc"] and row["folder"] for row in rows)
    assert not (tmp_path / "multirun" / "running").exists()
    for found in left(tmp_path).values():
        assert ": processor, threads: 1\n" in (found["folder"] / "run.log").read_text()


def test_no_job_begins_for_a_launcher_that_was_killed_before_its_first_one(tmp_path: Path) -> None:
    process = start(tmp_path, *SWEEP, ONE)
    try:
        # A worker has been given its job by now, and takes seconds to load what that needs.
        wait_for(lambda: list(tmp_path.glob("multirun/*/jobs/*/state.json")), process)
        process.kill()
        process.wait()
        wait_until_idle(process)
        wait_until_gone(process, "forkserver")
        for state in tmp_path.glob("multirun/*/jobs/*/state.json"):
            assert json.loads(state.read_text())["state"] != "running"
    finally:
        finish(process)  # joblib's workers that had not been given a job yet wait for one for good, and hold our pipes


def test_a_sweep_whose_workers_die_again_and_again_is_given_up_and_says_so(tmp_path: Path) -> None:
    process = start(tmp_path, "algorithm=fed_avg", "seed=0", "rounds=100000")
    killed: set[int] = set()
    end = time.monotonic() + 200
    while process.poll() is None:
        assert time.monotonic() < end
        for pid, line in processes_of(process).items():
            if "loky.backend.popen" in line:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
        time.sleep(0.5)
    code, _, err = finish(process)
    assert killed
    assert code == 1
    assert err.endswith("1 of 1 jobs are not done; the same command resumes them\n")


def test_jobs_wait_for_a_lock_and_for_a_gpu_and_run_nothing_again(tmp_path: Path) -> None:
    """Another process holds the first job's lock, and the second job's GPU while a run on its own does its work.

    A tool that lists one GPU makes the second job wait for its slot; without CUDA the job would then fail to use it.
    """
    tools, slots, saves = tmp_path / "tools", tmp_path / "slots" / "cutlayer-gpu-slots", tmp_path / "saves"
    tools.mkdir()
    slots.mkdir(parents=True)
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho '0, GPU-a, H100'\n")
    (tools / "nvidia-smi").chmod(0o755)
    gpu = FileLock.take(slots / "GPU-a-0")
    assert gpu is not None
    setting = ("algorithm=fed_avg", "seed=0", "rounds=5")
    identity = load_config([*SETTING[:-1], *setting, "device=cpu"]).identity()
    (saves / "multirun" / "running").mkdir(parents=True)
    lock = FileLock.take(saves / "multirun" / "running" / identity)
    assert lock is not None
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(slots.parent)}
    process = start(saves, *setting, "device=cpu,auto", **environment)
    (of_second,) = wait_for(lambda: list(saves.glob("multirun/*/jobs/1/state.json")), process)
    wait_for(lambda: "waits for a free GPU" in of_second.read_text(), process)
    assert not left(saves)
    run_alone(saves, *setting, "device=auto")
    (trained,) = left(saves).values()
    gpu.release()
    wait_for(lambda: json.loads(of_second.read_text())["state"] == "skipped", process)
    of_first = of_second.parents[1] / "0" / "state.json"
    wait_for(lambda: "waits for another process" in of_first.read_text(), process)
    assert [found["folder"] for found in left(saves).values()] == [trained["folder"]]
    lock.release(remove=True)
    assert finish(process)[0] == 0
    assert {key.strip() for key in left(saves)} > {identity}
    assert [found["state"] for found in left(saves).values()] == ["finished"] * 2
    assert [row["state"] for row in table(saves)] == ["finished", "skipped"]


def test_a_sweep_personalises_and_probes_what_an_earlier_one_trained(
    tmp_path: Path, undisturbed: dict[str, dict[str, Any]]
) -> None:
    """Two settings of two runs and a probe: nothing is trained again, each run gets all; then nothing is left to do."""
    saves = tmp_path / "saves"
    shutil.copytree(Path(os.path.commonpath([run["folder"] for run in undisturbed.values()])), saves)
    before = {path: path.stat().st_mtime_ns for path in saves.rglob("model.safetensors")}
    tune = ("algorithm=fed_avg", "seed=0,1", "personalize.part=head,full", "personalize.epochs=[0,1]")
    tune = (*tune, "probe.after=true", "probe.train_samples=100", "probe.labels=[1.0]")
    code, out, err = finish(start(saves, *tune, ONE))
    assert (code, err) == (0, "")
    assert out.count("finished") >= JOBS
    written = {path: path.stat().st_mtime_ns for path in saves.rglob("*/summary.json")}
    names = sorted(path.parent.name.partition(",")[0] for path in written)
    assert names == ["k=200"] * 2 + ["part=full"] * 2 + ["part=head"] * 2
    for path in saves.glob("multirun/*/jobs/*"):
        job = JobFolder(path)
        assert job.read().state == "finished"
        sweep_job._run(job, job.read_job())  # as the process of the same job in the next sweep
        assert job.read().state == "skipped"
    assert {path: path.stat().st_mtime_ns for path in saves.rglob("*/summary.json")} == written
    assert {path: path.stat().st_mtime_ns for path in saves.rglob("model.safetensors")} == before
    compare(saves, undisturbed)
