"""Every key of a configuration with its scope, and whether a run reads it: what makes one run another.

Scopes are said on the fields of the dataclasses (`ground.config.scoped`). From here follow a run's identity and its
folder's name, what server and client have to agree on, what may change when a finished run is measured, and which keys
figures name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from cutlayer.algorithms import ALGORITHMS
from cutlayer.runtime.ground.config import Scope, Use, join, plain

_DIGITS = 20
_DEPTH = 8
# Sections whose mapping is not that of their dataclass: a class of torch with its arguments.
_FREE = ("optimizer", "scheduler")
_Fields = dict[str, "dataclasses.Field[Any]"]


class ScopedKey(NamedTuple):
    """A key of a configuration: its value, its scope, whether the run reads it; ``identifies`` as of `scoped`."""

    value: Any
    scope: Scope
    read: bool
    identifies: bool | Callable[[Any], object]


def keys_of(kind: type[Any], mapping: Mapping[str, Any]) -> dict[str, ScopedKey]:
    """All keys of a configuration, dotted; what a mapping of an earlier version lacks has its default.

    Args:
        kind: the dataclass of the whole configuration.
        mapping: plain values, as `RunConfig.to_mapping` gives and a run's `config.yaml` holds. It may be anyone's: what
            cannot be decided, for values of wrong types or an algorithm that is not registered, counts as read.
    """
    section = mapping.get("algorithm")
    name = cast(Mapping[str, Any], section).get("name") if isinstance(section, Mapping) else None
    method = ALGORITHMS.get(name) if isinstance(name, str) else None
    found = dict(_keys(kind, mapping, "", ScopedKey(None, "result", True, False), method))
    unread = () if method is None else tuple(f"{name}." for name in method.unread)
    return {name: key._replace(read=key.read and not f"{name}.".startswith(unread)) for name, key in found.items()}


def setting_of(kind: type[Any], mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a run reads and that decide its result, with their values; no empty sections."""
    return _read(keys_of(kind, mapping), lambda key: key.scope == "result")


