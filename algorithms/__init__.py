"""The registry of algorithms. Every module of this package is imported, so that a new file registers itself."""

from __future__ import annotations

if __name__ != "cutlayer.algorithms":
    from cutlayer.names import refuse

    refuse(__name__)

from collections.abc import Callable, Mapping
from typing import Any

from cutlayer.algorithms.base import Algorithm
from cutlayer.runtime.ground.config import build
from cutlayer.runtime.ground.registry import Registry, import_modules

ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm")


def register(name: str) -> Callable[[type[Algorithm]], type[Algorithm]]:
    """Class decorator: makes an algorithm available as ``algorithm=<name>``."""

    def add(algorithm: type[Algorithm]) -> type[Algorithm]:
        ALGORITHMS.add(name, algorithm)
        algorithm.name = name
        return algorithm

    return add


def names() -> tuple[str, ...]:
    """The registered names, in alphabetical order."""
    return ALGORITHMS.names()


def get(name: str) -> type[Algorithm]:
    """The algorithm of that name.

    Raises:
        ConfigError: there is none.
    """
    return ALGORITHMS.find(name, "algorithm")


def algorithm_config(name: str, values: Mapping[str, Any]) -> Any:
    """The algorithm's own typed configuration.

    Raises:
        ConfigError: unknown algorithm, unknown key or bad value.
    """
    return build(get(name).Config, values, "algorithm")


import_modules(__name__, __path__)
