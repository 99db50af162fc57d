"""Reading what a run's folder holds as the data of a stranger: within the folder, within bounds, and never as code.

A folder may come from anyone. So its yaml has no tags and no aliases, its files are plain ones inside it, and size,
depth and numbers are bounded before anything is made of them.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import yaml

from cutlayer.runtime.ground.config import ConfigError

# A configuration takes some kilobytes and five levels of mappings; results grow with rounds and clients.
YAML_BYTES = 1 << 20
JSON_BYTES = 1 << 28
DEPTH = 32
NODES = 100_000
_SCALAR = 4096
_LARGEST = 2**64
_TEXT_TAG = "tag:yaml.org,2002:str"
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
# libyaml's loader, where PyYAML was built with it, reads eight times as fast. Its events take no stack for depth.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER: Any = yaml.resolver.Resolver()
_YAML: Any = yaml  # partly untyped


class UnreadableError(ConfigError):
    """A file of a run that cannot be read, in one line; ``why`` is the reason alone."""

    why = ""

    @classmethod
    def of(cls, folder: Path, name: str, why: object) -> UnreadableError:
        """The error for the file ``name`` of a run's folder."""
        reason = " ".join(str(why).split())[:300]
        error = cls("run", str(folder), f"a folder with a readable {name} ({reason})")
        error.why = reason
        return error


class MissingError(UnreadableError):
    """There is no such file."""


def read_yaml(folder: Path, name: str, *, ignored_tags: str | None = None) -> dict[str, Any]:
    """The mapping that a yaml file of a run holds, of plain values: no tags, no aliases, keys of text.

    Args:
        folder: of the run. name: of the file, relative to it.
        ignored_tags: the beginning of tags whose values are read as null, as other programs write some.

    Raises:
        MissingError: there is no such file.
        UnreadableError: it is no plain file inside the folder, is no such yaml, or is beyond the bounds.
    """
    raw = read_bytes(folder, name, YAML_BYTES)
    try:
        return _plain_yaml(raw.decode("utf-8"), ignored_tags)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UnreadableError.of(folder, name, error) from None


