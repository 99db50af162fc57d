"""What a sweep's files say of its jobs, and what is shown of that."""

import contextlib
import csv
import io
import os
import re
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from cutlayer.runtime.ground import process
from cutlayer.runtime.ground.process import SMALL_MODEL
from cutlayer.runtime.launching import hydra_support
from cutlayer.runtime.launching.hydra_errors import CONFIG_DIR
from cutlayer.runtime.launching.sweeps import supervise
from cutlayer.runtime.launching.sweeps.display import Display, outcome, shared_overrides, show_table, tally
from cutlayer.runtime.launching.sweeps.slots import VISIBLE, Gpu, gpu_slot
from cutlayer.runtime.launching.sweeps.supervise import start_job, threads_of
from cutlayer.runtime.launching.sweeps.sweep import DONE, Job, JobFolder, JobProgress, Sweep, read_progress
from tests.forked import Forks

HEADER = "round,test_acc,test_loss,train_loss,comm_load,comm_up,comm_down,comm_framed,clients,time_wall\n"


def write_metrics(folder: Path, rows: list[tuple[int, float | None, int, float]], tail: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{number},{'' if accuracy is None else accuracy},,0.5,{sent},0,0,0,3,{seconds}\n"
        for number, accuracy, sent, seconds in rows
    ]
    (folder / "metrics.csv").write_text(HEADER + "".join(lines) + tail)


def job_folder(sweep: Path, number: int, **state: object) -> JobFolder:
    folder = JobFolder(sweep / "jobs" / str(number))
    folder.start(number, ["lr=0.1", f"seed={number}"])
    folder.update(**state)
    return folder


