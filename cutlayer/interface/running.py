"""Runs an experiment within this process, and leaves the process as it was."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Generator
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase

from cutlayer.interface.overrides import check_single, overrides_of
from cutlayer.interface.result import RunResult, own_result
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError
from cutlayer.runtime.ground.process import settings_kept
from cutlayer.runtime.job import check_machine, claim, finished_like
from cutlayer.runtime.launching.hydra_errors import explain
from cutlayer.runtime.launching.hydra_support import load_config, preprocess
from cutlayer.runtime.launching.sweeps.job_process import unmeasured
from cutlayer.runtime.settings import RunConfig


def run_here(*overrides: str, **values: object) -> RunResult:
    """Run an experiment, as ``python main.py <overrides>`` does, and give its result.

    ``cutlayer.run("algorithm=fsl_sage", "dataset=digits", rounds=20, **{"model.cut": "conv1"})``. An unfinished run of
    the same configuration below ``save_dir`` is resumed, and the result of a finished one is given at once, unless
    ``resume="never"`` asks for another. Bits are those of ``main.py``. ``progress="none"`` prints nothing.

    Args:
        overrides: settings as on the command line, one text each.
        values: settings by key, as Python values.

    Raises:
        ConfigError: a mistake in the configuration, in one line. KeyboardInterrupt: the same call resumes the run.
    """
    given = overrides_of(overrides, values)
    check_single(preprocess(given))
    with hydra_kept():
        config = load_config(given)
    if config.role is not None:
        raise ConfigError("role", config.role, "null; a party of a run over the network is a process, main.py")
    with settings_kept(), _logging_kept(quiet=config.progress == "none"), _told(given):
        check_machine(config)
        folder = finished_like(config) if config.resume == "auto" else None
        if folder is None:
            folder = _run(config, given)
        else:
            for measure in unmeasured(folder, config):
                measure()
    return own_result(folder, config)


def _run(config: RunConfig, given: list[str]) -> Path:
    with claim(config, given) as folder:
        run(config, folder)
    return folder.path


@contextlib.contextmanager
def hydra_kept() -> Generator[None]:
    """Let Hydra compose anew in the block, also in a program that is itself one of Hydra's, which stays as it is."""
    hydra, base = GlobalHydra.instance().hydra, VersionBase.instance().getbase()
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = hydra
        VersionBase.instance().version_base = base


@contextlib.contextmanager
def _told(given: list[str]) -> Generator[None]:
    """Say what main.py says in one line, a full disk or a folder that cannot be written, as a ConfigError.

    Raises:
        ConfigError: it happened.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        line = explain(error, given)
        if line is None:
            raise
        key, _, expected = line.partition(": ")
        raise ConfigError(key, NO_VALUE, expected) from error


@contextlib.contextmanager
def _logging_kept(*, quiet: bool) -> Generator[None]:
    """Log this package's progress for the length of the block; handlers that are there see what they saw before.

    Args:
        quiet: print warnings only. The log in the run's folder has everything in any case.
    """
    own, root, factory = logging.getLogger("cutlayer"), logging.getLogger(), logging.getLogRecordFactory()
    level, shown = own.level, own.getEffectiveLevel()
    there = [*own.handlers, *(root.handlers if own.propagate else [])]

    def as_before(record: logging.LogRecord) -> bool:
        return record.levelno >= shown or record.name.partition(".")[0] != own.name

    def unseen(record: logging.LogRecord) -> bool:
        return not there or record.levelno < shown

    handler = logging.StreamHandler(sys.stdout)
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    handler.addFilter(unseen)
    for each in there:
        each.addFilter(as_before)
    own.addHandler(handler)
    own.setLevel(min(shown, logging.INFO))
    try:
        yield
    finally:
        own.removeHandler(handler)
        own.setLevel(level)
        for each in there:
            each.removeFilter(as_before)
        logging.setLogRecordFactory(factory)
