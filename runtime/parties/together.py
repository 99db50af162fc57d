"""Several clients in a round as one: `ClientContext` for a program that runs once, with `PerClient` tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cutlayer.runtime.ground.devices import moved
from cutlayer.runtime.messages.boundary import Reply, Value
from cutlayer.runtime.parties.blueprint import Blueprint
from cutlayer.runtime.parties.client_data import ClientData, Drawn, images
from cutlayer.runtime.parties.contexts import ClientContext, KeptOptimizers, KeptRows, Seat
from cutlayer.runtime.parties.means import Means
from cutlayer.runtime.parties.optim import PartOptimizer
from cutlayer.runtime.parties.per_client import ApartError, PerClient, apart, repeated, stacked, whole
from cutlayer.runtime.parties.stacked_passes import let_replay
from cutlayer.runtime.parties.store import Row
from cutlayer.tasks import IGNORED

# What these do to an element depends on others of the tensor, so not on those of its client alone.
_NOT_ELEMENTWISE = frozenset({"adafactor", "muon"})

# What optimizers keep of the steps that they have taken, one number for a parameter of any shape.
_COUNTS = frozenset({"step", "mu_product", "eta", "mu"})


def stacked_seat(blueprint: Blueprint, names: Sequence[str], clients: int) -> Seat:
    """A seat for so many clients: parts whose parameters and buffers are tensors of each."""
    parts = blueprint.parts(names)
    for name, part in parts.items():
        _stack(part, clients)
        if blueprint.recorder is not None:
            let_replay(part, blueprint.parts([name])[name], blueprint.recorder)
    return Seat(blueprint, parts, clients=clients)


def _stack(part: nn.Module, clients: int) -> None:
    made: dict[int, PerClient] = {}  # what two modules share is one tensor
    for module in part.modules():
        for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            if id(parameter) not in made:
                own = nn.Parameter(repeated(parameter, clients), requires_grad=parameter.requires_grad)
                made[id(parameter)] = cast(PerClient, own)
            module.register_parameter(name, cast(nn.Parameter, made[id(parameter)]))
        for name, buffer in [*module.named_buffers(recurse=False, remove_duplicate=False)]:
            module._buffers[name] = made.setdefault(id(buffer), repeated(buffer, clients))  # pyright: ignore[reportPrivateUsage]  registered anew it would become persistent


class RowsTogether:
    """The rows that each of several clients keeps, as one row; what is put takes effect with `stage`."""

    def __init__(self, states: Sequence[KeptRows]) -> None:
        self._states = states
        self._staged: dict[str, Row | None] = {}

    def get(self, name: str) -> Row | None:
        """A row; raises ApartError where only some of the clients have it."""
        if name in self._staged:
            return self._staged[name]
        rows = [state.get(name) for state in self._states]
        found = [row for row in rows if row is not None]
        if not found:
            return None
        if len(found) < len(rows) or any(row.keys() != found[0].keys() for row in found):
            raise ApartError(f"only some have kept {name}")
        return {key: stacked([row[key] for row in found]) for key in found[0]}

    def put(self, name: str, row: Mapping[str, Tensor]) -> None:
        """Keep a row of each."""
        self._staged[name] = {
            key: tensor.detach().clone() if isinstance(tensor, PerClient) else repeated(tensor, len(self._states))
            for key, tensor in row.items()
        }

    def drop(self, name: str) -> None:
        """Keep a row of none."""
        self._staged[name] = None

    def stage(self) -> None:
        """Hand each client's part of what was put to its own store."""
        for name, row in self._staged.items():
            for state, own in zip(self._states, taken_apart(row or {}, len(self._states)), strict=True):
                if row is None:
                    state.drop(name)
                else:
                    state.put(name, cast("Mapping[str, Tensor]", own))


class _OptimizerRows:
    """The same of optimizers: their state is ordinary tensors, [clients, ...] of each parameter, and one step count."""

    def __init__(self, rows: RowsTogether, clients: int) -> None:
        self._rows, self._clients = rows, clients

    def get(self, name: str) -> Row | None:
        row = self._rows.get(name)
        return None if row is None else {key: self._of_all(key, tensor) for key, tensor in row.items()}

    def _of_all(self, key: str, tensor: Tensor) -> Tensor:
        """A number (a count of steps) that all have in common, or what belongs to a parameter."""
        if tensor.dim() or key.rpartition("/")[2] not in _COUNTS:
            return whole(tensor)
        values = whole(tensor)
        if bool((values != values[0]).any()):
            raise ApartError("their optimizers have taken different numbers of steps")
        return values[0]

    def put(self, name: str, row: Mapping[str, Tensor]) -> None:
        own = {
            key: tensor.as_subclass(PerClient) if tensor.dim() else repeated(tensor, self._clients)
            for key, tensor in row.items()
        }
        self._rows.put(name, own)

    def drop(self, name: str) -> None:
        self._rows.drop(name)