@given(
    st.lists(st.tuples(st.none() | st.floats(0, 1), st.integers(0, 10**15)), min_size=1, max_size=60),
    st.integers(0, 900),
)
def test_progress_is_the_last_complete_line_and_the_last_evaluation(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[tuple[float | None, int]], padding: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    # Enough rounds before these for the file to be longer than what is read of it.
    rows = [(n + 1, 0.25, 7, 0.5) for n in range(padding)]
    rows += [(padding + n + 1, acc, sent, 1.5 * n) for n, (acc, sent) in enumerate(rounds)]
    write_metrics(folder, rows, tail="99999,0.9")
    with open(folder / "metrics.csv") as file:
        complete = list(csv.DictReader(file))[:-1]
    evaluated = [float(row["test_acc"]) for row in complete if row["test_acc"]]
    expected = JobProgress(
        int(complete[-1]["round"]),
        evaluated[-1] if evaluated else None,
        int(complete[-1]["comm_load"]),
        float(complete[-1]["time_wall"]),
    )
    assert read_progress(folder) == expected


NUMBERLESS = HEADER + "one,2,3,4,5,6,7,8,9,10\n"


@pytest.mark.parametrize("content", ["", "round", HEADER, HEADER + "1,0.5", NUMBERLESS, "\x00\n"])
def test_a_file_that_says_nothing_is_no_progress(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    assert read_progress(tmp_path) == JobProgress()
    assert read_progress(tmp_path / "absent") == JobProgress()


def test_jobs_are_listed_before_they_begin_and_damaged_files_are_no_harm(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, [["lr=0.1", f"seed={seed}"] for seed in range(3)])
    assert [(job.state, job.overrides[-1]) for job, _ in sweep.jobs()] == [
        ("queued", f"seed={seed}") for seed in range(3)
    ]
    job_folder(tmp_path, 1, state="running", rounds=9)
    (tmp_path / "jobs" / "2").mkdir()
    (tmp_path / "jobs" / "2" / "state.json").write_text('{"state": "runn')
    assert [job.state for job, _ in sweep.jobs()] == ["queued", "running", "queued"]
    assert [job.number for job, _ in Sweep(tmp_path).jobs()] == [1, 2]  # of a sweeper that decides as it goes


@pytest.mark.parametrize("state", DONE)
def test_a_job_that_is_done_gets_its_time_and_is_not_read_again(tmp_path: Path, state: str) -> None:
    sweep = Sweep(tmp_path, [["seed=0"]])
    folder = job_folder(tmp_path, 0, state=state)
    ((job, _),) = sweep.jobs()
    assert (job.is_done, job.ended >= job.began > 0) == (True, True)
    folder.update(state="running")
    assert sweep.jobs()[0][0].state == state


def test_the_table_holds_every_job(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", [(1, 0.5, 100, 1.0), (2, None, 250, 2.5)])
    job_folder(tmp_path, 0, state="finished", folder=str(tmp_path / "run"))
    job_folder(tmp_path, 1, state="failed", error='lr="0,5": expected a number')
    sweep = Sweep(tmp_path, [["lr=0.1", f"seed={seed}"] for seed in range(3)])
    rows = list(csv.DictReader(io.StringIO(sweep.write_table().read_text())))
    assert [row["state"] for row in rows] == ["finished", "failed", "queued"]
    assert [row["overrides"] for row in rows] == ["lr=0.1 seed=0", "lr=0.1 seed=1", "lr=0.1 seed=2"]
    assert (rows[0]["test_acc"], rows[0]["comm_load"], rows[0]["time_wall"]) == ("0.5", "250", "2.5")
    assert (rows[1]["error"], rows[1]["test_acc"]) == ('lr="0,5": expected a number', "")


def examples() -> list[tuple[Job, JobProgress]]:
    return [
        (
            Job(0, ("lr=0.1", "++model.cut=[a,b]", "device=cuda\\:3"), "finished", "/runs/zero"),
            JobProgress(9, 0.875, 2_500_000, 75.0),
        ),
        (Job(1, ("lr=0.1", "seed=1"), "failed", error="lr=0.1: expected [less]"), JobProgress()),
        (Job(2, ("lr=0.1", "seed=2"), "skipped", "/runs/two"), JobProgress(9, None, 0, 5.0)),
        (Job(3, ("lr=0.1", "seed=3"), "waiting", place="waits for a free GPU"), JobProgress()),
        (Job(4, ("lr=0.1", "seed=4"), "running", "/runs/four", rounds=10), JobProgress(5, 0.5, 1000, 20.0)),
        (Job(5, ("lr=0.1", "seed=5")), JobProgress()),
    ]


def test_the_last_table_tells_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_table(examples(), tmp_path, "go on with [this]")
    shown = capsys.readouterr()
    for text in (
        *("all jobs: lr=0.1", "model.cut=[a,b] device=cuda:3", "87.50%", "2.50 MB", "1 min 15 s", "#0 /runs/zero"),
        *("lr=0.1: expected [less]", "skipped", "3/6 jobs done (1 of them before), 1 failed, 1 running, 1 waiting"),
    ):
        assert text in shown.out, text
    assert "1 of 6 jobs failed; the same command tries them again" in shown.err
    assert "0 in part, 1 not begun" in shown.err
    assert "go on with [this]" in shown.err


@pytest.mark.parametrize("width", [60, 80, 200])
def test_one_display_fits_the_terminal_whatever_its_jobs_are_called(tmp_path: Path, width: int) -> None:
    jobs = [["dataset=digits", f"seed={seed}[b]", f"model.options.a_long_name={'x' * 90}"] for seed in range(30)]
    for number in range(25):
        job_folder(tmp_path, number, state="running", rounds=10, folder=str(tmp_path / "run"))
    write_metrics(tmp_path / "run", [(4, 0.5, 10**9, 8.0)])
    console = Console(width=width, height=12, file=io.StringIO(), force_terminal=True)
    display = Display(Sweep(tmp_path, jobs), "none")
    with console.capture() as captured:
        console.print(display._picture(console))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", captured.get()).rstrip("\n").split("\n")
    assert len(lines) <= 12
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("0/30 jobs done, 25 running")
    assert lines[-1].startswith("... and 16 more")
    assert all(f"seed={number}" in line for number, line in enumerate(lines[1:-1]))
    assert all("4/10" in line and "50.00%" in line and "1.00 GB" in line for line in lines[1:-1])


def test_lines_name_each_change_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(Sweep(tmp_path, [["lr=0.1", f"seed={seed}"] for seed in range(2)]), "lines")
    job_folder(tmp_path, 0, state="failed", error="no such key")
    display.start()
    display.stop()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["1/2 jobs done, 1 failed | #0 seed=0: failed: no such key"]


def test_what_all_jobs_share_is_not_repeated() -> None:
    assert shared_overrides([["a=1", "b=2", "c=3"], ["a=1", "b=3", "c=3"]]) == ("a=1", "c=3")
    assert shared_overrides([["a=1"]]) == ()
    assert shared_overrides([]) == ()


def test_each_state_has_its_words() -> None:
    reported = [outcome(job, done) for job, done in examples()]
    assert reported[0] == "finished, 87.50%, 2.50 MB, 1 min 15 s"
    assert reported[1] == "failed: lr=0.1: expected [less]"
    assert reported[2] == "skipped, -, 0 B, finished before"
    assert reported[3] == "waiting waits for a free GPU"
    assert tally([]) == "0/0 jobs done"


def test_a_state_survives_the_disk(tmp_path: Path) -> None:
    folder = job_folder(tmp_path, 4, state="running", rounds=3, place="GPU 1")
    assert folder.update(rounds=5) == folder.read()
    assert asdict(folder.read())["rounds"] == 5


def load(folder: str) -> None:
    """What a job may do: read data with worker processes of its own."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.arange(100))
    total = sum(int(batch.sum()) for (batch,) in DataLoader(data, batch_size=10, num_workers=2))
    (Path(folder) / "total").write_text(str(total))


LOADING = """
if __name__ == "__main__":
    import sys, tempfile
    tempfile.tempdir = None  # what the environment says now
    from tests.runtime.test_sweep_files import start_loading
    start_loading(sys.argv[1])
"""


@pytest.mark.parametrize("folder", ["short", "a-long-name-for-a-folder-of-temporary-files-" * 3])
def test_a_job_may_have_data_workers_of_its_own(forks: Forks, tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / "script.py").write_text(LOADING)
    done = forks([str(tmp_path)], str(tmp_path / "script.py"), TMPDIR=str(tmp_path / folder))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "total").read_text() == str(sum(range(100)))


def start_loading(folder: str) -> None:
    """Called in a process of its own, as there is one server of forks in each."""
    process = start_job(JobFolder(Path(folder)), load)
    process.join(120)
    assert process.exitcode == 0


class Ended:
    """A job's process that has ended."""

    def __init__(self, exitcode: int) -> None:
        self.exitcode = exitcode

    def join(self) -> None: ...


@pytest.mark.parametrize(("status", "waits"), [(-9, True), (255, True), (-11, False), (1, False)])
def test_a_job_killed_together_with_its_worker_is_not_a_failed_job(
    tmp_path: Path, status: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """joblib kills a worker's job before the worker, which may not call the job killed in between."""
    job = job_folder(tmp_path, 0, state="running")
    meanwhile: list[str] = []
    monkeypatch.setattr(supervise.time, "sleep", lambda _: meanwhile.append(job.read().state))
    monkeypatch.setattr(supervise, "_end_with_launcher", lambda: None)
    monkeypatch.setattr(supervise, "start_job", lambda *_: Ended(status))
    supervise._attend(job)
    assert meanwhile == ["running"] * waits
    assert job.read().state == "killed"


@pytest.mark.parametrize(
    ("launcher", "environment", "expected"),
    [
        ({"n_jobs": 2}, None, 4),
        ({"n_jobs": 3}, None, 2),
        ({"n_jobs": 20}, None, 1),
        ({"n_jobs": -1}, None, 1),
        ({"n_jobs": -7}, None, 4),
        ({"n_jobs": 2}, "3", 3),
        ({"cpus_per_task": 6}, None, 6),
        ({"cpus_per_task": 60}, None, 8),
        ({"ray": {"remote": {"num_cpus": 2}}}, None, 2),
        ({}, None, 8),
    ],
)
def test_threads_are_a_jobs_share_of_eight_cores(
    launcher: dict[str, object], environment: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    assert threads_of(OmegaConf.create(launcher)) == expected


def jobs_at_a_time(monkeypatch: pytest.MonkeyPatch, there: int, gpus: int, **keys: object) -> int:
    """As the launcher's file has it, on a pretended machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(there)), raising=False)
    monkeypatch.setattr(hydra_support, "visible_gpus", lambda: [None] * gpus)
    hydra_support.register_resolvers()
    launcher = OmegaConf.load(CONFIG_DIR / "hydra" / "launcher" / "parallel.yaml")
    return OmegaConf.merge(launcher, {"jobs_per_gpu": 1, "workers": 1, "device": "auto", **keys}).n_jobs


@pytest.mark.parametrize(
    ("there", "gpus", "workers", "expected"),
    [
        *((1, 0, 1, 1), (2, 0, 1, 2), (2, 0, 2, 1), (16, 0, 1, 8), (16, 0, 4, 2), (16, 0, "auto", 1), (16, 3, 4, 1)),
        *((16, 3, 1, 6), (16, 3, 2, 3), (16, 3, "auto", 6), (2, 8, 1, 2), (4, 8, 2, 2)),
    ],
)
def test_jobs_at_a_time_follow_from_cores_gpus_and_workers(
    there: int, gpus: int, workers: int | str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert jobs_at_a_time(monkeypatch, there, gpus, jobs_per_gpu=2, workers=workers) == expected


def test_on_the_processor_gpus_say_nothing_of_how_many_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs_at_a_time(monkeypatch, 16, 3, device="cpu") == 8
    assert jobs_at_a_time(monkeypatch, 16, 3, device="cpu", workers="auto") == 1


@pytest.mark.parametrize("parameters", [1, SMALL_MODEL])
def test_processes_of_a_sweep_times_their_threads_are_never_more_than_the_cores(
    parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for there in (1, 2, 3, 4, 6, 8, 16, 17):
        used: list[int] = []
        for workers in (*range(1, there + 1), "auto"):
            jobs, each = jobs_at_a_time(monkeypatch, there, 0, workers=workers), there if workers == "auto" else workers
            monkeypatch.setattr(process, "_ALL_THREADS", threads_of(OmegaConf.create({"n_jobs": jobs})))
            process.set_threads("auto", torch.device("cpu"), parameters, each)
            used.append(jobs * each * threads[-1])
            assert 1 <= used[-1] <= there, (there, workers)
        assert parameters == 1 or max(used) == there, "and none is left without work"


@pytest.mark.parametrize(("gpus", "jobs_per_gpu"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (2, 3)])
def test_jobs_and_their_workers_share_gpus_without_more_on_one_than_it_may_have(
    gpus: int, jobs_per_gpu: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv(VISIBLE, "")
    there = [Gpu(f"GPU-{number}", "H100") for number in range(gpus)]
    for workers in range(1, gpus * jobs_per_gpu + 1):
        jobs = jobs_at_a_time(monkeypatch, 64, gpus, jobs_per_gpu=jobs_per_gpu, workers=workers)
        used = Counter[str]()
        with contextlib.ExitStack() as stack:
            for _ in range(jobs):  # at once, and none has to wait
                gpu = stack.enter_context(gpu_slot("auto", jobs_per_gpu, pytest.fail, there, workers))
                assert gpu is not None
                assert os.environ[VISIBLE] == gpu.uuid
                seen = gpu.uuid.split(",")
                used.update(seen[number % len(seen)] for number in range(workers))
            with pytest.raises(TimeoutError), gpu_slot("auto", jobs_per_gpu, no_time, there, gpus * jobs_per_gpu):
                pytest.fail("all were free")
        assert max(used.values()) <= jobs_per_gpu
        assert sum(used.values()) == jobs * workers > (gpus * jobs_per_gpu) - workers
    for _ in range(2):  # nothing is held any longer, nor by the one that waited
        with gpu_slot("auto", jobs_per_gpu, pytest.fail, there, gpus * jobs_per_gpu) as every:
            assert every is not None


def no_time(_: str) -> None:
    raise TimeoutError
