"""Hydra composes thousands of configurations in these tests: what it reads and parses again and again, it remembers.

Only of the project's own `hydra_config`, which no test changes. `tests/test_composing.py` compares with Hydra itself.
"""

import copy
import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import omegaconf._utils
import omegaconf.base
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from cutlayer.runtime.launching.hydra_errors import CONFIG_DIR

OWN = str(CONFIG_DIR)


class Known:
    """What was made before for a key, as bytes, so that each caller has a copy of its own.

    Attributes:
        folder: where test processes that run side by side share it, if there are any.
    """

    folder: Path | None = None

    def __init__(self, name: str) -> None:
        self._name, self._here = name, dict[str, bytes]()

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """What is known for the key, or else what `make` gives; None is not kept."""
        if key not in self._here:
            file = self.folder and self.folder / hashlib.sha256(f"{self._name} {key}".encode()).hexdigest()
            if file is None or not file.is_file():
                found = make()
                if found is None:
                    return None
                self._here[key] = pickle.dumps(found)
                if file is not None:
                    mine = file.with_suffix(f".{os.getpid()}")
                    mine.write_bytes(self._here[key])
                    mine.replace(file)
            else:
                self._here[key] = file.read_bytes()
        return pickle.loads(self._here[key])


def quick_composition() -> Callable[[], None]:
    """From now on Hydra remembers, until what this gives is called."""
    undo: list[tuple[Any, str, Any]] = []
    for owner, name, change in (
        (config_loader_impl, "create_defaults_list", _defaults),
        (ConfigLoaderImpl, "_compose_config_from_defaults_list", _composed),
        (ConfigRepository, "load_config", _loaded),
        (OverridesParser, "parse_rule", _parsed),
        (omegaconf.base, "parse", lru_cache(10_000)),  # gives trees that nobody changes
        (omegaconf._utils, "parse", lru_cache(10_000)),
    ):
        before = getattr(owner, name)
        undo.append((owner, name, before))
        setattr(owner, name, change(before))
    return lambda: [setattr(*each) for each in undo].clear()


def _is_own(repo: Any) -> bool:
    """Whether all files of a repository of Hydra's are those of the project."""
    return all(source.path == OWN for source in repo.get_sources() if source.scheme() == "file")


def _defaults(create: Callable[..., DefaultsList]) -> Callable[..., DefaultsList]:
    known = Known("defaults")

    def made(repo: Any, config_name: str, overrides_list: Sequence[Override], **more: bool) -> DefaultsList:
        def make() -> DefaultsList:
            return create(repo=repo, config_name=config_name, overrides_list=overrides_list, **more)

        if not _is_own(repo):
            return make()
        given = Overrides(repo=repo, overrides_list=[*overrides_list])
        groups = (given.override_choices, given.append_group_defaults, given.deletions)
        found = known.get(repr((config_name, more, groups)), make)
        found.config_overrides = given.config_overrides
        return found

    return made


def _composed(compose: Callable[..., Any]) -> Callable[..., Any]:
    known = Known("composed")

    def made(self: Any, defaults: Sequence[object], repo: Any) -> Any:
        if not _is_own(repo):
            return compose(self, defaults, repo)
        return known.get(repr(defaults), lambda: compose(self, defaults, repo))

    return made


def _loaded(load: Callable[..., Any]) -> Callable[..., Any]:
    known = Known("loaded")

    def made(self: Any, config_path: str) -> Any:
        if not _is_own(self):
            return load(self, config_path)
        return known.get(config_path, lambda: load(self, config_path))

    return made


def _parsed(parse: Callable[..., Any]) -> Callable[..., Any]:
    @cache
    def of(text: str, rule: str) -> Any:
        return parse(OverridesParser.create(), text, rule)

    def made(self: Any, s: str, rule_name: str) -> Any:
        return copy.deepcopy(of(s, rule_name))

    return made
