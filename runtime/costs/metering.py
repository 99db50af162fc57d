"""`python main.py ... --costs`: what a step costs a client of the configured run, measured while one takes it.

A client whose data are a single batch goes through a round, with the server and every message, and what it computes and
keeps meanwhile is metered. Nothing is written.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Column, Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cutlayer.datasets import Dataset, Partition
from cutlayer.models.frozen import frozen_in
from cutlayer.runtime.costs.cuts import prepared
from cutlayer.runtime.ground.screen import Screen
from cutlayer.runtime.ground.units import format_bytes
from cutlayer.runtime.messages.boundary import Message, Reply, Upload
from cutlayer.runtime.messages.ledger import CONTROL_KINDS, Ledger
from cutlayer.runtime.parties.blueprint import Parts, state_bytes
from cutlayer.runtime.rounds.session import Channel, Session
from cutlayer.runtime.rounds.setup import Setup, configured_shares
from cutlayer.runtime.rounds.trial import Trial
from cutlayer.runtime.settings import RunConfig

Bytes = Mapping[str, int]
"""Bytes by direction, `up` and `down`."""

_TOGETHER = 2  # clients of a lockstep cohort: a server may normalise over what they send


@dataclass(frozen=True)
class Costs:
    """What one step costs a client: all that it does with one batch in a round of one local epoch.

    Attributes:
        client: its number; of all clients the one with the most data. samples: in its batch.
        parameters: of each of its parts.
        weights, gradients, optimizer: bytes of its parts' parameters and buffers, frozen ones too, of the gradients
            that it takes steps along, and of what its optimizers keep from step to step (none of plain SGD, two moments
            of Adam).
        activations: most bytes that are kept for a backward pass at any time, besides the weights.
        forward_flops, backward_flops: floating-point operations of matrix products and convolutions (a multiplication
            and an addition are two), in backward passes and outside of them.
        step: payload bytes that cross with a batch, by direction; round: those that cross once a round.
        kept: bytes that stay for the client's next round after this step, at the `clients` and at the `server`: its own
            parts, smashed data, the state of optimizers that outlives a round. population: clients of the run.
    """

    client: int
    samples: int
    parameters: dict[str, int]
    weights: int
    gradients: int
    optimizer: int
    activations: int
    forward_flops: int
    backward_flops: int
    step: Bytes
    round: Bytes
    kept: Mapping[str, int]
    population: int

    @property
    def memory(self) -> int:
        """Bytes of weights, gradients, optimizers and activations together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def measure_costs(config: RunConfig, dataset: Dataset | None = None) -> Costs:
    """Let a client of the configured run take one step in the first round.

    Args:
        dataset: the configured one, where it is loaded already.

    Raises:
        ConfigError: what cannot be built as configured.
    """
    return _Metered(replace(config, local_epochs=1, compile=False), dataset).measure()


class _Kept:
    """A tensor that is kept for a backward pass, until the graph lets go of it."""

    def __init__(self, meter: Meter, tensor: Tensor) -> None:
        self.meter, self.tensor = meter, tensor
        meter.keep(tensor)

    def __del__(self) -> None:
        self.meter.forget(self.tensor)


class _Operations(TorchDispatchMode):
    """Counts floating-point operations by torch's own table, of `torch.utils.flop_counter`.

    Its counter keeps hooks in the graph that `torch.autograd.grad` does not allow; this counts each pass separately.
    """

    forward = 0
    backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            operations = count(*args, **kwargs, out_val=output)
            if torch._C._current_graph_task_id() == -1:  # pyright: ignore[reportPrivateUsage]
                self.forward += operations
            else:
                self.backward += operations
        return output


class Meter:
    """What a client computes and keeps while it works.

    Args:
        parts: the client's; their tensors are no activations.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._weights = {_storage(t) for part in parts.values() for t in (*part.parameters(), *part.buffers())}
        self._kept: dict[int, int] = {}  # how often each storage is kept
        self._now = 0
        self._gradients: dict[int, int] = {}
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self.activations = 0
        self.operations = _Operations()

    @contextmanager
    def working(self) -> Generator[None]:
        """What the client does inside is metered; a graph may outlive the block."""
        with ExitStack() as stack:
            stack.enter_context(self.operations)
            stack.enter_context(saved_tensors_hooks(lambda tensor: _Kept(self, tensor), lambda kept: kept.tensor))
            stack.callback(register_optimizer_step_post_hook(self._on_step).remove)
            yield
        self._look(parameter for part in self._parts.values() for parameter in part.parameters())

    def keep(self, tensor: Tensor) -> None:
        """A tensor is kept for a backward pass: its storage counts, once."""
        key = _storage(tensor)
        if key not in self._weights:
            self._kept[key] = self._kept.get(key, 0) + 1
            if self._kept[key] == 1:
                self._now += tensor.untyped_storage().nbytes()
                self.activations = max(self.activations, self._now)

    def forget(self, tensor: Tensor) -> None:
        """It is kept no longer."""
        key = _storage(tensor)
        if key in self._kept:
            self._kept[key] -= 1
            if not self._kept[key]:
                del self._kept[key]
                self._now -= tensor.untyped_storage().nbytes()

    def _on_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._optimizers[id(optimizer)] = optimizer
        self._look(parameter for group in optimizer.param_groups for parameter in group["params"])

    def _look(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                self._gradients[id(parameter)] = parameter.grad.nbytes

    @property
    def gradients(self) -> int:
        """Bytes of all gradients that were seen."""
        return sum(self._gradients.values())

    @property
    def optimizer(self) -> int:
        """Bytes of what the optimizers that took a step keep."""
        entries = (entry for each in self._optimizers.values() for entry in each.state.values())
        return sum(value.nbytes for entry in entries for value in entry.values() if isinstance(value, Tensor))


def _frozen_bytes(parts: Parts) -> int:
    """Bytes of what nothing trains, which no state has; what parts share is there once."""
    frozen = {_storage(each): each for part in parts.values() for _, _, each in frozen_in(part)}
    return sum(each.numel() * each.element_size() for each in frozen.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _MeteredSession:
    """A client's round, metered."""

    def __init__(self, session: Session, meter: Meter) -> None:
        self._session, self._meter = session, meter

    def send(self, message: Reply) -> None:
        self._session.send(message)

    def receive(self) -> Message | Upload:
        with self._meter.working():
            return self._session.receive()

    def close(self) -> None:
        self._session.close()


