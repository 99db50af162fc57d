"""The program from the command line to the exit status: a run, or a sweep with its display and its last table."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import site
import sys
from collections.abc import Callable, Generator, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import cutlayer
from cutlayer.runtime.ground.folders import remove_empty
from cutlayer.runtime.ground.importing import quick_imports
from cutlayer.runtime.ground.memory import memory_told
from cutlayer.runtime.ground.streams import stand_without_streams
from cutlayer.runtime.ground.text import error_text, print_errors
from cutlayer.runtime.launching.hydra_errors import check_flags, explain
from cutlayer.runtime.launching.hydra_support import load_config, plain_values, preprocess, run_config
from cutlayer.runtime.launching.sweeps.display import Display, show_table
from cutlayer.runtime.launching.sweeps.supervise import LAUNCHER, TRACEBACKS, supervise
from cutlayer.runtime.launching.sweeps.sweep import BAD, JOB_OUTPUT, PATIENT, Sweep
from cutlayer.runtime.records.console import stamp_lines

_FULL_ERROR = "HYDRA_FULL_ERROR"
_ROOT = Path(cutlayer.__path__[0]).parent  # from which a process of its own imports the package
# What is shown instead of running: where the model can be cut, and what a step costs a client.
_CUTS, _ALL_CUTS, _COSTS = "--cuts", "--cuts=all", "--costs"
# A sweep whose workers are killed again and again without a job ending in between is given up.
_TRIES = 3

_watched: list[tuple[Sweep, Display]] = []


class Watch(Callback):
    """Hydra calls it, by `hydra.callbacks` in config.yaml, when a sweep begins: its jobs are listed and watched."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        sweep = Sweep(Path(str(config.hydra.sweep.dir)), _jobs(config))
        if _watched:  # launched again, for the jobs that are left
            return
        display = Display(sweep, str(config.progress))
        _watched.append((sweep, display))
        display.start()


def _jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of every job of the sweep, in order; none where a sweeper decides them as it goes."""
    if not str(config.hydra.sweeper._target_).endswith(f".{BasicSweeper.__name__}"):
        return []
    params = cast(dict[str, Any], OmegaConf.to_container(config.hydra.sweeper.params or OmegaConf.create({})))
    given = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(given), None)
    return jobs


def start(composed: DictConfig) -> float | None:
    """What Hydra's main function does with one composed configuration: a run, or one job of a sweep.

    Gives the final accuracy of a job, None where there is none.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return supervise(composed, plain_values)
    overrides = [str(override) for override in HydraConfig.get().overrides.task]
    where = ""
    # Nothing but SystemExit leaves: Hydra would add lines of its own to an error.
    try:
        with quick_imports():
            config = run_config(composed)
        if config.role is not None:
            stamp_lines()
        if config.role == "client":
            _work(config, overrides)
            return None
        with quick_imports():
            from cutlayer.runtime.experiment import run  # late, so that --help and mistakes do not wait for it
            from cutlayer.runtime.job import check_machine, claim

        check_machine(config)
        with claim(config, overrides) as folder:
            where = f": {os.path.relpath(folder.path)}"
            run(config, folder)
    except KeyboardInterrupt:
        print_errors(f"interrupted; the same command resumes from the last checkpoint (resume=auto){where}")
        sys.exit(130)
    except Exception as error:
        line = explain(error, overrides)
        if line is None or os.environ[TRACEBACKS] == "1":
            print_errors(*error_text(error).split("\n"))
        else:
            print_errors(line)
        sys.exit(1)
    return None


def _work(config: Any, overrides: list[str]) -> None:
    """Be a client of a run over the network."""
    with quick_imports():
        from cutlayer.runtime.job import check_machine  # late, as above
    check_machine(config)
    with quick_imports():
        from cutlayer.runtime.network.client.program import work

    work(config, overrides)


def _show(what: str, overrides: list[str]) -> None:
    with quick_imports():
        config = load_config(overrides)
        from cutlayer.runtime.costs.cuts import show_cuts
        from cutlayer.runtime.costs.metering import show_costs  # late, so that --help and mistakes do not wait for it

    with memory_told():
        if what == _COSTS:
            show_costs(config)
        else:
            show_cuts(config, every=what == _ALL_CUTS)


