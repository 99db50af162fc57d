"""What is accepted from the other end of a link, and the one error of what is not."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, cast

MIB = 1024 * 1024


class WireError(ValueError):
    """What a peer sent is not a message; one line says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that is accepted of a message: bytes of a frame, of its header and of a text, tensors, dimensions."""

    message_bytes: int
    header_bytes: int = 16 * MIB
    tensors: int = 100_000
    dimensions: int = 8
    text_bytes: int = MIB


def shown(value: object) -> str:
    """A peer's value for an error's line: printable, and no longer than a few words."""
    try:
        text = ascii(value[:64] if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_object(raw: bytes | bytearray, what: str) -> dict[str, Any]:
    """The JSON object in ``raw``, which ``what`` names in errors.

    Stricter than JSON's own reader: no key twice, no NaN or infinity, no text that UTF-8 cannot hold.

    Raises:
        WireError: if there is anything else in it.
    """
    try:
        text = str(raw, "utf-8")
        value: Any = _DECODER.decode(text)
        if "\\u" in text:  # an escape can spell half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WireError(f"{what} is a JSON {type(value).__name__}, not an object")
    return cast(dict[str, Any], value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise WireError(f"key {shown(twice)} is there twice")
    return made


def _no_constant(name: str) -> Any:
    raise WireError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise WireError(f"{shown(text)} is too large a number")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_no_constant, parse_float=_finite)
