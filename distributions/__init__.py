"""The registry of distributions: ways to give training samples to clients, `dataset.distribution=<name>`.

Every module of this package is imported, so that a new file registers itself. Nothing here needs torch: what draws
figures of runs reads the registry too.
"""

from __future__ import annotations

if __name__ != "cutlayer.distributions":
    from cutlayer.names import refuse

    refuse(__name__)

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from cutlayer.runtime.ground.config import NoOptions, build
from cutlayer.runtime.ground.registry import Registry, import_modules

OPTIONS = "distribution_options"
"""The key below `dataset` that holds a distribution's own options."""


class Keys(Protocol):
    """The keys below `dataset` that distributions share, as their configuration has them."""

    @property
    def distribution(self) -> str: ...
    @property
    def distribution_options(self) -> Mapping[str, Any]: ...
    @property
    def alpha(self) -> float: ...
    @property
    def classes_per_client(self) -> int: ...
    @property
    def major_share(self) -> float: ...
    @property
    def min_samples(self) -> int: ...
    @property
    def client_samples(self) -> int | None: ...
    @property
    def drop_unassigned(self) -> bool: ...


@dataclass(frozen=True)
class Request:
    """What a distribution works from: labels int64 [n], groups int64 [n] or None."""

    labels: np.ndarray
    clients: int
    config: Keys
    rng: np.random.Generator
    groups: np.ndarray | None

    @property
    def prior(self) -> np.ndarray:
        """Samples of each class, int64 [classes]."""
        return np.bincount(self.labels)

    @property
    def options(self) -> Any:
        """The distribution's own options, of the class that it is registered with."""
        return check_options(self.config.distribution, self.config.distribution_options)


Divide = Callable[[Request], np.ndarray]
"""Gives the owner of each sample, int64 [n], -1 for one that is left out."""


@dataclass(frozen=True)
class Distribution:
    """What the registry knows of a distribution.

    Attributes:
        name: as in the configuration.
        divide: gives samples to clients; None where each client has data of its own and nothing is divided.
        label: its name in figures.
        shape: keys below `dataset` that say how far it is from an even spread. Figures name them with their values, and
            runs that differ in one are compared over it.
        reads: further keys below `dataset` that it reads.
        options: frozen dataclass of its own options, each of which is part of its shape.
        by_group: whether clients are groups of the data, and are tested on the test samples of these groups.
        even: whether all clients have the same mixture of classes, to which the others tend at the end of their scale.
    """

    name: str
    divide: Divide | None
    label: str
    shape: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    options: type[Any] = NoOptions
    by_group: bool = False
    even: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key below `dataset` that it reads; a key of its own options as `distribution_options.<key>`."""
        return (*self.shaping, *self.reads)

    @property
    def shaping(self) -> dict[str, str]:
        """The keys below `dataset` that shape it, with their names for people, e.g. "α"."""
        own = {f"{OPTIONS}.{field.name}": field.name for field in fields(self.options)}
        return {key: _words(name) for key, name in ({key: key for key in self.shape} | own).items()}


DISTRIBUTIONS: Registry[Distribution] = Registry("distribution")
# Keys of mathematics are shown as their letters.
_LETTERS = {"alpha": "\N{GREEK SMALL LETTER ALPHA}", "beta": "\N{GREEK SMALL LETTER BETA}"}


def register(
    name: str,
    label: str = "",
    *,
    shape: tuple[str, ...] = (),
    reads: tuple[str, ...] = (),
    options: type[Any] = NoOptions,
    by_group: bool = False,
    even: bool = False,
) -> Callable[[Divide], Divide]:
    """Register the decorated function as distribution `name`; the arguments are those of `Distribution`.

    The function has to end in a number of steps known in advance: a condition that cannot be met is a `ConfigError`
    that says why, never another try. Its randomness comes from `request.rng` alone.
    """

    def add(divide: Divide) -> Divide:
        DISTRIBUTIONS.add(name, Distribution(name, divide, label or name, shape, reads, options, by_group, even))
        return divide

    return add


def names() -> tuple[str, ...]:
    """The registered names, sorted."""
    return DISTRIBUTIONS.names()


def get(name: str) -> Distribution:
    """The distribution of that name; ConfigError if there is none."""
    return DISTRIBUTIONS.find(name, "distribution")


def check_options(name: str, options: Mapping[str, Any]) -> Any:
    """The own options of a distribution as their dataclass; ConfigError for an unknown name, key or value."""
    return build(get(name).options, options, OPTIONS)


def _words(key: str) -> str:
    return _LETTERS.get(key, key.replace("_", " "))


import_modules(__name__, __path__)
# Each client trains on all that lies on its own machine; with transport=grpc only.
DISTRIBUTIONS.add("own", Distribution("own", None, "own"))