def importing(environment: Mapping[str, str]) -> dict[str, str]:
    """The same environment, by which a process of its own imports this package from wherever it lies."""
    if str(_ROOT) in (*site.getsitepackages(), site.getusersitepackages()):  # which hide what Python comes with
        return {**environment}
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), environment.get("PYTHONPATH")]))}


def launch(main: Callable[[], Any]) -> None:
    """Call a Hydra main function with this process's command line, and leave with its exit status.

    0: all well. 1: a mistake in the configuration, reported in one line, or a failed job. 130: interrupted.
    HYDRA_FULL_ERROR=1 shows tracebacks instead of lines.
    """
    stand_without_streams()
    # Hydra prints errors in its own way unless this is set; jobs in other processes learn from the second one.
    os.environ[TRACEBACKS] = os.environ.get(_FULL_ERROR, "0")
    os.environ[_FULL_ERROR] = "1"
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.update(importing(os.environ))
    given = [*sys.argv[1:]]
    try:
        for what in (_CUTS, _ALL_CUTS, _COSTS):
            if what in given:
                _show(what, [text for text in given if text != what])
                return
        check_flags(given, [name for name in get_args_parser()._option_string_actions if name[1] == "-"])
        sys.argv[1:] = preprocess(given)
        with _ends_as_interrupted():
            _until_done(main)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # an impatient second one: the rest takes seconds
            signal.signal(number, signal.SIG_IGN)
        if not _watched:
            print_errors("interrupted; the same command resumes what is unfinished (resume=auto)")
        else:
            _close(f"the same command resumes: {shlex.join(sys.orig_argv)}")
        sys.exit(130)
    except Exception as error:
        line = None if os.environ[TRACEBACKS] == "1" else explain(error, sys.argv[1:])
        _give_up()
        if line is None:
            raise
        print_errors(line)
        sys.exit(1)
    if _watched:
        sys.exit(0 if _close() else 1)


def _until_done(main: Callable[[], Any]) -> None:
    """Launch, and again while jobs of the sweep are left: those that another sweep ran, or a dead worker held."""
    left, tries = 0, 0
    while tries < _TRIES:
        with contextlib.suppress(BrokenProcessPool):  # a worker was killed, and joblib has stopped all the others
            main()
        if not _watched:
            return
        sweep, _ = _watched[0]
        before, left = left, sum(not job.is_done for job, _ in sweep.jobs())
        if not left:
            return
        tries = tries + 1 if left == before else 0
        (sweep.path / PATIENT).touch()


@contextlib.contextmanager
def _ends_as_interrupted() -> Generator[None]:
    """Let the signals of a closing terminal, or of a scheduler, end this process as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:  # nohup ignores SIGHUP, and so it stays
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _close(how_to_go_on: str = "") -> bool:
    """End the display, show the table of all jobs and write it to the sweep's folder; whether all went well."""
    sweep, display = _watched[0]
    display.stop()
    if how_to_go_on:
        display.wait_for_processes()
    jobs = sweep.jobs()
    failed = sum(job.state in BAD for job, _ in jobs)
    empty = failed == len(jobs) and not any(path.stat().st_size for path in sweep.path.glob(f"jobs/*/{JOB_OUTPUT}"))
    show_table(jobs, None if empty else sweep.path, how_to_go_on)
    if empty:
        _drop(sweep)
    else:
        try:
            sweep.write_table()
        except OSError as error:  # a full disk: what the sweep did is shown all the same
            print_errors(f"{sweep.path}: cannot be written: {error.strerror}")
    undone = sum(not job.is_done for job, _ in jobs)
    if undone and not how_to_go_on:
        print_errors(f"{undone} of {len(jobs)} jobs are not done; the same command resumes them")
    return not failed and not undone


def _give_up() -> None:
    """End a sweep whose launcher has failed: with its table, or leaving nothing if no job had begun."""
    for sweep, display in _watched:
        if (sweep.path / "jobs").exists():
            _close()
        else:
            display.stop()
            _drop(sweep)


def _drop(sweep: Sweep) -> None:
    shutil.rmtree(sweep.path, ignore_errors=True)
    remove_empty(sweep.path, sweep.root)
