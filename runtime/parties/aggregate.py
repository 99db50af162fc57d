"""Averaging of what clients upload, in a stream: memory of one state, whatever the size of the cohort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cutlayer.runtime.ground.config import ConfigError

BufferPolicy = Literal["average", "keep_local", "reset"]


@dataclass(frozen=True)
class AggregateConfig:
    """How uploads become the global model.

    weights: ``samples`` (p_i proportional to the client's sample count), ``uniform``, or one weight per client.
    buffers: what happens to BatchNorm statistics and other buffers of the parts that travel. ``average`` sends and
        averages them; ``keep_local`` leaves them with the client; ``reset`` starts each client's round from the initial
        ones. Under the latter two the global model has no statistics of its own, so that evaluation uses each
        test batch's.
    """

    weights: Literal["samples", "uniform"] | tuple[float, ...] = "samples"
    buffers: BufferPolicy = "average"

    def __post_init__(self) -> None:
        if not isinstance(self.weights, str) and not (
            self.weights and min(self.weights) >= 0 and sum(self.weights) > 0
        ):
            raise ConfigError("weights", self.weights, "samples, uniform or one weight >= 0 per client, not all zero")

    def check(self, num_clients: int) -> None:
        """Raises ConfigError if a list of weights does not have one entry per client."""
        if not isinstance(self.weights, str) and len(self.weights) != num_clients:
            raise ConfigError("aggregate.weights", self.weights, f"{num_clients} weights, one per client")

    def weight(self, client: int, samples: int) -> float:
        """The unnormalised weight of a client with ``samples`` training samples."""
        if self.weights == "samples":
            return float(samples)
        return 1.0 if self.weights == "uniform" else float(self.weights[client])  # type: ignore[arg-type]


class Average:
    """A running weighted mean of states (name to tensor), in float32 or wider.

    The mean moves by ``w / W`` of the difference to each new state, which never needs the weights to sum to an exact
    one and leaves a single state as it is. Integer buffers (``num_batches_tracked``) are copied from the state
    in which they are largest, never averaged into a float.
    """

    def __init__(self) -> None:
        self._mean: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._total = 0.0

    def __len__(self) -> int:
        return len(self._mean)

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Take one state into the mean. A weight of zero leaves the mean as it is."""
        if weight == 0:
            return
        self._total += weight
        if not self._mean:
            self._dtypes = {name: tensor.dtype for name, tensor in state.items()}
            self._mean = {name: _wide(tensor) for name, tensor in state.items()}
            return
        if state.keys() != self._mean.keys():
            raise ValueError(f"uploads differ in their tensors: {sorted(state.keys() ^ self._mean.keys())[:3]}")
        share = weight / self._total
        for name, tensor in state.items():
            mean = self._mean[name]
            if mean.is_floating_point():
                mean.lerp_(tensor.to(mean.dtype), share)
            else:
                torch.maximum(mean, tensor, out=mean)

    def result(self) -> dict[str, Tensor]:
        """The mean, in the dtypes that the states had."""
        return {name: mean.to(self._dtypes[name]) for name, mean in self._mean.items()}


def _wide(tensor: Tensor) -> Tensor:
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.to(torch.float32)
    return tensor.detach().clone()
