"""What a launcher's worker does with a job of a sweep: start its process, wait, and note how it ended.

Hydra hands each job to a worker of its launcher: a process of joblib's, a Slurm task, a task on a Ray cluster. Were the
run itself in there, its death would take the worker along, and joblib then gives up the whole sweep.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cutlayer.runtime.ground.forking import server
from cutlayer.runtime.ground.processors import cores
from cutlayer.runtime.launching.hydra_errors import explain
from cutlayer.runtime.launching.sweeps.sweep import JOB_OUTPUT, PATIENT, JobFolder, read_progress

LAUNCHER, TRACEBACKS = "CUTLAYER_LAUNCHER", "CUTLAYER_TRACEBACKS"
_POLL_S = 1.0
_GRACE_S = 30.0
# When a worker of joblib's dies, joblib kills each of the others after the processes that it started: its job first.
_AFTER_ITS_JOB_S = 5.0
_SERVER_GONE = 255  # what multiprocessing says of a process whose server of forks ended before it


def supervise(composed: DictConfig, plain_values: Callable[[DictConfig], dict[str, Any]]) -> float | None:
    """Run the job that Hydra composed in a process of its own, unless this sweep has done with it.

    Args:
        plain_values: gives the configuration without Hydra's part as plain containers.

    Returns:
        The run's final accuracy (fraction), None where there is none.

    Raises:
        OSError: the state cannot be written. Whatever goes wrong with the job itself becomes its state.
    """
    job = JobFolder(Path(HydraConfig.get().runtime.output_dir))
    if not job.read().is_done:
        _run(job, composed, plain_values)
    folder = job.read().folder
    return read_progress(Path(folder)).accuracy if folder else None


def _run(job: JobFolder, composed: DictConfig, plain_values: Callable[[DictConfig], dict[str, Any]]) -> None:
    hydra = HydraConfig.get()
    overrides = [str(override) for override in hydra.overrides.task]
    job.start(int(hydra.job.num), overrides)
    threads = threads_of(hydra.launcher)
    try:
        values = plain_values(composed)
        values["save_dir"] = str(Path(values["save_dir"]).absolute())
    except Exception as error:
        job.update(state="failed", error=explain(error, overrides) or f"{type(error).__name__}: {error}")
        return
    job.write_job(
        {
            "overrides": overrides,
            "values": values,
            "threads": threads,
            "patient": (job.path.parent.parent / PATIENT).exists(),
            "tracebacks": os.environ.get(TRACEBACKS) == "1",
            "logging": OmegaConf.to_container(hydra.job_logging, resolve=True),
            "verbose": OmegaConf.to_container(hydra.verbose) if OmegaConf.is_list(hydra.verbose) else hydra.verbose,
        }
    )
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    _attend(job)


def _attend(job: JobFolder) -> None:
    _end_with_launcher()
    process: ForkServerProcess | None = None
    try:
        process = start_job(job, enter)
        process.join()
        if process.exitcode in (-signal.SIGKILL, _SERVER_GONE):
            time.sleep(_AFTER_ITS_JOB_S)  # killed itself now, this one leaves the job unfinished: it is run again
    except BaseException:  # an interrupt, or submitit's SystemExit when Slurm takes the task away and queues it again
        if process is not None:  # else it ends with this one
            _stop(process)
        if not job.read().is_done:
            job.update(state="interrupted")
        raise
    if not job.read().is_done and job.read().state != "elsewhere":
        job.update(state="killed", error=_last_words(process.exitcode, job.path / JOB_OUTPUT))


@cache
def _end_with_launcher() -> None:
    """Where this process is a worker of joblib's, end it once its launcher has died; its job then ends by itself."""
    # Not `os.getppid()`: the launcher may have died while this process came up.
    launcher = int(os.environ.get(LAUNCHER, os.getpid()))
    if "n_jobs" not in HydraConfig.get().launcher or launcher == os.getpid():
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_POLL_S)
        os._exit(1)  # nobody is left to report to

    threading.Thread(target=watch, daemon=True).start()


def start_job(job: JobFolder, target: Callable[[str], None]) -> ForkServerProcess:
    """Start a process that calls `target` with the job's folder."""
    process = server("cutlayer.runtime.launching.sweeps.loaded").Process(
        target=target, args=(str(job.path),), name=f"job {job.path.name}"
    )
    process.start()
    return process


def enter(folder: str) -> None:
    """The first thing in a job's process; here, so that the supervisor need not import what takes seconds."""
    from cutlayer.runtime.launching.sweeps.job_process import main

    main(folder)


def _stop(process: ForkServerProcess) -> None:
    process.terminate()
    process.join(_GRACE_S)
    if process.is_alive():
        process.kill()
        process.join()


def _last_words(status: int | None, output: Path) -> str:
    """Why a process that left no word of its own may have ended."""
    if status == 0:
        return "interrupted by a signal"
    if status is not None and status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    try:
        lines = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return f"ended with status {status}" + (f": {lines[-1].strip()}" if lines else "")


def threads_of(launcher: DictConfig) -> int:
    """This job's share of the cores: those that this process may use, divided by the jobs at a time.

    OMP_NUM_THREADS in the environment decides instead; joblib gives its workers such a share by it, too.
    """
    there = cores()
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    if "n_jobs" in launcher:
        jobs = int(launcher.n_jobs)  # joblib's: -1 is all cores, -2 all but one
        return max(1, there // max(1, jobs if jobs > 0 else there + 1 + jobs))
    asked = launcher.get("cpus_per_task") or OmegaConf.select(launcher, "ray.remote.num_cpus")
    return max(1, min(there, int(asked))) if asked else there
