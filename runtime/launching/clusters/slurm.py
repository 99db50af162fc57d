"""`hydra/launcher=submitit_slurm`: Slurm arrays with one task for each job of the sweep, sent by submitit."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.launching.clusters.base import ClusterLauncher, Work
from cutlayer.runtime.launching.sweeps.sweep import ALIVE

_POLL_S = 1.0
# Between two questions to Slurm's controller, which all users of the cluster share.
_ASK_S = 15.0
# A shared file system may show a task's result this much after Slurm has called it ended.
_LATE_S = 10.0
_GRACE_S = 60.0
# Slurm kills seconds, or where its administrator grants it minutes, after it has asked a task to end.
_LONGEST_KILL_S = 1800.0
# Slurm takes no larger arrays unless its administrator allows them (MaxArraySize).
_LARGEST_ARRAY = 1000
_GONE = "no longer known to Slurm"
_ENDED = frozenset(
    {
        _GONE,
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
        *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
    }
)
# Settings that submitit knows for every kind of cluster; the others are Slurm's.
_COMMON = frozenset(
    {
        *("name", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min"),
        "stderr_to_stdout",
    }
)


class SlurmTask:
    """One job as submitit pickles it. What is preempted, or reaches its time limit, is queued again as it is."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self, overrides: Sequence[str], number: int) -> None:
        """Run the job, in a task of Slurm's.

        A task that Slurm asks to end stops its job and stays until it is killed: one that ended by itself would count
        as done, and one that had to make way would not be queued again.
        """
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self._work(overrides, number)
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(_LONGEST_KILL_S)
            raise

    def checkpoint(self, *arguments: Any) -> Any:
        """What submitit queues in its place: the same, as a run resumes from its own checkpoint."""
        return importlib.import_module("submitit.helpers").DelayedSubmission(self, *arguments)


class SlurmLauncher(ClusterLauncher):
    """Submits a sweep and waits for it; a task that Slurm cancels or loses is one killed job, and no more."""

    name = "submitit_slurm"
    extra = "slurm"
    package = "submitit"

    def run(self, work: Work, jobs: Mapping[int, Sequence[str]]) -> None:
        """Submit the jobs and wait until none is in Slurm's queue; an interrupt cancels those that are."""
        tasks = self._submit(work, jobs)
        try:
            self._wait(tasks, jobs)
        except KeyboardInterrupt:
            self._cancel(tasks)
            raise

    def _submit(self, work: Work, jobs: Mapping[int, Sequence[str]]) -> dict[int, Any]:
        utils: Any = importlib.import_module("submitit.core.utils")
        tasks: dict[int, Any] = {}
        numbers = list(jobs)
        try:
            executor = self._executor()
            for first in range(0, len(numbers), _LARGEST_ARRAY):
                some = numbers[first : first + _LARGEST_ARRAY]
                with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
                    sent = executor.map_array(SlurmTask(work), [jobs[number] for number in some], some)
                tasks.update(zip(some, sent, strict=True))
        except (utils.FailedJobError, utils.FailedSubmissionError, AssertionError, NameError) as error:
            self._cancel(tasks)
            reason = "; ".join(line.removeprefix("sbatch: error: ") for line in str(error).splitlines())
            raise ConfigError("hydra.launcher", NO_VALUE, f"Slurm does not take it: {reason}") from error
        return tasks

    def _executor(self) -> Any:
        submitit: Any = importlib.import_module("submitit")
        settings = {key: value for key, value in self._params.items() if value is not None}
        # A cluster may be set up to start its tasks without the environment of who submits them.
        path = f"export PYTHONPATH={shlex.quote(os.environ.get('PYTHONPATH', ''))}"
        settings["setup"] = [path, *settings.get("setup", [])]
        folder, timeouts = settings.pop("submitit_folder"), settings.pop("max_num_timeout")
        try:
            executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
        except RuntimeError as error:
            reason = "needs Slurm's commands, such as sbatch and srun, on this machine"
            raise ConfigError(f"hydra/launcher={self.name}", NO_VALUE, reason) from error
        executor.update_parameters(
            **{key if key in _COMMON else f"slurm_{key}": value for key, value in settings.items()}
        )
        return executor

    def _wait(self, tasks: dict[int, Any], jobs: Mapping[int, Sequence[str]]) -> None:
        """Wait until every task has ended; takes those that have out of `tasks`."""
        ended: dict[int, tuple[float, str]] = {}
        asked = time.monotonic()
        while tasks:
            time.sleep(_POLL_S)
            now = time.monotonic()
            if now - asked > _ASK_S:
                asked = now
                for number, state in self._ended(tasks).items():
                    ended.setdefault(number, (now, state))
            for number, task in list(tasks.items()):
                if task.paths.result_pickle.exists():
                    error = task.exception()
                    if error is not None:
                        self.lost(number, jobs[number], f"Slurm task {task.job_id}: {last_words(str(error))}")
                elif number in ended and now - ended[number][0] > _LATE_S:
                    self.lost(number, jobs[number], f"Slurm task {task.job_id} ended: {ended[number][1]}")
                else:
                    continue
                del tasks[number]

    def _ended(self, tasks: Mapping[int, Any]) -> dict[int, str]:
        """The final state of each task that is out of the queue."""
        states = task_states(task.job_id for task in tasks.values())
        if states is None:
            return {}
        known = {number: states.get(task.job_id, _GONE) for number, task in tasks.items()}
        return {number: state for number, state in known.items() if state in _ENDED}

    def _cancel(self, tasks: Mapping[int, Any]) -> None:
        """Take the tasks out of the queue, and give those that run the time to end well."""
        ids = [task.job_id for task in tasks.values()]
        if not ids:
            return
        subprocess.run(["scancel", *ids], check=False)
        end = time.monotonic() + _GRACE_S
        while time.monotonic() < end:
            alive = [number for number in tasks if self.folder(number).read().state in ALIVE]
            if not alive or len(self._ended(tasks)) == len(tasks):
                break
            time.sleep(_POLL_S)
        self.mark_interrupted(list(tasks))


def task_states(ids: Iterable[str]) -> dict[str, str] | None:
    """Slurm's word for the state of each task of these arrays, by id ("12_0"); None while Slurm does not answer.

    A task that ended minutes ago is missing. Asks `squeue`: `sacct` needs a cluster that keeps accounts.
    """
    states: dict[str, str] = {}
    for array in sorted({each.partition("_")[0] for each in ids}):
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={array}"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired:
            return None
        if asked.returncode == 0:
            rows = [line.split() for line in asked.stdout.splitlines()]
            states.update({row[0]: row[1] for row in rows if len(row) == 2})
        elif "Invalid job id" not in asked.stderr:
            return None
    return states


def last_words(text: str) -> str:
    """The last line of the traceback in submitit's report of a failed task."""
    lines = [line.strip() for line in text.split("-" * 22)[1].splitlines() if line.strip()] if "-" * 22 in text else []
    return lines[-1] if lines else text.strip().partition("\n")[0]
