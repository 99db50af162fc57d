"""What server and client have to agree on before they work together: the version, the configuration and the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from cutlayer import HOME
from cutlayer.datasets import Dataset
from cutlayer.models.pretrained import base_hash
from cutlayer.runtime.ground.config import ConfigError, show
from cutlayer.runtime.keys import keys_of, pruned, scope_of
from cutlayer.runtime.messages.bounds import shown
from cutlayer.runtime.settings import RunConfig, setting_in
from cutlayer.runtime.trust import check, check_made, covered

PROTOCOL = 1
_PACKAGES = ("algorithms", "datasets", "distributions", "evaluations", "models", "runtime", "tasks")

# Sections whose choice sets many keys; on a client's command line only the name is compared.
_GROUPS = ("algorithm", "model", "dataset", "optimizer", "scheduler")
# Of the facts of a data set those that hold for one that each client has its own of.
_OF_ALL = ("name", "shape", "classes", "class_names", "tokenizer")


@cache
def version() -> str:
    """A hash of the source of what decides a result: 12 hexadecimal digits, equal on every system."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((HOME / package).rglob("*.py")):
            digest.update(path.relative_to(HOME).as_posix().encode() + b"\0")
            digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:12]


def shared(config: RunConfig) -> dict[str, Any]:
    """The part of a configuration that is the same at the server and at every client: what decides the result."""
    return _of_scope(config.to_mapping(), result=True)


def fingerprint(mapping: Mapping[str, Any]) -> str:
    """A hash of what a run reads of what ``shared`` gave."""
    return hashlib.sha256(json.dumps(setting_in(mapping), sort_keys=True).encode()).hexdigest()[:16]


def _of_scope(mapping: Mapping[str, Any], *, result: bool) -> dict[str, Any]:
    """Of a configuration the keys that decide the result, or the others."""
    other = {key for key, each in keys_of(RunConfig, mapping).items() if each.scope != "result"}
    return pruned(mapping, lambda key: (key not in other) == result)


def client_config(own: RunConfig, theirs: Mapping[str, Any], overrides: Iterable[str]) -> RunConfig:
    """The configuration that a client works with: the server's, and of its own what each machine says for itself.

    Args:
        own: as composed from the client's command line. theirs: what the server sent.
        overrides: the client's command line, e.g. "dataset=mnist"; what it names has to be as at the server.

    Raises:
        ConfigError: a value of the command line differs from the server's, or the server sets what it may not and the
            command line does not name. Nothing has been imported, opened or made then.
    """
    given = [override.lstrip("+").partition("=")[0] for override in overrides]
    mine = own.to_mapping()
    for key in given:
        if scope_of(RunConfig, key) != "result":
            continue
        here, there = (_named(values, key) for values in (mine, theirs))
        if here != there:
            raise ConfigError(key, here, f"{_shown(there)}, as at the server")
    names = {f"{key}.name" if key in _GROUPS else key for key in given}

    def named(key: str, _: object) -> bool:
        return covered(names, key)  # and by now it is as at the server

    check(theirs, named, "the server")
    mapping = cast(dict[str, Any], json.loads(json.dumps(theirs)))
    _merge(mapping, _of_scope(mine, result=False))
    config = RunConfig.from_mapping(mapping)
    check_made(config, named, "the server")
    return config


def _merge(mapping: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Put the keys of ``own`` into ``mapping``."""
    for name, value in own.items():
        if isinstance(value, Mapping) and value:
            if not isinstance(mapping.get(name), dict):
                mapping[name] = {}
            _merge(mapping[name], cast(Mapping[str, Any], value))
        else:
            mapping[name] = value


def _named(values: Mapping[str, Any], key: str) -> Any:
    """What a dotted key, or the choice of a group, comes to; None where there is nothing."""
    found: Any = values
    for part in key.split("."):
        found = cast(Mapping[str, Any], found).get(part) if isinstance(found, Mapping) else None
    if key in _GROUPS and isinstance(found, Mapping):
        return cast(Mapping[str, Any], found).get("name")
    return found


def _shown(value: object) -> str:
    """A server's value in an error's line."""
    try:
        return show(value)
    except RecursionError:
        return shown(value)


def data_facts(dataset: Dataset, *, divided: bool, base: Path | None = None) -> dict[str, Any]:
    """What is reported about a data set, so that both parties know that theirs go together.

    What is frozen of a language model does not travel either, so it is reported too.

    Args:
        base: the folder of its trained weights.
        divided: all have the whole set, so that its labels have to be equal; else each has its own, and only what an
            image is, or which tokens there are, and what the classes are.
    """
    known = {**dataset.facts, "shape": list(dataset.info.shape)}
    split = ("training", "test") if divided else ()
    found = {key: known[key] for key in known if key in _OF_ALL or key.startswith(split)}
    return found if base is None else {**found, "base weights": base_hash(base)}


def compare_data(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """How a client's data differ from the server's, in words; None where they go together."""
    for key, value in here.items():
        if there.get(key) != value:
            hint = ""
            if key.startswith(("training", "test")):
                hint = "; dataset.distribution=own at the server if each client has data of its own"
            elif key.startswith("class"):
                hint = "; for image folders dataset.options.classes=[...] at the server names all of them"
            return f"the client's data have {key} {peer_text(there.get(key))}, the server's {show(value)}{hint}"
    return None


def peer_text(value: object) -> str:
    """What a peer says, for an error's line: spelled as on the command line where that is one short line."""
    text = show(value) if value is None or isinstance(value, str | int | float) else ""
    return text if text and text.isprintable() else shown(value)
