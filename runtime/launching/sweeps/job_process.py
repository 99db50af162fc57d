"""A job of a sweep in a process of its own, which may fail, crash or be killed without harm to any other.

That process is forked from a server (multiprocessing's `forkserver`) that has imported everything and computed nothing:
a job starts in a moment, all jobs of a sweep run the same code although somebody edits it meanwhile, and a job may have
worker processes of its own.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn, cast

from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf

from cutlayer import IN_CHECKOUT
from cutlayer.runtime.after import generate, personalize, probe
from cutlayer.runtime.after.saved import MACHINE, generate_run, personalize_run, probe_run
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.folders import make_folders, remove_empty, standing
from cutlayer.runtime.ground.locks import FileLock, is_locked
from cutlayer.runtime.ground.text import error_text, plain_logs, print_errors
from cutlayer.runtime.job import check_machine, claim, finished_like, runs_like
from cutlayer.runtime.keys import keys_of
from cutlayer.runtime.launching.hydra_errors import explain
from cutlayer.runtime.launching.sweeps.slots import gpu_slot
from cutlayer.runtime.launching.sweeps.sweep import JOB_OUTPUT, PICTURES, JobFolder
from cutlayer.runtime.run_folder import LOCK, find_running
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.workers.place import local_place

log = logging.getLogger(__name__)

Again = Callable[[Path, Mapping[str, Any], RunConfig], object]
"""Measures an earlier run: its folder, keys to change, and this job's configuration, which the run's should be."""

_POLL_S = 1.0
# A job that is asked to end and sits in one long operation ends without having its say.
_GRACE_S = 20.0


def main(folder: str) -> None:
    """Run the job described in `folder`; its state there says how it ended. Called in the job's own process."""
    job = JobFolder(Path(folder))
    _take_output(job.path / JOB_OUTPUT)
    _end_with_parent()
    content = job.read_job()
    program = ["main.py"] if IN_CHECKOUT else ["-m", "cutlayer.main"]
    sys.argv = sys.orig_argv = ["python", *program, *content["overrides"]]  # for env.json: the same run, on its own
    plain_logs()
    configure_log(cast(DictConfig, OmegaConf.create(content["logging"])), content["verbose"])
    job.update(pid=os.getpid())
    try:
        _run(job, content)
    except KeyboardInterrupt:
        job.update(state="interrupted")
    except Exception as error:
        reason = explain(error, content["overrides"])
        if reason is None or content["tracebacks"]:
            print_errors(*error_text(error).split("\n"))
        elif not job.read().folder or not Path(job.read().folder).is_dir():
            os.truncate(job.path / JOB_OUTPUT, 0)  # a mistake that left nothing: its one line says it all
            job.update(folder="")
        job.update(state="failed", error=reason or " ".join(f"{type(error).__name__}: {error}".split()))


def _run(job: JobFolder, content: dict[str, Any]) -> None:
    config = RunConfig.from_mapping(content["values"])
    job.update(rounds=config.rounds)
    with _alone(job, config, patient=content["patient"]) as may_run:
        waited: list[str] = []

        def waiting(text: str) -> None:
            waited.append(text)
            log.info("waiting for %s", text)
            job.update(state="waiting", place=f"waits for {text}")

        if not may_run:
            state = job.read()
            missing = unmeasured(Path(state.folder), config) if state.state == "skipped" else []
            if missing:
                with gpu_slot(config.device, config.jobs_per_gpu, waiting):
                    job.update(state="running", began=time.time())
                    for measure in missing:
                        measure()
                job.update(state="finished")
            return
        # Of `auto` there is one for each GPU that the job sees, and those of a cluster have GPUs of their own.
        workers = config.workers if isinstance(config.workers, int) and config.engine == "processes" else 1
        with gpu_slot(config.device, config.jobs_per_gpu, waiting, workers=workers) as gpu:
            if waited and _taken(job, config):  # by a single run, which knows nothing of this sweep
                return
            check_machine(
                config
            )  # not before: it starts CUDA, which then sees for good what was visible at that moment
            place = f"{f'GPU {gpu.uuid} ({gpu.name})' if gpu else 'processor'}, threads: {content['threads']}"
            with claim(config, content["overrides"]) as folder:
                log.info("job %d: %s", job.read().number, place)
                job.update(state="running", folder=str(folder.path), place=place, began=time.time())
                run(config, folder, job.path.parents[1] / PICTURES)
    job.update(state="finished")


