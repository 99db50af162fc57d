"""The work by pfl: `FederatedAveraging` on a `SimulatedBackend` with users' tensors in memory, as its guides have it.

Several workers are processes that share each cohort over `torch.distributed`, begun by `torchrun`.
"""
# It is installed where this runs, and nowhere else.
# pyright: reportMissingImports=false

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.side import Done
from benchmarks.peers.work import Clock, Counted, Given


class _Module(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.network(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}


class _Told(TrainingProcessCallback):
    def __init__(self, clock: Clock, network: nn.Module) -> None:
        self._clock, self._network = clock, network

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
        self._clock.on_round(self._network.state_dict)
        return False, Metrics()


def run(given: Given, workers: int, clock: Clock) -> Done | None:
    """See ``side.Run``."""
    work, tensors, counted = given.work, given.tensors, Counted()
    module = _Module(given.model())
    counted.attach(module.network)
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    users = [
        PyTorchTensorDataset((tensors["x"][user].clone(), tensors["y"][user].clone()), user_id=str(user))
        for user in range(work.clients)
    ]
    data = FederatedDataset(users.__getitem__, iter(tensors["cohorts"].flatten().tolist()).__next__)
    rounds = work.rounds + 1
    FederatedAveraging().run(
        # What `evaluation_frequency` divides is evaluated: round 0, which is not timed.
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds,
            train_cohort_size=work.cohort,
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data),
        model,
        NNTrainHyperParams(local_batch_size=work.batch, local_num_epochs=1, local_learning_rate=work.lr),
        NNEvalHyperParams(local_batch_size=work.images),
        callbacks=[_Told(clock, module.network)],
    )
    if workers > 1:
        sums = torch.tensor([counted.steps, counted.samples])
        torch.distributed.all_reduce(sums)
        if torch.distributed.get_rank():
            return None
        counted.steps, counted.samples = sums.tolist()
    return Done(module.network.state_dict(), counted, {"pfl": version("pfl")})
