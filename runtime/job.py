"""One run from its configuration to its end: the folder it gets, and the log in it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
from collections.abc import Generator, Iterable
from pathlib import Path

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.extras import install
from cutlayer.runtime.ground.files import open_to_append
from cutlayer.runtime.ground.reading import check_links
from cutlayer.runtime.ground.text import error_text, plain_logs
from cutlayer.runtime.records.loggers import check_loggers
from cutlayer.runtime.records.run_folder import RunFolder, find_unfinished, run_path, unique_name, what_differs
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.transport import GrpcTransport


def check(config: RunConfig) -> None:
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
    unfinished = find_unfinished(above, config.identity()) if config.resume == "auto" else None
    differs = what_differs(config.lr, config.seed, overrides)
    return unfinished or run_path(above, (differs,), unique_name())


@contextlib.contextmanager
def claim(config: RunConfig, overrides: Iterable[str]) -> Generator[RunFolder]:
    """Own the run's folder, and log to `run.log` in it, for the length of the block."""
    identity = config.identity()
    save_dir = config.save_dir.absolute()
    claimed = config.resume in ("auto", "never")
    path = choose_folder(config, overrides) if claimed else Path(config.resume).absolute()
    if path.is_dir():  # what is to be continued may be from anyone, and is written to
        check_links(path)
    if claimed:
        folder = RunFolder.claim(path, identity, save_dir=save_dir)
    else:
        folder = RunFolder.continue_at(path, identity, save_dir=save_dir)
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