class _Metered:
    """A round of the configured run in which each client has no more data than a batch."""

    def __init__(self, config: RunConfig, dataset: Dataset | None) -> None:
        self._trial = Trial(*prepared(config, dataset), _a_batch_each)
        self._setup, self._ledger = self._trial.setup, Ledger()

    def measure(self) -> Costs:
        """A round of one client, or of two that go in lockstep, of which the first is metered."""
        sizes = self._setup.partition.sizes
        count = _TOGETHER if self._setup.algorithm.schedule == "lockstep" else 1
        cohort = [int(client) for client in np.argsort(-sizes, kind="stable")[:count]]
        client = cohort[0]
        parts, meter = self._play(cohort)
        step, once = self._traffic(client)
        return Costs(
            client=client,
            samples=int(sizes[client]),
            parameters={name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
            weights=sum(state_bytes(part.state_dict()) for part in parts.values()) + _frozen_bytes(parts),
            gradients=meter.gradients,
            optimizer=meter.optimizer,
            activations=meter.activations,
            forward_flops=meter.operations.forward,
            backward_flops=meter.operations.backward,
            step=step,
            round=once,
            kept=self._trial.kept(client),
            population=self._setup.population,
        )

    def _play(self, cohort: Sequence[int]) -> tuple[Parts, Meter]:
        """A round of the cohort; the first client's parts, and its meter."""
        meters, seats = list[Meter](), self._trial.seats

        def open(client: int) -> Session:
            session = seats.open(client, 0)
            if client != cohort[0]:
                return session
            meters.append(Meter(seats.seats[0].parts))
            return _MeteredSession(session, meters[0])

        self._trial.play([*cohort], 0, Channel(self._ledger), open)
        return seats.seats[0].parts, meters[0]

    def _traffic(self, client: int) -> tuple[Bytes, Bytes]:
        """What has crossed with the client's batch, and the rest."""
        flows = self._setup.algorithm.arrows(self._setup.config.algorithm, 0, before=None)
        with_batch = {flow.kind for flow in flows if flow.per == "batch"}
        step, once = {"up": 0, "down": 0}, {"up": 0, "down": 0}
        for line in self._ledger.close_round(0):
            if line.client == client and line.kind not in CONTROL_KINDS:
                (step if line.kind in with_batch else once)[line.direction] += line.payload
        return step, once


def _a_batch_each(setup: Setup) -> Partition:
    full = configured_shares(setup)
    sizes = np.minimum(full.sizes, setup.config.batch_size)
    order = [full.order[start : start + count] for start, count in zip(full.offsets[:-1], sizes, strict=True)]
    return Partition(np.concatenate(order), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def show_costs(config: RunConfig) -> None:
    """Print the table of `measure_costs`."""
    costs = measure_costs(config)
    table = Table(Column(), Column(justify="right"), box=box.ASCII, show_header=False)
    for section in _sections(costs):
        for name, value in section.items():
            table.add_row(name, value)
        table.add_section()
    title = f"{config.algorithm_name}, {config.model.name}, {config.dataset.name}: a client's step, {_batch(costs)}"
    console = Screen(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(title, table, sep="\n")


def _batch(costs: Costs) -> str:
    return f"{costs.samples} sample{'s' * (costs.samples > 1)}"


def _sections(costs: Costs) -> list[dict[str, str]]:
    memory = ("weights", "gradients", "optimizer", "activations")
    several = costs.parameters if len(costs.parameters) > 1 else {}
    return [
        {
            "parameters": f"{sum(costs.parameters.values()):,}",
            **{f"  {name}": f"{count:,}" for name, count in several.items()},
        },
        {
            "memory": format_bytes(costs.memory),
            **{f"  {name}": format_bytes(getattr(costs, name)) for name in memory},
        },
        {
            "MFLOP": f"{(costs.forward_flops + costs.backward_flops) / 1e6:.2f}",
            "  forward": f"{costs.forward_flops / 1e6:.2f}",
            "  backward": f"{costs.backward_flops / 1e6:.2f}",
        },
        {f"{way} with a batch": format_bytes(size) for way, size in costs.step.items()},
        {f"{way} once a round": format_bytes(size) for way, size in costs.round.items()},
        _kept(costs),
    ]


def _kept(costs: Costs) -> dict[str, str]:
    """What stays between rounds; nothing where nothing does."""
    total = sum(costs.kept.values())
    if not total:
        return {}
    shares = {"the client": "clients", "the server": "server"}
    return {
        "kept for its next round": format_bytes(total),
        **{f"  by {party}": format_bytes(costs.kept[store]) for party, store in shares.items()},
        f"  of {costs.population:,} clients": format_bytes(costs.population * total),
    }