class _StackedOptimizer(PartOptimizer):
    """Optimizers of torch over clients' parameters, [clients, ...] each: they work on elements, so one is that of all.

    Args:
        of: optimizers over ``ordinary``, which share memory with ``parameters``.
    """

    def __init__(
        self, of: Sequence[torch.optim.Optimizer], parameters: Sequence[Tensor], ordinary: Sequence[nn.Parameter]
    ) -> None:
        super().__init__(of)
        self._parameters, self._ordinary = parameters, ordinary

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _take(self) -> None:
        for own, ordinary in zip(self._parameters, self._ordinary, strict=True):
            ordinary.grad = None if own.grad is None else whole(own.grad)
        super()._take()

    def tensors(self) -> list[Tensor]:
        """What the optimizers keep from step to step."""
        states = (state for each in self._optimizers for state in each.state.values())
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]


class _Data:
    """What a program may know of the data of all of them."""

    def __init__(self, each: Sequence[ClientData]) -> None:
        self.source, self.epochs = each[0].source, each[0].epochs
        self._sizes = {len(data) for data in each}

    def __len__(self) -> int:
        if len(self._sizes) > 1:
            raise ApartError("they have different numbers of samples")
        return next(iter(self._sizes))


class _Frozen:
    """What clients have come to that have no batch any more, while others go on."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(self, clients: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Keep these clients' of tensors [clients, ...]."""
        index = torch.tensor([*clients], device=tensors[0].device)
        self._kept += [(tensor, index, tensor.detach().index_select(0, index)) for tensor in tensors]

    def put_back(self) -> None:
        """Make them what they were."""
        with torch.no_grad():
            for tensor, index, value in self._kept:
                tensor.index_copy_(0, index, value)
        self._kept.clear()


def _filled(values: Tensor, sizes: Sequence[int], instead: Tensor) -> Tensor:
    """Rows of several, ``sizes`` of each, with as many of each as ``instead`` has, whose last ones stand in."""
    return torch.cat([part for own in torch.split(values, [*sizes]) for part in (own, instead[len(own) :])])


