"""What a client and the server each see: their own parts, data, state and randomness, and nothing of the other's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cutlayer.models.part_registry import WHOLE
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.boundary import Payload, Value, flatten, unflatten
from cutlayer.runtime.parties.aggregate import AggregateConfig
from cutlayer.runtime.parties.blueprint import Blueprint, Parts, copied_state
from cutlayer.runtime.parties.client_data import ClientData, Drawn, views
from cutlayer.runtime.parties.means import Means
from cutlayer.runtime.parties.optim import PartOptimizer, load_optimizer, optimizer_tensors
from cutlayer.runtime.parties.schedules import Pace, SchedulePoint
from cutlayer.runtime.parties.store import Row, Store
from cutlayer.tasks import Loss


class KeptRows(Protocol):
    """What a client keeps between the rounds in which it takes part."""

    def get(self, name: str) -> Row | None:
        """A row, or None where the client has none yet. Its tensors are read-only."""

    def put(self, name: str, row: Mapping[str, Tensor]) -> None:
        """Keep a row; it takes effect if the client ends its round."""

    def drop(self, name: str) -> None:
        """Keep the row no longer; it takes effect if the client ends its round."""


@dataclass(frozen=True)
class ClientState(KeptRows):
    """A client's own rows in the store."""

    _store: Store
    _client: int

    def get(self, name: str) -> Row | None:
        return self._store.get(self._client, name)

    def put(self, name: str, row: Mapping[str, Tensor]) -> None:
        self._store.put(self._client, name, row)

    def drop(self, name: str) -> None:
        self._store.drop(self._client, name)


class KeptOptimizers:
    """The optimizers of one client's parts, or of its copies at the server, as far as their state outlives the round.

    Args:
        state: the client's rows, in which a part's is ``<part>.optimizer``, with a label ``<part>.optimizer.<label>``.
    """

    def __init__(self, blueprint: Blueprint, state: KeptRows) -> None:
        self._blueprint, self._state = blueprint, state
        self._latest: dict[str, torch.optim.Optimizer] = {}

    def carry_on(self, names: Sequence[str], optimizer: PartOptimizer, label: str = "") -> PartOptimizer:
        """Let a fresh optimizer over the parts go on where the last one over each of them, of any round, has ended.

        Args:
            label: of those that it goes on from, where a part has several.

        Raises:
            ConfigError: what was kept is the state of another optimizer, or of another part.
        """
        for number, name in enumerate(names):
            if not self._blueprint.keeps_optimizer[name]:
                continue
            row = f"{name}.optimizer.{label}" if label else f"{name}.optimizer"
            before, own = self._latest.get(row), optimizer.of(number)
            kept = self._state.get(row) if before is None else optimizer_tensors(before)
            try:
                load_optimizer(own, kept or {})
            except ValueError as error:
                expected = f"the one whose state was kept ({error})"
                raise ConfigError(_key(name), type(own).__name__.lower(), expected) from error
            self._latest[row] = own
        return optimizer

    def put(self) -> None:
        """Keep what the optimizers have now; it takes effect if the client ends its round."""
        for row, optimizer in self._latest.items():
            self._state.put(row, optimizer_tensors(optimizer))


def _key(part: str) -> str:
    return "optimizer" if part == WHOLE else f"model.{part}.optimizer"


@dataclass
class Seat:
    """Where a client sits while it runs: a set of parts that one client after another uses, or several at a time."""

    blueprint: Blueprint
    parts: Parts
    taken: bool = False
    clients: int = 1

    def take(self, blueprint: Blueprint) -> None:
        """Ready the seat for a client with this blueprint: its parts without gradients, its own variants."""
        self.taken = True
        if blueprint is not self.blueprint:
            self.blueprint = blueprint
            self.parts |= blueprint.parts(blueprint.varied)
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)


