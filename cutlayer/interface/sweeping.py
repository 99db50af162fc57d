"""Runs a sweep by `main.py -m` in a process of its own, and gives the results of its jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from cutlayer.interface.overrides import overrides_of
from cutlayer.interface.result import RunResult, own_result
from cutlayer.interface.running import hydra_kept
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.text import print_lines
from cutlayer.runtime.launching.hydra_support import load_config, preprocess
from cutlayer.runtime.launching.launch import importing
from cutlayer.runtime.launching.sweeps.display import distinct, shared_overrides
from cutlayer.runtime.launching.sweeps.sweep import Job, Sweep
from cutlayer.runtime.records.console import on_terminal
from cutlayer.runtime.run_folder import unique_name
from cutlayer.runtime.settings import RunConfig


def run_sweep(*overrides: str, **values: object) -> list[RunResult]:
    """Run one job for each combination of values, as ``python main.py -m <overrides>`` does, in processes of their own.

    ``cutlayer.sweep("algorithm=fed_avg,fsl_sage", "seed=0,1", rounds=20)`` are four jobs. What is finished already is
    not run again. Launchers, GPUs and the display are those of ``main.py``; docs/sweeps.md.

    Args:
        overrides: settings as on the command line, several values of a key separated by commas.
        values: settings by key, as Python values, one each.

    Returns:
        The results in the order of the jobs, of which the last key's values change first.

    Raises:
        ConfigError: a mistake in the configuration, or a job that failed; the others are finished.
        KeyboardInterrupt: the same call resumes what is unfinished.
    """
    given = overrides_of(overrides, values)
    with hydra_kept():
        first = _first(given)
    path = first.save_dir.absolute() / "multirun" / unique_name()
    _launch([*given, *overrides_of([], {"hydra.sweep.dir": path})], quiet=first.progress == "none")
    jobs = [job for job, _ in Sweep(path).jobs()]
    undone = [job for job in jobs if job.state not in ("finished", "skipped")]
    if undone or not jobs:
        raise ConfigError("sweep", NO_VALUE, f"{len(undone)} of {len(jobs)} jobs are not done; {_why(jobs, undone)}")
    with hydra_kept():
        return [own_result(Path(job.folder), load_config(job.overrides)) for job in jobs]


def _why(jobs: Sequence[Job], undone: Sequence[Job]) -> str:
    """What the first of them differs in from the other jobs, and what became of it."""
    if not undone:
        return "none began"
    shared = shared_overrides([job.overrides for job in jobs])
    return f"{distinct(undone[0], shared)}: {undone[0].error or undone[0].state}"


def _first(given: Sequence[str]) -> RunConfig:
    """The configuration of the first job, in which most mistakes show before anything is started."""
    try:
        parsed = OverridesParser.create().parse_overrides(preprocess(given))
    except Exception:
        return load_config(given)  # which says what is wrong
    ((first, *_),) = BasicSweeper.split_arguments(parsed, None)
    return load_config(first)


def _launch(given: Sequence[str], *, quiet: bool) -> None:
    """Run the sweep to its end, its output being this process's own or, in a notebook say, handed on line by line."""
    handed_on = quiet or not on_terminal()
    with subprocess.Popen(
        [sys.executable, "-m", "cutlayer.main", "-m", *given],
        env=importing(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if handed_on else None,
        stderr=subprocess.STDOUT if handed_on else None,
        start_new_session=handed_on,  # so that an interrupt reaches it once, from here
        text=True,
        errors="replace",
    ) as process:
        try:
            _hand_on(process, quiet=quiet)
        except KeyboardInterrupt:
            if handed_on:
                process.send_signal(signal.SIGINT)
            _hand_on(process, quiet=quiet)
            raise


def _hand_on(process: subprocess.Popen[str], *, quiet: bool) -> None:
    """Print what a process prints, if it goes through this one, until it ends."""
    for line in process.stdout or ():
        if not quiet:
            print_lines(line.rstrip("\n"))
    process.wait()
