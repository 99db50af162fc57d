"""Typed construction of configuration from plain containers, and the one-line error that users see.

`hydra_config/` holds values; the frozen dataclasses next to the code that uses them hold the schema. `build` joins
the two: it checks every key and every type, coerces nothing but an integer to a float, and says where it went wrong.
"""

import copy
import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast

from cutlayer.runtime.ground.text import one_line

T = TypeVar("T")

_SHOWN_CHOICES = 48
_SHOWN_VALUE = 120


Scope = Literal["result", "machine", "record", "after"]
"""What a key is for: it decides the result, belongs to the machine, says what is kept or shown, or is read later."""


class Use(NamedTuple):
    """What a field's metadata say of its key, see `scoped`."""

    scope: Scope | None = None
    read_if: Callable[[Any, Any], bool] | None = None
    identifies: bool | Callable[[Any], object] = False
    later: bool = False


def scoped(
    scope: Scope | None = None,
    *,
    read_if: Callable[[Any, Any], bool] | None = None,
    identifies: bool | Callable[[Any], object] = False,
    later: bool = False,
) -> dict[str, Use]:
    """Metadata of a dataclass field that is a key of the configuration: ``field(metadata=scoped("machine"))``.

    A key without any has the scope of the section that it is in, and at the top decides the result.

    Args:
        scope: of the key, and of those below it that have none of their own; None inherits.
        read_if: whether a run reads the key, given the section that it is in (fields as attributes, with plain values)
            and the class of the algorithm. Else it is as if it was not there.
        identifies: a run with another value is another run, although the key does not decide the result; or what of
            the value tells one run from another.
        later: a finished run may be measured with another value.
    """
    return {"use": Use(scope, read_if, identifies, later)}


class NoValue(enum.Enum):
    """Stands for "there is no value to show" in a `ConfigError`."""

    NO_VALUE = "no value"


NO_VALUE = NoValue.NO_VALUE


class ConfigError(ValueError):
    """A mistake in the configuration, reported in one line.

    Args:
        key: full dotted key as the user would write it.
        value: what was given; `NO_VALUE` leaves it out and prints `expected` as the whole reason.
        expected: what would have been right, e.g. "an integer >= 1".
        choices: valid values (or, without a value, valid keys); the nearest one is suggested.
    """

    def __init__(self, key: str, value: object, expected: str, choices: Iterable[str] = ()) -> None:
        self.key = key
        self.value = value
        self.expected = expected
        self.choices = tuple(str(choice) for choice in choices)
        # All four are kept as args, so that the error survives pickling between the processes of a sweep.
        super().__init__(key, value, expected, self.choices)

    def __str__(self) -> str:
        if self.value is NO_VALUE:
            text = f"{self.key}: {self.expected}" if self.key else self.expected
            word, prefix = self.key.rpartition(".")[2], self.key.rpartition(".")[0]
        else:
            text = f"{self.key}={show(self.value)}: expected {self.expected}"
            word, prefix = show(self.value), ""
        return one_line(text + self._hint(word, prefix), None)

    def _hint(self, word: str, prefix: str) -> str:
        if not self.choices:
            return ""
        close = nearest(word, self.choices)
        hint = "" if close is None else f"; did you mean {join(prefix, close)}?"
        shown = ", ".join(self.choices[:_SHOWN_CHOICES]) + (", ..." if len(self.choices) > _SHOWN_CHOICES else "")
        return f"{hint} (choices: {shown})"

    def within(self, where: str) -> "ConfigError":
        """The same error with its key below `where`."""
        return ConfigError(join(where, self.key), self.value, self.expected, self.choices)

    @classmethod
    def unknown_key(cls, key: str, choices: Iterable[str]) -> "ConfigError":
        """The error for a key that nothing reads; `choices` are the valid keys."""
        return cls(key, NO_VALUE, "no such key", choices)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like `word` (case ignored), or None when none is near."""
    folded = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(word.lower(), list(folded), n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def join(*parts: str) -> str:
    """A dotted key from its non-empty parts."""
    return ".".join(part for part in parts if part)


def show(value: object) -> str:
    """A value in one short line, spelled as on the command line."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, Mapping):
        text = "{" + ",".join(f"{key}:{show(item)}" for key, item in cast(Mapping[object, object], value).items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ",".join(show(item) for item in cast(Sequence[object], value)) + "]"
    else:
        text = str(value) if str(value).strip() else repr(str(value))
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_VALUE else text[: _SHOWN_VALUE - 3] + "..."


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A choice, such as a model or a dataset, without options of its own."""


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as the dicts, lists and strings that `build` takes back; a deep copy."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast(Sequence[Any], value)]
    return str(value) if isinstance(value, Path) else value


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Construct the dataclass `cls` from plain containers, strictly.

    Supported field types: bool, int, float, str, Path, Any, Literal, Optional and Union, tuple[T, ...], tuple[A, B],
    list[T], dict[str, T] and nested dataclasses. Only an int is ever converted, to a float.

    Args:
        cls: a (frozen) dataclass.
        values: field name to value.
        where: dotted key of `values` within the whole configuration, for messages.

    Raises:
        ConfigError: unknown key, missing key, wrong type, or what `cls.__post_init__` rejects.
    """
    if not isinstance(cast(object, values), Mapping):
        raise ConfigError(where, values, "a mapping of keys to values")
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls)) if field.init}
    for key in values:
        if key not in fields:
            raise ConfigError.unknown_key(join(where, str(key)), fields)
    hints = typing.get_type_hints(cls)
    made: dict[str, Any] = {}
    for name, field in fields.items():
        if name in values:
            made[name] = _convert(hints[name], values[name], join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(join(where, name), NO_VALUE, f"missing; expected {describe(hints[name])}")
    try:
        return cls(**made)
    except ConfigError as error:
        raise error.within(where) from None
    except ValueError as error:
        raise _from_value_error(error, fields, where) from error


def _from_value_error(error: ValueError, fields: Collection[str], where: str) -> ConfigError:
    """A plain ValueError of a __post_init__; a text that starts with a field's name gets its full key."""
    text = str(error)
    name = re.split(r"\W", text, maxsplit=1)[0]
    if name not in fields:
        return ConfigError(where, NO_VALUE, text)
    return ConfigError(join(where, name), NO_VALUE, text[len(name) :].lstrip(" :="))


def describe(kind: Any) -> str:
    """A type in words, e.g. "an integer or null"."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    words: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    words |= {Path: "a path", type(None): "null", Any: "a value"}
    if kind in words:
        return words[kind]
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(show(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin in (tuple, list):
        return "a list" + (f" of: {describe(args[0])}" if args and args[0] is not Any else "")
    if kind is dict or origin in (dict, Mapping) or dataclasses.is_dataclass(kind):
        return "a mapping of keys to values"
    return str(getattr(kind, "__name__", kind))


def _convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as the type `kind`, or ConfigError for `key`."""
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(kind, value, key)
    if origin is Literal:
        choices = typing.get_args(kind)
        if any(type(value) is type(choice) and value == choice for choice in choices):
            return value
        raise ConfigError(key, value, "one of the choices", [show(choice) for choice in choices])
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, cast(type, kind)) else build(cast(Any, kind), value, key)
    if origin in (tuple, list) or kind in (tuple, list):
        return _convert_sequence(kind, value, key)
    if origin in (dict, Mapping) or kind is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(key, value, describe(kind))
        item = (*typing.get_args(kind), Any, Any)[1]
        entries = cast(Mapping[Any, Any], value)
        return {str(name): _convert(item, entry, join(key, str(name))) for name, entry in entries.items()}
    return _convert_scalar(kind, value, key)


