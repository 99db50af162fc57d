"""What `results.json` must hold, checked once when it is read, so that nothing after it meets odd content; and what is
reported about a file that does not hold what it should."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, cast

import numpy as np

from cutlayer.runtime.ground.reading import MissingError, UnreadableError
from cutlayer.runtime.ground.text import one_line, printable

METRIC_NAMES = ("test_acc", "test_loss", "train_loss")
REQUIRED = ("rounds", "test_acc", "test_loss", "comm_load", "comm_up", "comm_down")
_COUNTS = ("comm_load", "comm_up", "comm_down", "comm_framed", "round_trips", "client_rounds")
_FIGURES = (*METRIC_NAMES, "time_wall", "time_client", "time_server", "time_eval")
_LARGEST = 2**62
# Of one run. Names become entries of a legend, and rounds and lists places in memory.
_MOST_ROUNDS, _LONGEST_NAME = 10**9, 200
_MOST_LISTS = {"metrics": 2000, "traffic": 200}
RESULTS_BYTES = 64 << 20
"""Of a file of results: some hundred thousand evaluations. Its lists take a few times as much memory."""
_ABOVE_ONE = 1e-6
"""What floating point may make of an accuracy of 1."""


def check_results(results: Mapping[str, Any], required: Sequence[str] = REQUIRED) -> None:
    """Check every list that is drawn or counted: equal lengths, numbers or null, cumulative counts that never fall.

    Args:
        results: content of `results.json`.
        required: names of the lists that must be there.

    Raises:
        ValueError: what is wrong, in one line.
    """
    for name in required:
        if not isinstance(results.get(name), list):
            raise ValueError(f"no list {name}")
    rounds = results["rounds"]
    if not rounds:
        raise ValueError("no evaluated round")
    if set(map(type, rounds)) != {int} or rounds[0] < 1 or not (np.diff(rounds) > 0).all():
        raise ValueError("rounds are not rising numbers from 1")
    if rounds[-1] > _MOST_ROUNDS:
        raise ValueError(f"rounds go beyond {_MOST_ROUNDS:,}")
    for name, values in _lists(results):
        if not isinstance(values, list):
            raise ValueError(f"{name} is no list")
        if len(values) != len(rounds):
            raise ValueError(f"{name} has {len(values)} entries, rounds {len(rounds)}")
        # Types of elements and not numpy's reading of them: it takes the text "nan" for a number.
        if not set(map(type, values)) <= {int, float, NoneType}:
            odd = next(value for value in values if type(value) not in (int, float, NoneType))
            raise ValueError(f"{name} holds {odd!r:.40}, which is no number")
        if any(type(value) is int and abs(value) > _LARGEST for value in values):
            raise ValueError(f"{name} holds a number beyond 2^62")
        if name == "test_acc":
            _check_fractions(name, values)
        if name in _COUNTS or name.startswith("traffic."):
            _check_count(name, values)


def reason(error: BaseException) -> str:
    """An error of reading in one line, without the path that is reported with it."""
    if isinstance(error, FileNotFoundError | MissingError):
        return "it vanished while it was read"
    if isinstance(error, OSError):
        return one_line(f"{Path(error.filename or '').name or 'it'} cannot be read: {error.strerror}")
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return one_line(error)


def read_file(read: Callable[..., dict[str, Any]], folder: Path, name: str, *bounds: Any, **more: Any) -> Any:
    """What a reader of `runtime.ground.reading` reads, its text printable; whatever is wrong, with the file's name.

    Raises:
        MissingError: there is no such file.
        ValueError: it cannot be read; the text says why.
    """
    try:
        return plain_text(read(folder, name, *bounds, **more))
    except MissingError:
        raise
    except UnreadableError as error:
        raise ValueError(f"{name}: {error.why}") from None


def plain_text(value: Any) -> Any:
    """Mappings and lists with every text in them as one line of printable characters, their keys too.

    Lists of numbers, which may be long, are the same objects.
    """
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {printable(key): plain_text(item) for key, item in items}
    if isinstance(value, list):
        items = cast(list[Any], value)
        return items if set(map(type, items)) <= {int, float, NoneType} else [plain_text(item) for item in items]
    return value


def _lists(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in (*_COUNTS, *_FIGURES):
        if name in results:
            yield name, results[name]
    for part in ("metrics", "traffic"):
        lists = results.get(part, {})
        if not isinstance(lists, dict):
            raise ValueError(f"{part} is no mapping of names to lists")
        if len(lists) > _MOST_LISTS[part]:
            raise ValueError(f"{part} has {len(lists)} lists; {_MOST_LISTS[part]} can be read")
        for name, values in cast(dict[str, Any], lists).items():
            if len(name) > _LONGEST_NAME:
                raise ValueError(f"{part} has a name of {len(name)} characters: {name:.40}...")
            if part == "traffic" and name.count("/") < 2:
                raise ValueError(f"traffic.{name}: expected direction/kind/field")
            yield f"{part}.{name}", values


def _check_fractions(name: str, values: Sequence[Any]) -> None:
    for value in values:
        if value is not None and math.isfinite(value) and not 0 <= value <= 1 + _ABOVE_ONE:
            raise ValueError(f"{name} holds {value!r:.40}, which is no fraction")


def _check_count(name: str, values: Sequence[Any]) -> None:
    if set(map(type, values)) != {int} or values[0] < 0 or not (np.diff(values) >= 0).all():
        raise ValueError(f"{name} is no running count")
