"""Settings of a run as Python values, written as they are on the command line."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.launching.hydra_errors import explain

_WORD = re.compile(r"(?!(?:true|false|null|inf|nan)$)[a-z_][\w./+-]*", re.IGNORECASE)


def overrides_of(given: Iterable[str], values: Mapping[str, object]) -> list[str]:
    """Settings as on the command line: those that are given so, then a dotted key and its value each.

    Raises:
        ConfigError: what is no ``key=value``, or a value that no setting has.
    """
    texts = list(given)
    for text in texts:
        if not isinstance(cast(object, text), str) or "=" not in text or text.startswith("-"):
            raise ConfigError("run", text, "settings such as 'dataset=digits', one text each, or rounds=20")
    return [*texts, *(f"{key}={_written(key, value)}" for key, value in values.items())]


def check_single(overrides: Sequence[str]) -> None:
    """Raise ConfigError for several values of a key, which are a sweep."""
    with contextlib.suppress(OverrideParseException):  # which composing explains
        for each in OverridesParser.create().parse_overrides(list(overrides)):
            if each.is_sweep_override():
                key, _, value = str(each.input_line).partition("=")
                raise ConfigError(key, value, f"one value; cutlayer.sweep runs several, and {key}=[a,b] is a list")


def settings_in(overrides: Sequence[str]) -> dict[str, Any]:
    """The values of settings by key, for programs that change some of a run that is over."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError("run", error.override, explain(error) or "a setting") from error
    return {str(each.key_or_group): each.value() for each in parsed}


def _written(key: str, value: object) -> str:
    """A value as Hydra reads it back."""
    if hasattr(value, "item"):  # a number of numpy's
        value = cast(Any, value).item()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | os.PathLike):
        text = os.fspath(cast("str | os.PathLike[str]", value))
        return text if _WORD.fullmatch(text) else _quoted(text)
    if isinstance(value, list | tuple):
        return f"[{','.join(_written(key, each) for each in cast(Sequence[object], value))}]"
    if isinstance(value, Mapping):
        pairs = cast(Mapping[object, object], value).items()
        return "{" + ",".join(f"{name}:{_written(key, each)}" for name, each in pairs) + "}"
    raise ConfigError(key, cast(object, value), "a number, text, true, false, null, or a list or mapping of such")


def _quoted(text: str) -> str:
    """Within quotes only a backslash before a quote, or at the end, is read as more than itself."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"
