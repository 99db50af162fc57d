"""Trackers that follow a run in addition to its own files, such as TensorBoard.

Chosen by `logger=`. Every module of this package is imported, so that a new file registers itself; a logger's
configuration is the frozen dataclass `Config` inside its class. Packages of trackers are imported only when one is
used. As configured by default nothing contacts a network: every tracker writes below the run's folder, and usage
reports of the packages themselves are switched off.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError, build, join
from cutlayer.runtime.ground.extras import install
from cutlayer.runtime.ground.registry import Registry, import_modules

if TYPE_CHECKING:
    from cutlayer.runtime.records.history import RoundRecord


@dataclass(frozen=True)
class LoggerConfig:
    """What every logger's configuration has: the name under which it is registered."""

    name: str


class Logger:
    """Base and contract of a logger. It sees every round, and must not change what the run computes.

    Args:
        config: the logger's own configuration.
        folder: the run's folder; the logger writes below it.
        resumed: whether the run continues an earlier one in this folder, whose records must be continued too.
    """

    Config: ClassVar[type[LoggerConfig]] = LoggerConfig
    packages: ClassVar[tuple[str, ...]] = ()
    """Top-level modules that must be importable."""

    def __init__(self, config: Any, folder: Path, resumed: bool) -> None:
        self.config = config
        self.folder = folder
        self.resumed = resumed

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin with the run's resolved configuration (plain containers)."""

    def log(self, record: RoundRecord) -> None:
        """Take one completed round. After a resume, rounds that were seen before may come again."""

    def finish(self) -> None:
        """The run is over or interrupted: write what is pending."""


LOGGERS: Registry[type[Logger]] = Registry("logger")
L = TypeVar("L", bound=type[Logger])


def register(name: str) -> Callable[[L], L]:
    """Make a logger available as `logger=<name>`."""

    def decorate(cls: L) -> L:
        LOGGERS.add(name, cls)
        return cls

    return decorate


def logger_config(values: Mapping[str, Any], where: str = "logger") -> LoggerConfig:
    """The typed configuration of one logger from a mapping that holds `name` and the logger's own keys.

    Raises:
        ConfigError: unknown name, unknown key or wrong value.
    """
    name = values.get("name", NO_VALUE)
    return build(LOGGERS.find(name, join(where, "name"), "a logger").Config, values, where)


def check_loggers(configs: Iterable[LoggerConfig]) -> None:
    """Raise ConfigError, naming the command that helps, when a chosen logger's package is not installed.

    Imports nothing and writes nothing, so that it can run before a run's folder is made.
    """
    for config in configs:
        for package in LOGGERS[config.name].packages:
            if importlib.util.find_spec(package) is None:
                advice = f"an installed tracker; {package} is missing: {install(config.name)}"
                raise ConfigError("logger", config.name, advice)


def build_loggers(configs: Sequence[LoggerConfig], folder: Path, resumed: bool = False) -> list[Logger]:
    """The loggers for `configs`, in order; see `check_loggers` for the error."""
    check_loggers(configs)
    return [LOGGERS[config.name](config, folder, resumed) for config in configs]


import_modules(__name__, __path__)