class TogetherContext(ClientContext):
    """Clients that take the same steps, as one.

    Args:
        seat: of `stacked_seat`. members: the clients, in order, with steps of the same sizes.

    Attributes:
        seat, members: as given. going: which of them the present step is one of.
        sizes: of their batches in it; empty outside of steps.
    """

    def __init__(self, seat: Seat, members: Sequence[ClientContext]) -> None:
        first, rows = members[0], RowsTogether([member.state for member in members])
        self.members, self.seat = members, seat
        super().__init__(
            seat,
            id=0,
            round=first.round,
            seed=0,
            config=first.config,
            state=rows,
            data=cast(ClientData, _Data([member.data for member in members])),
            steps=first.steps,
            pace=first.pace,
        )
        self.going, self.sizes = [True] * len(members), list[int]()
        self._rows, self._frozen, self._made = rows, _Frozen(), list[_StackedOptimizer]()
        self._counts: dict[str, list[int]] = {}
        self._optimizers = KeptOptimizers(seat.blueprint, _OptimizerRows(rows, len(members)))

    @property
    def id(self) -> int:
        raise ApartError("the program asks for the client's number")

    def optimizer(self, *names: str, label: str = "") -> PartOptimizer:
        parameters: list[Tensor] = []
        ordinary: list[tuple[str, nn.ParameterList]] = []
        for name in names:
            own = [*self.part(name).parameters()]
            parameters += own
            ordinary.append((name, nn.ParameterList(nn.Parameter(whole(w.detach()), w.requires_grad) for w in own)))
        made = self._blueprint.optimizer(cast("list[tuple[str, nn.Module]]", ordinary), self._now)
        optimizers = [made.of(number) for number in range(len(names))]
        for each in optimizers:
            if type(each).__name__.lower() in _NOT_ELEMENTWISE:
                raise ApartError(f"{type(each).__name__.lower()} does not work on elements alone")
        flat = [parameter for _, several in ordinary for parameter in several]
        self._made.append(_StackedOptimizer(optimizers, parameters, flat))
        self._blueprint.schedule(self._made[-1], names, self._now)
        return self._optimizers.carry_on(names, self._made[-1], label)

    def batches(self, stream: str = "batches", epochs: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """A batch of each; where one has fewer than others, its last one again, of which nothing stays.

        A smaller batch than another's is filled up with images of zeros that are labelled `IGNORED`.
        """
        each = [member.data.steps(member.generator(stream), epochs) for member in self.members]
        last: list[Drawn] = []
        self._frozen = _Frozen()
        while True:
            found = [next(steps, None) for steps in each]
            going = [step is not None for step in found]
            if not any(going):
                break
            ended = [index for index, was in enumerate(self.going) if was and not going[index]]
            self.going = going
            if ended:
                self._frozen.keep(ended, self._tensors())
            last = (
                [step for step in found if step is not None]
                if all(going)
                else [step or before for step, before in zip(found, last, strict=True)]
            )
            self.sizes = [len(step.samples) for step in last]
            yield self._filled_up(last)
        self._frozen.put_back()
        self.going, self.sizes = [True] * len(self.members), []

    def _filled_up(self, steps: Sequence[Drawn]) -> tuple[PerClient, PerClient]:
        """The batches of these steps, of up to b samples, as x [b, C, H, W] and y [b, ...] of each client."""
        source, most = self.data.source, max(self.sizes)
        if len({source.places(step.samples) / len(step.samples) for step in steps}) > 1:
            raise ApartError("clients' texts differ in length")
        (x,) = images(source, steps)
        y = moved(source.targets[torch.cat([step.samples for step in steps])], x.device)
        if len(y) < most * len(steps):
            x = _filled(x, self.sizes, x.new_zeros(most, *x.shape[1:]))
            y = _filled(y, self.sizes, y.new_full((most, *y.shape[1:]), IGNORED))
        clients = len(steps)
        x, y = (each.view(clients, most, *each.shape[1:]) for each in (x, y))
        return x.as_subclass(PerClient), y.as_subclass(PerClient)

    def _tensors(self) -> list[Tensor]:
        """All that a step changes: the parts, and what optimizers keep."""
        parts = [tensor for part in self.seat.parts.values() for tensor in part.state_dict().values()]
        kept = [value for each in self._made for value in each.tensors() if value.dim()]
        return [*map(whole, parts), *kept]

    def views(self, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for pairs in zip(*(member.views(sizes) for member in self.members), strict=True):
            yield stacked([one for one, _ in pairs]), stacked([two for _, two in pairs])

    def drawn(self, sizes: Sequence[int]) -> Iterator[Drawn]:
        raise ApartError("the program draws samples of its own")

    def generator(self, stream: str) -> torch.Generator:
        raise ApartError("the program draws random numbers of its own")

    def leave(self) -> None:
        super().leave()
        self._rows.stage()

    def divide(self, fields: Mapping[str, Value]) -> list[dict[str, Value] | None]:
        """Each client's own fields of a message, without what its batch was filled up with; None of those at rest."""
        found: list[dict[str, Value] | None] = []
        for own, going, size in zip(
            taken_apart(fields, len(self.members)), self.going, self._rows_of_batch(), strict=True
        ):
            found.append({name: _cut(value, self._most(), size) for name, value in own.items()} if going else None)
        return found

    def join(self, replies: Sequence[Reply]) -> Reply:
        """The replies to the clients as one, filled up as their batches are."""
        most, sizes = self._most(), self._rows_of_batch()
        return put_together(
            [
                {name: _grown(value, size, most) for name, value in reply.items()}
                for reply, size in zip(replies, sizes, strict=True)
            ]
        )

    def _most(self) -> int:
        return max(self.sizes, default=0)

    def _rows_of_batch(self) -> list[int]:
        return self.sizes or [0] * len(self.members)

    def log(self, name: str, value: Tensor | float) -> None:
        """Report a metric, of those that the present step is one of."""
        if not all(self.going):
            own = whole(value.detach()) if isinstance(value, Tensor) else torch.full((len(self.going),), value)
            value = torch.where(torch.tensor(self.going, device=own.device), own, 0).as_subclass(PerClient)
        self.means.log(name, value)
        before = self._counts.get(name, [0] * len(self.going))
        self._counts[name] = [count + going for count, going in zip(before, self.going, strict=True)]

    def metrics(self) -> list[Means]:
        """Each client's own metrics."""
        found = [Means() for _ in self.members]
        for name, total in self.means.sums.items():
            for own, value, count in zip(found, apart(total, len(found)), self._counts[name], strict=True):
                if count:
                    own.sums[name], own.counts[name] = value, count
        return found


def _cut(value: Value, most: int, size: int) -> Value:
    return value[:size] if isinstance(value, Tensor) and size < most and value.dim() and len(value) == most else value


def _grown(value: Value, size: int, most: int) -> Value:
    if not (isinstance(value, Tensor) and size < most and value.dim() and len(value) == size):
        return value
    return torch.cat([value, value.new_zeros(most - size, *value.shape[1:])])


def taken_apart(payload: Mapping[str, Value], clients: int) -> list[dict[str, Value]]:
    """Each client's own payload."""
    each = {name: apart(value, clients) for name, value in payload.items()}
    return [{name: values[index] for name, values in each.items()} for index in range(clients)]


def put_together(payloads: Sequence[Mapping[str, Value]]) -> Reply:
    """The payloads of several clients as one.

    Raises:
        ApartError: they differ in what is in them, or in a number.
    """
    first, found = payloads[0], dict[str, Value]()
    if any(payload.keys() != first.keys() for payload in payloads):
        raise ApartError("they are told different things")
    for name, value in first.items():
        values = [payload[name] for payload in payloads]
        if isinstance(value, Tensor):
            found[name] = stacked(cast("list[Tensor]", values))
        elif any(each != value for each in values):
            raise ApartError(f"they are told different numbers as {name}")
        else:
            found[name] = value
    return found
