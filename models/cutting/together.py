"""Recordings of many cuts from one set of passes: for a list of where a model can be cut."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch import nn

from cutlayer.models.cutting.recording import Pass
from cutlayer.models.cutting.splitter import CutError, Recording, record_modes

_KNOWN: ContextVar[Mapping[str, Recording] | None] = ContextVar("recordings of single cuts", default=None)


def known_recording(cuts: Sequence[str]) -> Recording | None:
    """What is recorded of these cuts within `recorded_together`, if there is anything."""
    return (_KNOWN.get() or {}).get(cuts[0]) if len(cuts) == 1 else None


@contextmanager
def recorded_together(model: nn.Module, cuts: Sequence[str], inputs: Mapping[str, Any]) -> Generator[None]:
    """Inside, each of the cuts alone, of models of this architecture, is built from passes that are recorded now.

    Cuts within one module have the same modules above them, so that passes at all of them tell of each. What a part
    writes into may be copied where a recording of the one cut would not have it copied.

    Args:
        cuts: each alone, in the order in which they end.
    """
    known: dict[str, Recording] = {}
    for _, members in groupby(sorted(cuts, key=_parent), key=_parent):
        group = [*members]
        try:
            several = record_modes(model, group, inputs)
        except CutError:
            continue  # each is then recorded for itself, and says so itself
        known |= {cut: _at(several, number) for number, cut in enumerate(group)}
    token = _KNOWN.set(known)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _parent(cut: str) -> str:
    return cut.rpartition(".")[0]


def _at(recording: Recording, number: int) -> Recording:
    """A recording of several cuts as one of that number alone."""
    passes = {mode: tuple(_joined(each, number) for each in several) for mode, several in recording.passes.items()}
    return replace(recording, cuts=(recording.cuts[number],), passes=passes)


def _joined(found: Pass, number: int) -> Pass:
    """A pass whose parts up to the cut of this number are one, and those behind it another."""
    part_of = {value: int(part > number) for value, part in found.part_of.items()}
    behind = dict.fromkeys(value for needs in found.needs[number + 1 :] for value in needs if not part_of[value])
    calls = {path: [replace(call, part=int(call.part > number)) for call in each] for path, each in found.calls.items()}
    return replace(
        found,
        calls=calls,
        part_of=part_of,
        needs=[[], [*behind]],
        rewritten=found.rewritten | found.overwritten,
        bare={name: {int(part > number) for part in parts} for name, parts in found.bare.items()},
    )