def _convert_scalar(kind: Any, value: Any, key: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is Any:
        return copy.deepcopy(value)
    if kind is float and is_number and not math.isnan(value):
        return float(value)
    if kind is Path and isinstance(value, str | Path) and str(value).strip():
        return Path(value)
    # `type(value) is kind` and not isinstance: a bool is an int to Python, but not to a user.
    if (kind is not float and type(value) is kind) or (kind is type(None) and value is None):
        return value
    raise ConfigError(key, value, describe(kind))


def _convert_union(kind: Any, value: Any, key: str) -> Any:
    choices: list[str] = []
    failed: list[ConfigError] = []
    # An exact type first, so that 3 for `float | int` stays the integer that it is.
    for arm in sorted(typing.get_args(kind), key=lambda arm: type(value) is not arm):
        try:
            return _convert(arm, value, key)
        except ConfigError as error:
            failed.append(error)
            if typing.get_origin(arm) is Literal:
                choices += [show(choice) for choice in typing.get_args(arm)]
    # An error below this key (an element, a nested field) says more than "does not fit the union".
    inner = [error for error in failed if error.key != key]
    raise inner[0] if inner else ConfigError(key, value, describe(kind), choices if isinstance(value, str) else ())


def _convert_sequence(kind: Any, value: Any, key: str) -> Any:
    args = typing.get_args(kind)
    if not isinstance(value, list | tuple):
        raise ConfigError(key, cast(object, value), describe(kind))
    sequence = cast(Sequence[Any], value)
    is_tuple = kind is tuple or typing.get_origin(kind) is tuple
    if is_tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(sequence):
            raise ConfigError(key, cast(object, value), f"a list of {len(args)} values")
        kinds = list(args)
    else:
        kinds = [args[0] if args else Any] * len(sequence)
    made = [_convert(item, entry, f"{key}.{at}") for at, (item, entry) in enumerate(zip(kinds, sequence, strict=True))]
    return tuple(made) if is_tuple else made
