"""The registry of algorithms. Every module of this package is imported, so that a new file registers itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from cutlayer.algorithms.base import Algorithm
from cutlayer.runtime.ground.config import ConfigError, build

ALGORITHMS: dict[str, type[Algorithm]] = {}


def register(name: str) -> Callable[[type[Algorithm]], type[Algorithm]]:
    """Class decorator: makes an algorithm available as ``algorithm=<name>``."""

    def add(algorithm: type[Algorithm]) -> type[Algorithm]:
        assert name not in ALGORITHMS, f"two algorithms are called {name}"
        algorithm.name = name
        ALGORITHMS[name] = algorithm
        return algorithm

    return add


def names() -> tuple[str, ...]:
    """The registered names, in alphabetical order."""
    return tuple(sorted(ALGORITHMS))


def get(name: str) -> type[Algorithm]:
    """The algorithm of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ALGORITHMS:
        raise ConfigError("algorithm", name, "a registered algorithm", names())
    return ALGORITHMS[name]


def algorithm_config(name: str, values: Mapping[str, Any]) -> Any:
    """The algorithm's own typed configuration.

    Raises:
        ConfigError: unknown algorithm, unknown key or bad value.
    """
    return build(get(name).Config, values, "algorithm")


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
