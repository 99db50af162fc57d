"""A sweep on disk: which jobs it has, what state each is in, and how far its run is.

`<save_dir>/multirun/<unique>/jobs/<number>/` holds a job's `job.json` (what to run), `state.json` and `output.log`.
Every process of a sweep, on whatever machine its launcher puts it, informs the others through these files alone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from cutlayer.runtime.ground.files import replace_file
from cutlayer.runtime.ground.folders import standing
from cutlayer.runtime.ground.text import csv_text

# fmt: off
JobState = Literal[
    "queued", "starting", "waiting", "running", "elsewhere", "interrupted",
    "finished", "skipped", "failed", "killed",
]
# fmt: on
DONE: tuple[JobState, ...] = ("finished", "skipped", "failed", "killed")
BAD: tuple[JobState, ...] = ("failed", "killed")
ALIVE: tuple[JobState, ...] = ("starting", "waiting", "running")

JOB, STATE, JOB_OUTPUT, TABLE = "job.json", "state.json", "output.log", "jobs.csv"
PICTURES = "pictures"
"""A folder of the sweep's: jobs whose clients have the same data draw that once."""
PATIENT = "patient"
"""A file in the sweep's folder: jobs wait for what other processes run, as nothing else is left to do."""
_COLUMNS = ("job", "state", "overrides", "rounds", "test_acc", "comm_load", "time_wall", "folder", "error")
# The last rounds' lines of metrics.csv lie within this many bytes of its end, evaluations every 100 rounds included.
_TAIL_BYTES = 32_768


@dataclass(frozen=True)
class Job:
    """A job of a sweep and the state it is in.

    Attributes:
        number: from 0, in the order of the sweep. overrides: its command line.
        state: queued; starting; waiting (for a GPU, or for another process that runs the same configuration);
            running; elsewhere (another process runs it); interrupted; finished; skipped (an earlier run had finished
            it); failed; killed (its process ended without a word).
        folder: of its run, "" before there is one. error: one line. place: what it runs on. host, pid: its process.
        rounds: how many its run has. began, ended: seconds since the epoch, 0 before that.
    """

    number: int
    overrides: tuple[str, ...] = ()
    state: JobState = "queued"
    folder: str = ""
    error: str = ""
    place: str = ""
    host: str = ""
    pid: int = 0
    rounds: int = 0
    began: float = 0.0
    ended: float = 0.0

    @property
    def is_done(self) -> bool:
        """Whether this sweep has nothing left to do for it."""
        return self.state in DONE


@dataclass(frozen=True)
class JobProgress:
    """How far a run is: completed rounds, last accuracy (fraction), payload bytes sent and seconds so far."""

    round: int = 0
    accuracy: float | None = None
    bytes: int = 0
    seconds: float = 0.0


class JobFolder:
    """One job's folder in a sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Job:
        """The job's state; a queued job when nothing is known of it."""
        known = _read(self.path / STATE)
        names = {field.name for field in fields(Job)}
        values: dict[str, Any] = {name: value for name, value in known.items() if name in names}
        values.setdefault("number", int(self.path.name))
        values["overrides"] = tuple(values.get("overrides", ()))
        return Job(**values)

    def update(self, **changes: Any) -> Job:
        """Change the state on disk."""
        job = replace(self.read(), **changes)
        if job.is_done and not job.ended:
            job = replace(job, ended=time.time())
        replace_file(self.path / STATE, json.dumps(asdict(job)) + "\n")
        return job

    def start(self, number: int, overrides: Sequence[str]) -> Job:
        """Note that somebody takes care of the job now."""
        self.path.mkdir(parents=True, exist_ok=True)
        fresh = Job(number, tuple(overrides), "starting", began=time.time(), host=socket.gethostname(), pid=os.getpid())
        return self.update(**asdict(fresh) | {"overrides": tuple(overrides)})

    def write_job(self, content: Mapping[str, Any]) -> None:
        """Write down what the job's own process needs to run."""
        replace_file(self.path / JOB, json.dumps(content) + "\n")

    def read_job(self) -> dict[str, Any]:
        """What `write_job` wrote."""
        return json.loads((self.path / JOB).read_text(encoding="utf-8"))


class Sweep:
    """A sweep's folder. Done jobs are read once: a sweep may have thousands.

    Attributes:
        path: the folder. expected: the overrides of each job, in order, where they are known beforehand.
        root: of the folder of all runs and those above it, the first that was there before the sweep.
    """

    def __init__(self, path: Path, expected: Sequence[Sequence[str]] = ()) -> None:
        self.path = path
        self.root = standing(path.parent.parent)
        self.expected = [tuple(overrides) for overrides in expected]
        self._done: dict[int, tuple[Job, JobProgress]] = {}

    def jobs(self) -> list[tuple[Job, JobProgress]]:
        """Every job and how far it is, in order."""
        numbers = set(range(len(self.expected)))
        if not self.expected and (self.path / "jobs").is_dir():
            numbers = {int(entry.name) for entry in (self.path / "jobs").iterdir() if entry.name.isdigit()}
        return [self._job(number) for number in sorted(numbers)]

    def _job(self, number: int) -> tuple[Job, JobProgress]:
        if number in self._done:
            return self._done[number]
        job = JobFolder(self.path / "jobs" / str(number)).read()
        if not job.overrides and number < len(self.expected):
            job = replace(job, overrides=self.expected[number])
        found = job, read_progress(Path(job.folder)) if job.folder else JobProgress()
        if job.is_done:
            self._done[number] = found
        return found

    def write_table(self) -> Path:
        """Write `jobs.csv`: number, state, overrides, accuracy, bytes, seconds, folder and error of every job."""
        rows: list[tuple[Any, ...]] = [_COLUMNS]
        for job, done in self.jobs():
            figures = (done.round, done.accuracy, done.bytes, done.seconds) if job.folder else ("", "", "", "")
            rows.append((job.number, job.state, " ".join(job.overrides), *figures, job.folder, job.error))
        replace_file(self.path / TABLE, csv_text(rows))
        return self.path / TABLE


def read_progress(folder: Path) -> JobProgress:
    """How far the run in `folder` is, from the end of its `metrics.csv`."""
    try:
        with open(folder / "metrics.csv", "rb") as file:
            header = file.readline()
            file.seek(max(len(header), os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = (
                file.read().decode(errors="replace").split("\n")[:-1]
            )  # what follows the last newline is being written
    except OSError:
        return JobProgress()
    names = header.decode(errors="replace").strip().split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines if line.count(",") == len(names) - 1]
    try:
        accuracy = next((float(row["test_acc"]) for row in reversed(rows) if row["test_acc"]), None)
        last = rows[-1]
        return JobProgress(int(last["round"]), accuracy, int(last["comm_load"]), float(last["time_wall"]))
    except (IndexError, KeyError, ValueError):
        return JobProgress()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast(dict[str, Any], content) if isinstance(content, dict) else {}
