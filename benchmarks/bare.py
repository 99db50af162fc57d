"""The yardstick: rounds written as plain PyTorch loops, with no message, ledger, random stream or store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class WeightedSum:
    """The average of the clients' weights as most scripts write it: a sum of each state times its share."""

    def __init__(self, total: float) -> None:
        self.state: State = {}
        self._total = total

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Add a client's state; integer buffers (batch counts) are those of the client with the most batches."""
        share = weight / self._total
        for name, value in state.items():
            if not value.is_floating_point():
                self.state[name] = torch.maximum(self.state[name], value) if name in self.state else value.clone()
            elif name in self.state:
                self.state[name].add_(value, alpha=share)
            else:
                self.state[name] = value * share


class _Bare:
    """What the bare loops are made of.

    Args:
        parts: by name; all clients take turns to train them.
        make_optimizer: a fresh optimizer of a part.
        autocast: the precision of forward passes, entered once for each.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        make_optimizer: MakeOptimizer,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._parts, self._make_optimizer, self._autocast = parts, make_optimizer, autocast


class BareFedAvg(_Bare):
    """Federated averaging; its one part is ``model``."""

    def round(self, start: Mapping[str, State], cohort: Sequence[Batches]) -> dict[str, State]:
        """One round from the global weights ``start``, by part; returns the next global weights."""
        model = self._parts["model"]
        average = WeightedSum(sum(_samples(batches) for batches in cohort))
        for batches in cohort:
            model.load_state_dict(start["model"])
            optimizer = self._make_optimizer(model)
            for x, y in batches:
                optimizer.zero_grad(set_to_none=True)
                with self._autocast():
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
            average.add(model.state_dict(), _samples(batches))
        return {"model": average.state}


class BareSplit(_Bare):
    """Split learning with one server model, updated in the order of the clients; see ``BareFedAvg``."""

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        make_optimizer: MakeOptimizer,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__(parts, make_optimizer, autocast)
        self._server_optimizer = make_optimizer(parts["server"])

    def round(self, start: Mapping[str, State], cohort: Sequence[Batches]) -> dict[str, State]:
        """One round from the global weights ``start``, by part; returns the next global weights."""
        client, server = self._parts["client"], self._parts["server"]
        server.load_state_dict(start["server"])
        average = WeightedSum(sum(_samples(batches) for batches in cohort))
        for batches in cohort:
            client.load_state_dict(start["client"])
            optimizer = self._make_optimizer(client)
            for x, y in batches:
                self._batch(client, server, optimizer, x, y)
            average.add(client.state_dict(), _samples(batches))
        return {"client": average.state, "server": server.state_dict()}

    def _batch(
        self, client: nn.Module, server: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
    ) -> None:
        with self._autocast():
            z = client(x)
            received = z.detach().requires_grad_()
            loss = F.cross_entropy(server(received), y)
        self._server_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._server_optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        z.backward(received.grad)
        optimizer.step()


def _samples(batches: Batches) -> int:
    return sum(len(y) for _, y in batches)


BARE: dict[str, type[BareFedAvg] | type[BareSplit]] = {"fed_avg": BareFedAvg, "sl_single_server": BareSplit}