def unmeasured(folder: Path, config: RunConfig) -> list[Callable[[], object]]:
    """What a configuration asks to be measured after training and a finished run of it lacks; a call measures it."""
    missing = list[Callable[[], object]]()

    def lacks(measure: Again, section: str) -> None:
        missing.append(partial(measure, folder, _measured(config, section), config))

    if config.personalize.part is not None and personalize.earlier_personalization(folder, config.personalize) is None:
        lacks(partial(personalize_run, place=partial(local_place, everyone=True)), "personalize")
    if config.probe.after and probe.earlier_probe(folder, config.probe) is None:
        lacks(probe_run, "probe")
    if config.generate.after and generate.earlier_generation(folder, generate.settled(config)) is None:
        lacks(generate_run, "generate")
    return missing


def _measured(config: RunConfig, section: str) -> dict[str, Any]:
    """What a section asks to be measured of an earlier run, and what this machine says: where its data are, too."""
    keys = keys_of(RunConfig, config.to_mapping())
    asked = (key for key in keys if key.startswith(f"{section}.") and key != f"{section}.after")
    return {key: keys[key].value for key in (*asked, *MACHINE)}


def _taken(job: JobFolder, config: RunConfig) -> bool:
    """Whether another process has finished this configuration, or runs it, which the job's state then says."""
    if config.resume != "auto":
        return False
    finished, running = finished_like(config), find_running(runs_like(config), config.identity())
    if finished is not None:
        job.update(state="skipped", folder=str(finished))
    elif running is not None:
        job.update(state="elsewhere", folder=str(running))
    return finished is not None or running is not None


@contextlib.contextmanager
def _alone(job: JobFolder, config: RunConfig, *, patient: bool) -> Generator[bool]:
    """Make sure that no other job runs, or ran, this configuration; gives whether it is ours to run.

    A patient job waits for another process that runs it, and takes over if that one ends without finishing.
    """
    if config.resume != "auto":
        yield True
        return
    path = config.save_dir.absolute() / "multirun" / "running" / config.identity()
    root = standing(config.save_dir)
    while True:
        lock = _take(path)
        try:
            if lock is not None and not _taken(job, config):
                yield True
                return
            if lock is None:
                job.update(state="elsewhere", folder=str(find_running(runs_like(config), config.identity()) or ""))
            if job.read().is_done or not patient:
                yield False
                return
            job.update(state="waiting", place="waits for another process that runs the same configuration")
        finally:
            if lock is not None:
                lock.release(remove=True)
                remove_empty(path.parent, root)
        _wait_for(path, Path(job.read().folder))


def _wait_for(lock: Path, folder: Path) -> None:
    """Wait until no process runs a configuration: in a sweep, which holds its lock, or on its own in `folder`."""
    while is_locked(lock) or is_locked(folder / LOCK):
        time.sleep(_POLL_S)


def _take(path: Path) -> FileLock | None:
    while True:
        make_folders(path.parent)
        lock = FileLock.take(path)
        if lock is not None or path.exists():
            return lock


def _take_output(path: Path) -> None:
    """Send everything that this process prints, the system's last words on it too, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _end_with_parent() -> None:
    """End this process, as if interrupted, when the one that started it ends or when it is asked to."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _interrupt(*_: object) -> NoReturn:
    """Interrupt once: Slurm asks all processes of a task to end, and so does the supervisor."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
