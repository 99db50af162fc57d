"""`python main.py ... --costs`: what a step costs a client of the configured run, measured while one takes it.

A client whose data are a single batch goes through a round, with the server and every message, and what it computes and
keeps meanwhile is metered. Nothing is written.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich import box
from rich.table import Column, Table

from cutlayer.datasets import Dataset, Partition
from cutlayer.runtime.costs.cuts import prepared
from cutlayer.runtime.costs.meter import Meter, frozen_bytes
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
            weights=sum(state_bytes(part.state_dict()) for part in parts.values()) + frozen_bytes(parts),
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