class ClientContext:
    """A client in one round.

    Attributes:
        round: number of the round, from 0.
        config: the algorithm's own configuration.
        data: the client's training data. steps: sizes of the round's batches.
        state: the rows that the client keeps between rounds.
        pace: of its schedules.
    """

    def __init__(
        self,
        seat: Seat,
        *,
        id: int,
        round: int,
        seed: int,
        config: Any,
        state: KeptRows,
        data: ClientData,
        steps: Sequence[int],
        pace: Pace,
    ) -> None:
        self._id = id
        self.round = round
        self.config = config
        self.data = data
        self.steps = steps
        self.state = state
        self.means = Means()
        self.pace = pace
        self._blueprint = seat.blueprint
        self._seat = seat
        self._seed = seed
        self._optimizers = KeptOptimizers(seat.blueprint, state)
        self._ready: set[str] = set()

    @property
    def id(self) -> int:
        """Number of the client."""
        return self._id

    @property
    def samples(self) -> int:
        """Number of the client's training samples."""
        return len(self.data)

    @property
    def loss(self) -> Loss:
        """The loss of the dataset's task: ``ctx.loss(output, y)`` is its mean over a batch, a scalar."""
        return self._blueprint.loss

    def part(self, name: str) -> nn.Module:
        """A part of the model, in training mode: as loaded in this round, else in its initial state."""
        if name not in self._ready:
            self._fill(name, self._blueprint.initial[name])
        return self._seat.parts[name]

    def load(self, payload: Payload) -> None:
        """Load every part that the payload brings; entries of other names are left alone."""
        for name, state in unflatten(payload).items():
            if name in self._seat.parts:
                self._fill(name, self._completed(name, state))

    def dump(self, *names: str) -> dict[str, Value]:
        """The parts as an upload."""
        result: dict[str, Value] = {}
        for name in names:
            result |= flatten(name, self._blueprint.travelling(name, self.part(name)))
        return result

    def restore(self, name: str) -> bool:
        """Load a part as this client kept it; False where it keeps none yet."""
        row = self.state.get(name)
        if row is None:
            return False
        self._fill(name, row)
        return True

    def keep(self, name: str) -> None:
        """Keep a part for this client's next round."""
        self.state.put(name, self.part(name).state_dict())

    def optimizer(self, *names: str, label: str = "") -> PartOptimizer:
        """An optimizer over the parts, as configured for each, at this round's learning rate.

        Its state is fresh, or, of parts whose optimizer is kept, what this client's last one over the part has left.
        A method that trains two copies of a part gives the optimizers of one of them a ``label``.
        """
        optimizer = self._blueprint.optimizer([(name, self.part(name)) for name in names], self._now)
        return self._optimizers.carry_on(names, optimizer, label)

    def _now(self, part: str) -> SchedulePoint:
        return self.pace(part, self.round)

    def schedule(self, optimizer: PartOptimizer, *names: str, at: int) -> None:
        """Set an optimizer over the parts to what their schedules say at another place than this round's number."""
        self._blueprint.schedule(optimizer, names, lambda name: self.pace(name, at))

    def batches(self, stream: str = "batches", epochs: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The round's batches, ``local_epochs`` passes unless given: x [b, C, H, W] on the device, and the
        targets y, for ``ctx.loss``: of images with one class each int64 [b].

        A method that goes through the data twice names another ``stream`` of randomness for the second time.
        """
        return self.data.batches(self.generator(stream), epochs)

    def views(self, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Steps of as many samples as ``sizes`` says: two augmented views of the same images, x [b, C, H, W] each."""
        for step in self.drawn(sizes):
            yield views(self.data.source, [step])

    def pixels(self, x: Tensor) -> Tensor:
        """Images of a batch, [b, C, H, W], as they were before normalisation, with values 0..1."""
        return self.data.source.pixels(x)

    def drawn(self, sizes: Sequence[int]) -> Iterator[Drawn]:
        """What ``views`` makes its images from."""
        return self.data.drawn(self.generator("batches"), self.round, sizes)

    def generator(self, stream: str) -> torch.Generator:
        """A CPU generator for one stream of this client in this round."""
        return rng.torch_generator(self._seed, round=self.round, client=self.id, stream=stream)

    def log(self, name: str, value: Tensor | float) -> None:
        """Report a metric; the round's mean is sent with the upload and counted apart from training traffic."""
        self.means.log(name, value)

    def leave(self) -> None:
        """End of the client's round: keep what the buffer policy leaves with it, and its optimizers."""
        self._optimizers.put()
        if self._blueprint.buffers == "keep_local":
            for name in self._ready & self._blueprint.buffer_names.keys():
                buffers = self._blueprint.buffer_names[name]
                if buffers:
                    state = self._seat.parts[name].state_dict()
                    self.state.put(f"{name}.buffers", {key: state[key] for key in buffers})

    def _completed(self, name: str, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        if self._blueprint.buffers == "average":
            return state
        kept = self.state.get(f"{name}.buffers") if self._blueprint.buffers == "keep_local" else None
        initial = self._blueprint.initial[name]
        local = kept or {key: initial[key] for key in self._blueprint.buffer_names[name]}
        return {**local, **state}

    def _fill(self, name: str, state: Mapping[str, Tensor]) -> None:
        self._seat.parts[name].load_state_dict(state)
        self._ready.add(name)


@dataclass
class ServerContext:
    """The server between and within rounds.

    Attributes:
        config: the algorithm's own configuration.
        shared: names of the parts that travel each round.
        num_clients: size of the population. pace: of its schedules.
        round: number of the current round, from 0.
    """

    blueprint: Blueprint
    parts: Parts
    config: Any
    shared: tuple[str, ...]
    num_clients: int
    aggregate: AggregateConfig
    seed: int
    store: Store
    pace: Pace
    round: int = 0
    means: Means = field(default_factory=Means)
    _optimizers: dict[tuple[str, ...], PartOptimizer] = field(default_factory=dict[tuple[str, ...], PartOptimizer])
    _kept: dict[int, KeptOptimizers] = field(default_factory=dict[int, KeptOptimizers])
    _idle: dict[str, list[nn.Module]] = field(default_factory=dict[str, list[nn.Module]])

    def open_round(self, round: int) -> None:
        """Move to a round: set its learning rates, forget the last one's metrics and optimizers that are not kept."""
        self.round = round
        self.means = Means()
        self._kept = {}
        for names, optimizer in self._optimizers.items():
            for number, name in enumerate(names):
                if self.blueprint.keeps_optimizer[name] is False:
                    optimizer.renew(number)
            self.blueprint.schedule(optimizer, names, self._now)

    def _now(self, part: str, client: int | None = None) -> SchedulePoint:
        return self.pace(part, self.round, client)

    @property
    def loss(self) -> Loss:
        """The loss of the dataset's task, as clients have it."""
        return self.blueprint.loss

    def part(self, name: str) -> nn.Module:
        """A part that the server holds; parts that it only averages are here too."""
        return self.parts[name]

    def dump(self, *names: str) -> dict[str, Value]:
        """The parts as the payload of a message to a client."""
        result: dict[str, Value] = {}
        for name in names:
            result |= flatten(name, self.blueprint.travelling(name, self.parts[name]))
        return result

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Put a part into a state; buffers that did not travel stay as they are."""
        self.parts[name].load_state_dict({**self.parts[name].state_dict(), **state})

    def optimizer(self, *names: str) -> PartOptimizer:
        """The optimizer of the parts, at the current round's learning rate.

        It is one for the whole run, but for the state of parts whose optimizer is said to live for a round.
        """
        if names not in self._optimizers:
            modules = [(name, self.parts[name]) for name in names]
            self._optimizers[names] = self.blueprint.optimizer(modules, self._now)
        return self._optimizers[names]

    def replica(self, name: str, client: int) -> tuple[nn.Module, PartOptimizer]:
        """A copy of a part for one client alone, with an optimizer of its own.

        Its state is fresh, or, where the part's optimizer is kept, what that of the client's last copy has left.
        """
        idle = self._idle.get(name)
        if idle:
            module = idle.pop()
            module.load_state_dict(self.parts[name].state_dict())
            module.zero_grad(set_to_none=True)
        else:
            module = self.blueprint.replica(self.parts[name])
        kept = self._kept.setdefault(client, KeptOptimizers(self.blueprint, self.state(client)))
        optimizer = self.blueprint.optimizer([(name, module)], lambda part: self._now(part, client))
        return module, kept.carry_on([name], optimizer)

    def retire(self, name: str, module: nn.Module) -> None:
        """Have a copy of a part again that nobody uses any more: it becomes the next one."""
        self.blueprint.let_replay(module)
        self._idle.setdefault(name, []).append(module)

    def leave(self, client: int) -> None:
        """End of a client's round: keep the optimizers of its copies that outlive it."""
        if client in self._kept:
            self._kept.pop(client).put()

    def forget(self, client: int) -> None:
        """A client dropped out: what its copies' optimizers did in this round never happened."""
        self._kept.pop(client, None)

    def state(self, client: int) -> ClientState:
        """The rows that the server keeps for a client."""
        return ClientState(self.store, client)

    def weight(self, client: int, samples: int) -> float:
        """The unnormalised weight p_i of a client in an average."""
        return self.aggregate.weight(client, samples)

    def generator(self, stream: str) -> torch.Generator:
        """A CPU generator for one stream of the server in this round."""
        return rng.torch_generator(self.seed, round=self.round, stream=stream)

    def log(self, name: str, value: Tensor | float) -> None:
        """Report a metric; the round's mean is recorded."""
        self.means.log(name, value)

    def state_dict(self) -> dict[str, Any]:
        """The parts and the optimizers, for a checkpoint."""
        return {
            "parts": {name: copied_state(part) for name, part in self.parts.items()},
            "optimizers": {"+".join(names): item.state_dict() for names, item in self._optimizers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a checkpoint."""
        for name, values in state["parts"].items():
            self.parts[name].load_state_dict(values)
        for names, values in state["optimizers"].items():
            self.optimizer(*names.split("+")).load_state_dict(values)
