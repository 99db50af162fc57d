"""The work by Cutlayer, as `python main.py` would do it, without evaluation; and what all sides are given."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.peers.side import Done
from benchmarks.peers.work import CLASSES, IMAGE, Clock, Counted, Given, Work
from cutlayer.runtime.ground.process import prepare_process
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.local_clients import LocalClients
from cutlayer.runtime.workers.clients import WorkerClients


def keys(work: Work, workers: int) -> list[str]:
    """The keys of the run; images stay in their order, as the peers leave them."""
    channels, height, width = IMAGE
    sizes = {"n_train": work.clients * work.images, "n_test": work.tests, "classes": CLASSES}
    sizes |= {"channels": channels, "height": height, "width": width}
    return [
        *("algorithm=fed_avg", "model=cnn2", "device=cpu", "threads=1", f"workers={workers}"),
        *(
            "dataset=synthetic",
            "dataset.shuffle=false",
            "dataset.drop_last=never",
            f"dataset.client_samples={work.images}",
        ),
        *(f"dataset.options.{key}={value}" for key, value in sizes.items()),
        *(f"num_clients={work.clients}", f"frac={work.cohort / work.clients}", f"batch_size={work.batch}"),
        *("optimizer=sgd", f"lr={work.lr}", "rounds=1000000", "eval_interval=1000000"),
    ]


def give(folder: Path, work: Work) -> Given:
    """Write what all sides are given: the data, cohorts and initial weights of Cutlayer's run."""
    setup = Federation(load_config(keys(work, workers=1))).setup
    train = [
        next(setup.dataset.train.batches(setup.partition.indices(client), batch_size=work.images))
        for client in range(work.clients)
    ]
    test_x, test_y = next(setup.dataset.test.batches(torch.arange(work.tests), batch_size=work.tests))
    return Given.write(
        folder,
        work,
        {
            "x": torch.stack([x for x, _ in train]),
            "y": torch.stack([y for _, y in train]),
            "test_x": test_x,
            "test_y": test_y,
            "cohorts": torch.tensor([setup.cohort(round) for round in range(work.rounds + 1)]),
            **{f"model/{name}": tensor for name, tensor in setup.blueprint.initial["model"].items()},
        },
    )


def run(given: Given, workers: int, clock: Clock) -> Done:
    """See ``side.Run``. What is at workers cannot be counted here: it is what the rounds' clients have uploaded."""
    work, counted = given.work, Counted()
    config = load_config(keys(work, workers))
    prepare_process(torch.device("cpu"))
    federation = Federation(config, clients=LocalClients if workers == 1 else WorkerClients)
    clients, model = federation.clients, federation.server.ctx.part("model")
    if isinstance(clients, LocalClients) and workers == 1:
        counted.attach(clients.seat().parts["model"])
    try:
        for cohort in given.tensors["cohorts"].tolist():
            record, _ = federation.step()
            clock.on_round(model.state_dict)
            if workers > 1:
                assert record.clients == len(cohort)
                counted.steps += sum(len(federation.setup.steps(client)) for client in cohort)
                counted.samples += sum(sum(federation.setup.steps(client)) for client in cohort)
    finally:
        if isinstance(clients, WorkerClients):
            clients.close()
    return Done(model.state_dict(), counted, {})
