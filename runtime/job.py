"""One run from its configuration to its end: the folder it gets, and the log in it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
from collections.abc import Generator, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from cutlayer.datasets.facts import read_facts
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.extras import install
from cutlayer.runtime.ground.files import open_to_append
from cutlayer.runtime.ground.reading import check_links, read_yaml
from cutlayer.runtime.ground.text import error_text, plain_logs
from cutlayer.runtime.records.data_record import DATA, check_data
from cutlayer.runtime.records.loggers import check_loggers
from cutlayer.runtime.run_folder import (
    Fits,
    RunFolder,
    find_finished,
    find_unfinished,
    run_path,
    unique_name,
    what_differs,
)
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.transport import GrpcTransport

log = logging.getLogger(__name__)


def check_machine(config: RunConfig) -> None:
    """Raise ConfigError for what this machine lacks: a device, or the package of a logger or of the transport."""
    config.torch_device()
    if isinstance(config.transport, GrpcTransport) and importlib.util.find_spec("grpc") is None:
        raise ConfigError("transport", "grpc", f"the packages of the extra: {install('grpc')}")
    check_loggers(config.logger)


def runs_like(config: RunConfig) -> Path:
    """The folder below which all runs of this configuration lie, however their command lines spelled it."""
    data = f"{config.dataset.name}-{config.dataset.distribution}"
    return run_path(config.save_dir, (config.algorithm_name, config.model.name, data), "")


def choose_folder(config: RunConfig, overrides: Iterable[str]) -> Path:
    """An unfinished run of this configuration, if `resume` allows, or else a new folder; makes nothing."""
    above = runs_like(config)
    unfinished = find_unfinished(above, config.identity(), has_data_of(config)) if config.resume == "auto" else None
    deciding = [each for each in overrides if _names(each, config)]
    return unfinished or run_path(above, (what_differs(config.lr, config.seed, deciding),), unique_name())


def _names(override: str, config: RunConfig) -> bool:
    """Whether an override says something of the result; those of Hydra's own do not."""
    key = override.lstrip("+~").partition("=")[0]
    return not key.startswith(("hydra.", "hydra/")) and config.decides(key)


def has_data_of(config: RunConfig) -> Fits:
    """Tells whether a run's folder is of a run on this configuration's data, wherever those have been moved.

    Data in the same place that have changed are still the run's: it says so when it is continued.
    """

    facts = cache(lambda: read_facts(config.dataset, config.seed))

    def fits(folder: Path) -> bool:
        try:
            recorded = cast(Mapping[str, Any], read_yaml(folder, "config.yaml").get("dataset") or {})
        except (OSError, ValueError):
            return True  # nothing was computed there
        if Path(str(recorded.get("root"))) == config.dataset.root:
            return True
        try:
            check_data(folder, facts, "refuse")
        except ConfigError:
            return False
        return (folder / DATA).is_file()

    return fits


def finished_like(config: RunConfig) -> Path | None:
    """The newest finished run of this configuration and data, None where there is none.

    Raises:
        ConfigError: the data have changed since; a machine without them cannot tell.
    """
    finished = find_finished(runs_like(config), config.identity(), has_data_of(config))
    if finished is None or not (finished / DATA).is_file():
        return finished
    try:
        now = read_facts(config.dataset, config.seed)
    except ConfigError as error:
        log.warning("it is not known whether the data have changed: %s", error)
        return finished
    check_data(finished, lambda: now, config.data_changed)
    return finished


@contextlib.contextmanager
def claim(config: RunConfig, overrides: Iterable[str]) -> Generator[RunFolder]:
    """Own the run's folder, and log to `run.log` in it, for the length of the block."""
    identity = config.identity()
    claimed = config.resume in ("auto", "never")
    path = choose_folder(config, overrides) if claimed else Path(config.resume).absolute()
    if path.is_dir():  # what is to be continued may be from anyone, and is written to
        check_links(path)
    if claimed:
        folder = RunFolder.claim(path, identity, save_dir=config.save_dir)
    else:
        folder = RunFolder.continue_at(path, identity)
    with folder, _log_to(folder.path / "run.log"):
        yield folder


@contextlib.contextmanager
def _log_to(path: Path) -> Generator[None]:
    stream = io.TextIOWrapper(open_to_append(path), encoding="utf-8", write_through=True)
    handler = _Handler(stream)
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
    plain_logs()
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except Exception as error:
        if not isinstance(error, ConfigError):
            with contextlib.suppress(OSError):
                stream.write(error_text(error).replace("\n", "\n  ") + "\n")
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
        with contextlib.suppress(OSError):
            stream.close()


class _Handler(logging.StreamHandler[io.TextIOWrapper]):
    """A full disk ends the run by what it cannot write there, and not by a line of the log."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)
