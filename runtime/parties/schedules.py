"""Learning-rate schedules by name, by round or by step: any class of ``torch.optim.lr_scheduler``, and a linear one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from torch.optim import lr_scheduler

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.parties.optim import OPTIMIZERS, WAYS, OptimizerConfig, named_options


def _linear(optimizer: torch.optim.Optimizer, total: int) -> lr_scheduler.LambdaLR:
    """From the whole rate down to 0 in ``total`` steps."""
    return lr_scheduler.LambdaLR(optimizer, lambda at: max(0.0, (total - at) / max(1, total)))


_SCHEDULERS: dict[str, Any] = {
    name.lower(): kind
    for name, kind in vars(lr_scheduler).items()
    if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
}
# These cannot be stepped alone: they need a metric, or other schedulers.
for _name in ("lrscheduler", "reducelronplateau", "chainedscheduler", "sequentiallr"):
    _SCHEDULERS.pop(_name, None)
_SCHEDULERS["linear"] = _linear
# What is as long as the run is after its warm-up, unless it is given.
_LENGTHS = {"linear": "total", "cosineannealinglr": "T_max", "onecyclelr": "total_steps"}

_PER = ("round", "step")


@dataclass(frozen=True)
class SchedulerConfig:
    """A schedule of ``torch.optim.lr_scheduler`` by name (any case) and its arguments, or ``linear``.

    Attributes:
        per: what it is stepped by: the rounds of the run, or the steps of each part's optimizer.
        warmup: rounds or steps before it begins, >= 0, in which the rate rises linearly from 0.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    per: Literal["round", "step"] = "round"
    warmup: int = 0

    def to_mapping(self) -> dict[str, Any]:
        """The mapping that names it; what is as for every schedule is left out."""
        own = {"per": self.per} if self.per != "round" else {}
        return {"name": self.name, **self.options, **own, **({"warmup": self.warmup} if self.warmup else {})}

    def lasting(self, length: int) -> dict[str, Any]:
        """The options in a run of ``length`` rounds or steps."""
        key = _LENGTHS.get(self.name)
        return self.options if key is None else {key: max(1, length - self.warmup), **self.options}


class SchedulePoint(NamedTuple):
    """Where a schedule is: at which round or step, from 0, of how many in the run."""

    at: int
    of: int


class Pace:
    """How schedules of a party move on in a run of so many rounds, as if every client ended its rounds.

    Args:
        each: of a part that goes by steps, how many a client's round takes; of a server that has copies for clients, of
            every client.
        begun: of such a part that a server trains for all, its steps before each round, and before the run's end.
    """

    def __init__(
        self, rounds: int, each: Mapping[str, Sequence[int]], begun: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        self._rounds, self._each, self._begun = rounds, each, begun or {}

    def __call__(self, part: str, round: int, client: int | None = None) -> SchedulePoint:
        """Where a part's schedule is as a round (from 0) begins; at a server of its copy for a client."""
        if client is None and part in self._begun:
            begun = self._begun[part]
            return SchedulePoint(begun[min(round, self._rounds)], begun[-1])
        if part in self._each:
            each = self._each[part][client or 0]
            return SchedulePoint(round * each, self._rounds * each)
        return SchedulePoint(round, self._rounds)


def scheduler_config(values: Mapping[str, Any] | None, where: str = "scheduler") -> SchedulerConfig | None:
    """The schedule that ``{"name": "cosineannealinglr", "T_max": 200}`` names; None or no name is a constant rate.

    Raises:
        ConfigError: unknown name or option, or a value that the scheduler refuses.
    """
    if not values or values.get("name") is None:
        return None
    given = dict(values)
    per, warmup = given.pop("per", None) or "round", given.pop("warmup", None) or 0
    if per not in _PER:
        raise ConfigError(f"{where}.per", per, "what the schedule is stepped by", _PER)
    if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 0:
        raise ConfigError(f"{where}.warmup", warmup, f"an integer >= 0: {per}s in which the rate rises")
    for key, value in given.items():
        if None in (cast("list[Any]", value) if isinstance(value, list) else ()):
            raise ConfigError(f"{where}.{key}", given[key], f"numbers of {per}s")
    name, options = named_options(given, where, _SCHEDULERS, "optimizer", "per", "warmup")
    found = SchedulerConfig(name, options, cast(Any, per), warmup)
    try:
        _SCHEDULERS[name](torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), **found.lasting(1000))
    except (TypeError, ValueError) as error:
        raise ConfigError(where, dict(values), str(error)) from error
    return found