def read_json(folder: Path, name: str, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The mapping that a json file of a run holds, with whole numbers within 2^64.

    Args:
        folder: of the run. name: of the file, relative to it. limit: bytes that it may have.

    Raises:
        MissingError: there is no such file.
        UnreadableError: it is no plain file inside the folder, is no such json, or is beyond the bounds.
    """
    raw = read_bytes(folder, name, limit)
    try:
        # Python itself ends deeper nesting, and whole numbers of thousands of digits, in an error.
        value = json.loads(raw, parse_int=_whole if _LONG_NUMBER.search(raw) else None)
        return _mapping(value)
    except (ValueError, RecursionError) as error:
        raise UnreadableError.of(folder, name, error) from None


def read_text(folder: Path, name: str, limit: int = YAML_BYTES) -> str:
    """A text file of a run, under the same rules.

    Raises:
        MissingError, UnreadableError: as `read_bytes`; or it is no UTF-8.
    """
    try:
        return read_bytes(folder, name, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError.of(folder, name, error) from None


def read_bytes(folder: Path, name: str, limit: int) -> bytes:
    """The content of a plain file in a run's folder, of at most ``limit`` bytes.

    Raises:
        MissingError: there is no such file.
        UnreadableError: it is a link out of the folder, a device, a pipe or too large, or cannot be read.
    """
    try:
        # Without waiting, as the opening of a pipe would.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(inside(folder, name), flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableError.of(folder, name, "it is no plain file")
            content = file.read(limit + 1) if status.st_size <= limit else b""
    except FileNotFoundError as error:
        raise MissingError.of(folder, name, error.strerror) from None
    except OSError as error:
        raise UnreadableError.of(folder, name, error.strerror or error) from None
    if max(len(content), status.st_size) > limit:
        raise UnreadableError.of(folder, name, f"it has more than {limit:,} bytes")
    return content


def inside(folder: Path, name: str) -> Path:
    """Where a file or folder of a run is, all links followed.

    Raises:
        UnreadableError: that is outside of the run's folder.
    """
    top = folder.resolve()
    try:
        found = (top / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a zero byte
        raise UnreadableError.of(folder, name, error) from None
    if found != top and top not in found.parents:
        raise UnreadableError.of(folder, name, "it leads out of the folder")
    return found


def check_links(folder: Path) -> None:
    """Raise `UnreadableError` if anything in a run's folder is a link out of it, a pipe, a socket or a device."""
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif entry.is_symlink():
                    inside(folder, os.path.relpath(entry.path, folder))
                elif not entry.is_file(follow_symlinks=False):
                    raise UnreadableError.of(folder, os.path.relpath(entry.path, folder), "it is no plain file")


def _plain_yaml(text: str, ignored_tags: str | None) -> dict[str, Any]:
    loader: Any = _LOADER
    if ignored_tags is not None:
        loader = type("Lenient", (_LOADER,), {})
        loader.add_multi_constructor(ignored_tags, _null)
    _check_events(_YAML.parse(text, Loader=_LOADER), ignored_tags)
    value = yaml.load(text, Loader=loader)
    return _mapping(value)


def _check_events(events: Iterable[Any], ignored_tags: str | None) -> None:
    """Raise `ValueError` at the first thing that a plain configuration does not have."""
    open_: list[int] = []  # of each level that is open: items so far in a mapping, keys and values; -1 for a list
    ignored: set[str] = set()  # anchors of values that are read as null
    for count, event in enumerate(events):
        if count > NODES:
            raise ValueError(f"more than {NODES:,} values")
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) and event.anchor not in ignored:
            raise ValueError(f"line {line} has an alias, *{event.anchor}")
        if isinstance(event, yaml.CollectionEndEvent):
            open_.pop()
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        tag = cast(str | None, getattr(event, "tag", None))
        if tag not in (None, "!"):
            if not (ignored_tags and str(tag).startswith(ignored_tags)):
                raise ValueError(f"line {line} has a tag, {tag:.40}")
            ignored.add(str(event.anchor))
        is_key = bool(open_) and open_[-1] >= 0 and open_[-1] % 2 == 0
        if open_ and open_[-1] >= 0:
            open_[-1] += 1
        if isinstance(event, yaml.AliasEvent):
            if is_key:
                raise ValueError(f"line {line} has a key that is no text")
            continue
        if isinstance(event, yaml.ScalarEvent):
            if len(event.value) > _SCALAR:
                raise ValueError(f"line {line} has a value of more than {_SCALAR} characters")
            if is_key and _RESOLVER.resolve(yaml.ScalarNode, event.value, event.implicit) != _TEXT_TAG:
                raise ValueError(f"line {line} has a key that is no text, {event.value:.40}")
            continue
        if is_key:
            raise ValueError(f"line {line} has a key that is no text")
        open_.append(0 if isinstance(event, yaml.MappingStartEvent) else -1)
        if len(open_) > DEPTH:
            raise ValueError(f"line {line} is nested more than {DEPTH} levels deep")


def _mapping(value: object) -> dict[str, Any]:
    """The value, if it is a mapping of plain values within the bounds."""
    if not isinstance(value, dict):
        raise ValueError("it holds no mapping")
    level: list[Any] = [value]
    for _ in range(DEPTH):
        below: list[Any] = []
        for each in level:
            items = cast("Iterable[Any]", each.values() if each.__class__ is dict else each)
            below += [item for item in items if not (item.__class__ in _EASY or _is_plain(item))]
        if not below:
            return cast(dict[str, Any], value)
        level = below
    raise ValueError(f"nested more than {DEPTH} levels deep")


def _null(*_: object) -> None:
    return None


_EASY = (float, str, bool, type(None))


def _is_plain(item: object) -> bool:
    """Whether it is a number within the bounds; False for a list or mapping."""
    if isinstance(item, list | dict):
        return False
    if type(item) is not int:
        raise ValueError(f"a value of the kind {type(item).__name__}")
    if abs(item) > _LARGEST:
        raise ValueError("a whole number beyond 2^64")
    return True


def _whole(text: str) -> int:
    if len(text) > 21 or abs(number := int(text)) > _LARGEST:
        raise ValueError("a whole number beyond 2^64")
    return number
