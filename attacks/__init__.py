"""The registry of attacks: what somebody can find out from what a finished run's clients send, `attack=<name>`.

Every module of this package is imported, so that a new file registers itself.
"""

from __future__ import annotations

if __name__ != "cutlayer.attacks":
    from cutlayer.names import refuse

    refuse(__name__)

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlayer.runtime.ground.registry import Registry, import_modules
from cutlayer.runtime.rounds.federation import Federation

Reported = Callable[[int, int, str], None]
"""Told how many epochs are done, of how many, and a figure of the last one in words."""


class AttackResult:
    """What an attack found; a base that each attack fills."""

    def to_json(self) -> dict[str, Any]:
        """Figures for ``summary.json``, by name."""
        raise NotImplementedError

    def table(self) -> str:
        """The figures for the terminal, as lines."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write what there is beside ``summary.json``, such as pictures."""


Find = Callable[[Federation, Any, Reported], AttackResult]
"""Attacks the clients of a federation, and leaves it as it was.

The same federation and keys give the same bits again on the same device. A `ConfigError` says what cannot be attacked.
"""


@dataclass(frozen=True)
class Attack:
    """What the registry knows of an attack.

    find: the function. config: frozen dataclass of its keys, which are ``attack.<key>`` on the command line and name
    the folder of what was found. knows: what the attacker knows, in a few words.
    """

    find: Find
    config: type[Any]
    knows: str


ATTACKS: Registry[Attack] = Registry("attack")


def register(name: str, config: type[Any], knows: str) -> Callable[[Find], Find]:
    """Register the decorated function as attack `name`; the arguments are those of `Attack`."""

    def add(find: Find) -> Find:
        ATTACKS.add(name, Attack(find, config, knows))
        return find

    return add


import_modules(__name__, __path__)