class _Table:
    """The options of a parameter group in each round or step, from one simulated run of the schedule.

    An optimizer on a client may live for one round only, so a schedule cannot be stepped along with it.
    """

    def __init__(self, optimizer: OptimizerConfig, scheduler: SchedulerConfig, length: int) -> None:
        self._optimizer = OPTIMIZERS[optimizer.name]([nn.Parameter(torch.zeros(1))], **optimizer.options)
        self._scheduler = _SCHEDULERS[scheduler.name](self._optimizer, **scheduler.lasting(length))
        self._first = self._read()
        self._moved = {"lr"}
        self._later: list[dict[str, Any]] = []

    def _read(self) -> dict[str, Any]:
        left = ("params", *WAYS)
        return {key: value for key, value in self._optimizer.param_groups[0].items() if key not in left}

    def at(self, place: int) -> dict[str, Any]:
        """All options at place 0, and later those that have moved since."""
        while len(self._later) < place:
            self._optimizer.step()
            self._scheduler.step()
            now = self._read()
            self._moved |= {key for key, value in now.items() if value != self._first[key]}
            self._later.append({key: now[key] for key in self._moved})
        return self._later[place - 1] if place else self._first


# Keyed by text: the configs hold dicts, which cannot be hashed.
_TABLES: dict[tuple[str, str, int], _Table] = {}


def learning_options(
    optimizer: OptimizerConfig, scheduler: SchedulerConfig | None, at: int, length: int = 1000
) -> dict[str, Any]:
    """What the schedule sets at a place (0-based): ``lr``, and whatever else it moves (OneCycleLR: momentum).

    Args:
        at: a round, or a step where the schedule goes by steps. length: rounds or steps of the run.
    """
    if scheduler is None:
        return {}
    if scheduler.per == "step":
        at = min(at, max(0, length - 1))  # steps that were not counted on keep the last rate
    if scheduler.name not in _LENGTHS or _LENGTHS[scheduler.name] in scheduler.options:
        length = 0  # the same for any
    key = (repr(optimizer), repr(scheduler), length)
    if key not in _TABLES:
        _TABLES[key] = _Table(optimizer, scheduler, length)
    if at >= scheduler.warmup:
        return _TABLES[key].at(at - scheduler.warmup)
    first = _TABLES[key].at(0)
    return {**first, "lr": first["lr"] * (at / scheduler.warmup)}


def check_schedule(optimizer: OptimizerConfig, scheduler: SchedulerConfig | None, length: int, where: str) -> None:
    """Raises ConfigError if the schedule does not go with the optimizer, or does not last for the run.

    The schedule is played through the first thousand rounds or steps; beyond, it would cost a start more than it saves.

    Args:
        length: of the run, in rounds or steps.
    """
    if scheduler is None:
        return
    if scheduler.warmup and scheduler.warmup >= length:
        raise ConfigError(f"{where}.warmup", scheduler.warmup, f"fewer than the {length} {scheduler.per}s of the run")
    try:
        learning_options(optimizer, scheduler, max(0, min(length, 1000) - 1), length)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        values = {"name": scheduler.name, **scheduler.options}
        reason = f"a schedule for {optimizer.name} over {length} {scheduler.per}s ({type(error).__name__}: {error})"
        raise ConfigError(where, values, reason) from error
