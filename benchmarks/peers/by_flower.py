"""The work by Flower: a `ClientApp` and its `FedAvg` in a `ServerApp`, simulated on Ray with an actor for each worker.

An actor reads the data once and keeps its model, as its guides advise. Telemetry and Ray's statistics are off, see
`places.py`.
"""
# It is installed where this runs, and nowhere else.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn import functional as F

from benchmarks.peers.side import Done
from benchmarks.peers.work import Clock, Counted, Given, Network

client_app = ClientApp()


@cache
def _held(folder: str) -> tuple[Given, Network]:
    """What an actor holds."""
    torch.set_num_threads(1)
    given = Given(Path(folder))
    return given, given.model()


@client_app.train()
def train(message: Message, _: Context) -> Message:
    """A client's round."""
    given, model = _held(str(message.content["config"]["folder"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer, counted = torch.optim.SGD(model.parameters(), lr=given.work.lr), Counted()
    hook = counted.attach(model)
    for x, y in given.batches(int(message.content["config"]["client"])):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    hook.remove()
    metrics = MetricRecord({"num-examples": counted.samples, "steps": counted.steps})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


class _Drawn(FedAvg):
    """FedAvg that tells each node of a round which of the given cohort's clients it is."""

    def __init__(self, given: Given, counted: Counted) -> None:
        work = given.work
        super().__init__(
            fraction_train=work.cohort / work.clients,
            fraction_evaluate=0.0,
            min_train_nodes=work.cohort,
            min_available_nodes=work.clients,
            train_metrics_aggr_fn=self._count,
        )
        self._given, self._counted = given, counted

    def configure_train(self, server_round: int, *others: Any) -> Iterable[Message]:
        cohort = self._given.tensors["cohorts"][server_round - 1].tolist()
        messages = list(super().configure_train(server_round, *others))
        for message, client in zip(messages, cohort, strict=True):
            who = ConfigRecord({"client": client, "folder": str(self._given.folder)})
            message.content = RecordDict({"arrays": message.content["arrays"], "config": who})
        return messages

    def _count(self, replies: list[RecordDict], weight: str) -> MetricRecord:
        self._counted.steps += sum(int(reply["metrics"]["steps"]) for reply in replies)
        self._counted.samples += sum(int(reply["metrics"][weight]) for reply in replies)
        return MetricRecord()


def run(given: Given, workers: int, clock: Clock) -> Done:
    """See ``side.Run``."""
    counted, weights = Counted(), dict[str, torch.Tensor]()
    server_app = ServerApp()

    def on_round(server_round: int, arrays: ArrayRecord) -> None:
        if server_round:  # it is called once before the first
            clock.on_round(arrays.to_torch_state_dict)

    @server_app.main()
    def serve(grid: Grid, _: Context) -> None:
        strategy, start = _Drawn(given, counted), ArrayRecord(given.model().state_dict())
        result = strategy.start(grid, start, num_rounds=given.work.rounds + 1, evaluate_fn=on_round)
        weights.update(result.arrays.to_torch_state_dict())

    run_simulation(
        server_app,
        client_app,
        num_supernodes=given.work.clients,
        backend_config={
            "init_args": {"num_cpus": workers, "_temp_dir": str(given.folder / "ray")},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return Done(weights, counted, {name: version(name) for name in ("flwr", "ray")})