def identity_of(kind: type[Any], mapping: Mapping[str, Any]) -> str:
    """20 hexadecimal digits of a hash over what makes a run: its setting, and what identifies it beside."""
    keys = keys_of(kind, mapping)
    made_by = _read(keys, lambda key: key.scope == "result" or bool(key.identifies))
    made_by |= {name: by(value) for name, value in made_by.items() if callable(by := keys[name].identifies)}
    text = json.dumps(made_by, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _read(keys: Mapping[str, ScopedKey], kept: Callable[[ScopedKey], bool]) -> dict[str, Any]:
    return {name: key.value for name, key in keys.items() if key.read and kept(key) and key.value != {}}


@cache
def uses_of(kind: type[Any]) -> Mapping[str, Use]:
    """What the fields of a configuration say of their keys, dotted, with scopes inherited; without algorithms' own."""
    return dict(_uses(kind, "", "result"))


def scope_of(kind: type[Any], key: str) -> Scope:
    """The scope of a key or section; what is no field has that of the section that it is in."""
    uses, levels = uses_of(kind), key.split(".")
    above = (".".join(levels[:depth]) for depth in range(len(levels), 0, -1))
    return cast(Scope, next((uses[name].scope for name in above if name in uses), "result"))


def pruned(mapping: Mapping[str, Any], keep: Callable[[str], bool], prefix: str = "") -> dict[str, Any]:
    """A copy without the keys, by their dotted names, that are not to be kept; sections that this empties go too."""
    found: dict[str, Any] = {}
    for name, value in mapping.items():
        key = join(prefix, name)
        if isinstance(value, Mapping) and value:
            inner = pruned(cast(Mapping[str, Any], value), keep, key)
            found |= {name: inner} if inner else {}
        elif keep(key):
            found[name] = value
    return found


# ---------------------------------------------------------------------- the keys of a section


def _keys(
    kind: type[Any] | None, given: Mapping[Any, Any], prefix: str, use: ScopedKey, method: Any
) -> Iterator[tuple[str, ScopedKey]]:
    """The keys of a section: those of its dataclass, if it has one, and what it holds beside them."""
    fields = {} if kind is None else _fields(kind)
    values = {name: default for name, field in fields.items() if (default := _default(field)) is not _NONE}
    values |= {str(name): value for name, value in given.items()}
    own = SimpleNamespace(**values)
    sections = {name: inner for name in fields if (inner := _section(kind, prefix, name, values.get(name), method))}
    for name in dict.fromkeys((*sections, *values)):
        key, value = join(prefix, name), values.get(name)
        below = _below(use, fields[name], own, method) if name in fields else use
        section = sections.get(name)
        if prefix == "model" and kind is not None and name in _own_sections(kind):  # a part, which not all methods have
            below = below._replace(read=below.read and (method is None or name in method.layout.parts))
        inner = cast(Mapping[Any, Any], value if isinstance(value, Mapping) else {})
        if section is not None or (inner and key.count(".") < _DEPTH):
            yield from _keys(section, inner, key, below, method)
        else:
            yield key, below._replace(value=value)


def _below(above: ScopedKey, field: dataclasses.Field[Any], own: SimpleNamespace, method: Any) -> ScopedKey:
    """What holds of the key of a field, given what holds of its section."""
    use: Use = field.metadata.get("use", Use())
    read = above.read
    if use.read_if is not None:
        with contextlib.suppress(Exception):  # a stranger's values, or a method that is not known
            read = read and bool(use.read_if(own, method))
    return ScopedKey(None, use.scope or above.scope, read, use.identifies)


def _uses(kind: type[Any], prefix: str, scope: Scope) -> Iterator[tuple[str, Use]]:
    for name, field in _fields(kind).items():
        use: Use = field.metadata.get("use", Use())
        use = use._replace(scope=use.scope or scope)
        yield join(prefix, name), use
        for section in () if not prefix and name in _FREE else _sections(kind, name):
            yield from _uses(section, join(prefix, name), cast(Scope, use.scope))


_NONE = object()


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return plain(field.default_factory())
    return _NONE if field.default is dataclasses.MISSING else plain(field.default)


def _section(kind: type[Any] | None, prefix: str, name: str, value: object, method: Any) -> type[Any] | None:
    """The dataclass of the section of that name, None for a key that holds a value."""
    if kind is None or (not prefix and name in _FREE):
        return None
    if not prefix and name == "algorithm":
        return None if method is None else method.Config
    named = cast(Mapping[Any, Any], value).get("name") if isinstance(value, Mapping) else value
    sections = _sections(kind, name)
    fitting = (section for section in sections if getattr(section, "name", named) == named)
    return next(fitting, sections[0] if sections else None)


def _fields(kind: type[Any]) -> _Fields:
    sections = _own_sections(kind)
    if not sections:
        return _plain_fields(kind)
    fields = {name: field for name, field in _plain_fields(kind).items() if not field.metadata.get("sections")}
    return fields | {name: dataclasses.field(default_factory=section) for name, section in sections.items()}


@cache
def _plain_fields(kind: type[Any]) -> _Fields:
    return {field.name: field for field in dataclasses.fields(kind) if field.init and field.name != "algorithm_name"}


def _own_sections(kind: type[Any]) -> Mapping[str, type[Any]]:
    """Sections that stand beside the keys of a dataclass, and that one field holds: those of registered parts."""
    return cast(Mapping[str, type[Any]], kind.sections()) if hasattr(kind, "sections") else {}


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _sections(kind: type[Any], name: str) -> tuple[type[Any], ...]:
    """The dataclasses that a field's type names."""
    own = _own_sections(kind)
    return (own[name],) if name in own else _named_by(kind, name)


@cache
def _named_by(kind: type[Any], name: str) -> tuple[type[Any], ...]:
    hint = _hints(kind)[name]
    arms = (hint, *typing.get_args(hint)) if typing.get_origin(hint) not in (tuple, list, dict) else ()
    return tuple(cast(type[Any], arm) for arm in arms if dataclasses.is_dataclass(arm))
