"""What `results.json` must hold, checked once when it is read, so that nothing after it meets odd content; and what is
told of a file that does not hold what it should."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, cast

import numpy as np

METRICS = ("test_acc", "test_loss", "train_loss")
REQUIRED = ("rounds", "test_acc", "test_loss", "comm_load", "comm_up", "comm_down")
_COUNTS = ("comm_load", "comm_up", "comm_down", "comm_framed", "round_trips", "client_rounds")
_FIGURES = (*METRICS, "time_wall", "time_client", "time_server", "time_eval")


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
    for name, values in _lists(results):
        if not isinstance(values, list):
            raise ValueError(f"{name} is no list")
        if len(values) != len(rounds):
            raise ValueError(f"{name} has {len(values)} entries, rounds {len(rounds)}")
        # Types of elements and not numpy's reading of them: it takes the text "nan" for a number.
        if not set(map(type, values)) <= {int, float, NoneType}:
            odd = next(value for value in values if type(value) not in (int, float, NoneType))
            raise ValueError(f"{name} holds {odd!r:.40}, which is no number")
        if name in _COUNTS or name.startswith("traffic."):
            _check_count(name, values)


def reason(error: BaseException) -> str:
    """An error of reading in one line, without the path that is told beside it."""
    if isinstance(error, FileNotFoundError):
        return "it vanished while it was read"
    if isinstance(error, OSError):
        return f"{Path(error.filename or '').name or 'it'} cannot be read: {error.strerror}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())


def _lists(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in (*_COUNTS, *_FIGURES):
        if name in results:
            yield name, results[name]
    for part in ("metrics", "traffic"):
        lists = results.get(part, {})
        if not isinstance(lists, dict):
            raise ValueError(f"{part} is no mapping of names to lists")
        for name, values in cast(dict[str, Any], lists).items():
            if part == "traffic" and name.count("/") < 2:
                raise ValueError(f"traffic.{name}: expected direction/kind/field")
            yield f"{part}.{name}", values


def _check_count(name: str, values: Sequence[Any]) -> None:
    if set(map(type, values)) != {int} or values[0] < 0 or not (np.diff(values) >= 0).all():
        raise ValueError(f"{name} is no running count")
