"""Registries: things of one kind by name, each registered by the module that it is in when that is imported."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

from cutlayer.runtime.ground.config import ConfigError

T = TypeVar("T")


class Registry(dict[str, T]):
    """Entries by name, in the order in which they were registered."""

    def __init__(self, kind: str) -> None:
        """`kind` is what the entries are, in the singular and in plain words, e.g. "algorithm"."""
        super().__init__()
        self.kind = kind

    def add(self, name: str, entry: T) -> None:
        """Register an entry.

        Raises:
            ValueError: the name is another entry's.
        """
        if name in self:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self[name] = entry

    def find(self, name: object, key: str, expected: str = "") -> T:
        """The entry of that name.

        Args:
            key: of the configuration that says the name. expected: what it is to be, for the message.

        Raises:
            ConfigError: there is none; with the names that there are.
        """
        if not isinstance(name, str) or name not in self:
            raise ConfigError(key, name, expected or f"a registered {self.kind}", self.names())
        return self[name]

    def names(self) -> tuple[str, ...]:
        """The registered names, sorted."""
        return tuple(sorted(self))


def import_modules(package: str, path: Iterable[str]) -> None:
    """Import every module of a package but its program, so that a new file registers itself.

    Args:
        package: its `__name__`. path: its `__path__`.
    """
    for module in pkgutil.iter_modules(path):
        if module.name != "__main__":
            importlib.import_module(f"{package}.{module.name}")
