"""Recorded steps give what the optimizers give, or leave a step to them; on a processor a stand-in replays."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cutlayer.algorithms.alignment import AlignmentBatch
from cutlayer.runtime.parties.graphs import PassRecorder
from cutlayer.runtime.parties.optim import PartOptimizer, load_optimizer, optimizer_tensors
from tests.runtime.stand_ins import TapeStream
from tests.runtime.test_graphs import Net, batch

LABELS = torch.tensor([0, 1, 2, 1, 0])
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "nesterov, fused": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "fused": True}),
    "adam, fused": (torch.optim.Adam, {"fused": True}),
    "amsgrad, fused": (torch.optim.Adam, {"fused": True, "amsgrad": True}),
    "adamw, fused": (torch.optim.AdamW, {"fused": True, "weight_decay": 0.1}),
}
READING = {
    "adam": (torch.optim.Adam, {}),
    "rmsprop, centred": (torch.optim.NAdam, {}),
    "adafactor": (torch.optim.Adafactor, {}),
}


class Stream(TapeStream):
    """Counts for one test."""


class Pair:
    """Parts with optimizers, as they compute, and their twins that replay."""

    def __init__(self, *parts: nn.Module) -> None:
        torch.manual_seed(0)
        self.plain = parts or (Net(),)
        self.others = copy.deepcopy(self.plain)
        self.recorder = PassRecorder(Stream)
        for part in self.others:
            self.recorder.attach(part)

    def optimizers(self, kind: Any, rate: float = 0.05, **options: Any) -> tuple[PartOptimizer, PartOptimizer]:
        """A fresh one of each side."""
        one, other = ([kind(part.parameters(), lr=rate, **options) for part in side] for side in self.sides)
        return PartOptimizer(one), PartOptimizer(other, self.recorder)

    @property
    def sides(self) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
        return self.plain, self.others

    def same(self, optimizers: tuple[PartOptimizer, PartOptimizer], work: Callable[..., Any]) -> None:
        """Both sides come to the same to the bit: weights, gradients, statistics, what optimizers keep."""
        for side, optimizer in zip(self.sides, optimizers, strict=True):
            work(optimizer, *side)
        for one, other in zip(*self.sides, strict=True):
            _equal(one.state_dict(), other.state_dict())
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None)
                assert a.grad is None or torch.equal(a.grad, b.grad)
        for number in range(len(self.plain)):
            _equal(*(optimizer_tensors(optimizer.of(number)) for optimizer in optimizers))

    def steps(self, optimizers: tuple[PartOptimizer, PartOptimizer], count: int = 5, work: Any = None) -> int:
        """So many steps; how many recordings were replayed in the last one, and none was made by then."""
        for seed in range(count):
            Stream.replayed = Stream.recorded = 0
            self.same(optimizers, lambda *given, seed=seed: (work or descend)(*given, seed))
        assert count == 1 or Stream.recorded == 0
        return Stream.replayed


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def descend(optimizer: PartOptimizer, part: nn.Module, seed: int) -> None:
    optimizer.update(F.cross_entropy(part(batch(seed)), LABELS))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_client_after_client(name: str) -> None:
    pair, (kind, options) = Pair(), OPTIMIZERS[name]
    assert [pair.steps(pair.optimizers(kind, **options)) for _ in range(3)] == [3, 3, 3]
    optimizers = pair.optimizers(kind, **options)
    assert pair.steps(optimizers, 1) == (3 if name == "sgd" else 2), "one that keeps something begins by itself"
    assert pair.steps(optimizers, 1) == 3, "and is replayed from the recording of those before it"


@pytest.mark.parametrize("name", READING)
def test_what_cannot_be_recorded_steps_as_ever(name: str, caplog: Any) -> None:
    pair, (kind, options) = Pair(), READING[name]
    assert pair.steps(pair.optimizers(kind, **options), 6) == 2
    pair.recorder.stream_of_steps = pytest.fail  # it is not tried again
    assert pair.steps(pair.optimizers(kind, **options), 6) == 2
    (record,) = caplog.records
    assert f"compile: a step of {kind.__name__.lower()} cannot be recorded (RuntimeError: " in record.getMessage()
    assert "reads a value" in record.getMessage()


def test_a_number_that_python_holds_is_not_recorded() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    count = self.state[parameter].get("count", 0) + 1
                    self.state[parameter]["count"] = count
                    if parameter.grad is not None:
                        parameter.grad.div_(count)
            return super().step(closure)

    pair = Pair()
    assert pair.steps(pair.optimizers(Counting), 6) == 2


def test_a_state_that_is_made_anew_is_not_recorded(caplog: Any) -> None:
    class Renewing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for parameter in self.param_groups[0]["params"]:
                before = self.state[parameter].get("mean", torch.zeros_like(parameter))
                self.state[parameter]["mean"] = before * 0.5 + parameter.detach()
                if parameter.grad is not None:
                    parameter.grad.add_(self.state[parameter]["mean"])
            return super().step(closure)

    pair = Pair()
    assert pair.steps(pair.optimizers(Renewing), 6) == 2
    assert "made anew in each step" in caplog.text


def test_what_an_optimizer_keeps_elsewhere_is_not_recorded(caplog: Any) -> None:
    """As Adagrad does on a GPU: the numbers of its steps are on the processor, and no recording counts them."""

    class Elsewhere(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter].setdefault("steps", torch.zeros((), device="meta"))
            return super().step(closure)

    pair = Pair()
    optimizers = pair.optimizers(Elsewhere)
    for side, optimizer in zip(pair.sides, optimizers, strict=True):
        for seed in range(6):
            descend(optimizer, *side, seed)
    _equal(*(side[0].state_dict() for side in pair.sides))
    assert "keeps tensors elsewhere" in caplog.text
    batches = {part: aligned(part, 1) for side in pair.sides for part in side}
    other = PartOptimizer([optimizers[1].of(0)], pair.recorder)
    Stream.recorded = 0
    for _ in range(5):
        other.step(batches[pair.others[0]].differentiate)
    assert Stream.recorded == 0


@pytest.mark.parametrize("name", ["momentum", "adam, fused"])
def test_rates_and_states_that_change(name: str) -> None:
    pair, (kind, options) = Pair(), OPTIMIZERS[name]
    optimizers = pair.optimizers(kind, **options)
    assert pair.steps(optimizers) == 3
    for rate in (0.01, 0.05, 0.0, 0.3, 0.2, 0.1):
        for each in optimizers:
            each.set([{"lr": rate}])
        assert pair.steps(optimizers) == 3
    kept = [{k: v.clone() for k, v in optimizer_tensors(each.of(0)).items()} for each in optimizers]
    assert pair.steps(optimizers) == 3
    for each, state in zip(optimizers, kept, strict=True):
        load_optimizer(each.of(0), state)
    assert pair.steps(optimizers, 1) == 3, "a state that is loaded is brought to where recordings work"
    for each in optimizers:
        each.load_state_dict(copy.deepcopy(each.state_dict()))
    assert pair.steps(optimizers, 1) == 3
    for each in optimizers:
        each.renew(0)
    assert pair.steps(optimizers, 1) == 2
    assert pair.steps(optimizers, 1) == 3


def test_optimizers_that_take_turns_keep_what_is_theirs() -> None:
    pair, (kind, options) = Pair(), OPTIMIZERS["adam, fused"]
    one, other = (pair.optimizers(kind, rate, **options) for rate in (0.05, 0.02))
    assert [pair.steps(optimizers) for optimizers in (one, other)] == [3, 3]
    for _ in range(3):
        assert [pair.steps(optimizers, 2) for optimizers in (one, other)] == [3, 3]
    for a, b in (one, other):
        _equal(optimizer_tensors(a.of(0)), optimizer_tensors(b.of(0)))


def test_gradients_stay_when_the_next_step_comes() -> None:
    pair = Pair()
    optimizers = pair.optimizers(torch.optim.SGD)
    assert pair.steps(optimizers) == 3
    held = [[parameter.grad for parameter in part.parameters()] for (part,) in pair.sides]
    assert pair.steps(optimizers, 1) == 3
    for a, b in zip(*held, strict=True):
        assert torch.equal(a, b)


def anchored(optimizer: PartOptimizer, part: nn.Module, seed: int) -> None:
    """A gradient comes to the parameters by another way too."""
    optimizer.update(F.cross_entropy(part(batch(seed)), LABELS) + sum(w.square().sum() for w in part.parameters()))


def twice(optimizer: PartOptimizer, part: nn.Module, seed: int) -> None:
    """The part is passed through twice."""
    optimizer.update(sum(F.cross_entropy(part(batch(number)), LABELS) for number in (seed, seed + 1)))


def adding(optimizer: PartOptimizer, part: nn.Module, seed: int) -> None:
    """The gradients add to others."""
    optimizer.zero_grad()
    part(batch(seed + 1)).sum().backward()
    optimizer.update(F.cross_entropy(part(batch(seed)), LABELS), reset=False)


def hooked(optimizer: PartOptimizer, part: nn.Module, seed: int) -> None:
    """Someone changes a gradient."""
    hook = next(part.parameters()).register_hook(lambda gradient: gradient * 2)
    optimizer.update(F.cross_entropy(part(batch(seed)), LABELS))
    hook.remove()


def moved(optimizer: PartOptimizer, part: nn.Module, seed: int) -> None:
    """The parameters leave the memory that they were in, between forward and backward pass."""
    loss = F.cross_entropy(part(batch(seed)), LABELS)
    for parameter in part.parameters():
        parameter.data = parameter.data.clone()
    optimizer.update(loss)


@pytest.mark.parametrize("work", [anchored, twice, adding, hooked, moved])
def test_what_is_not_certain_to_be_the_same_is_computed(work: Callable[..., None]) -> None:
    pair = Pair()
    optimizers = pair.optimizers(torch.optim.SGD, momentum=0.9, fused=True)
    assert pair.steps(optimizers) == 3
    assert pair.steps(optimizers, 4, work) in (0, 2, 4)
    if work is not moved:
        assert pair.steps(optimizers, 1) == 3


def test_a_pass_that_waits_is_refused_after_a_recorded_step() -> None:
    pair = Pair()
    optimizers = pair.optimizers(torch.optim.SGD)
    pair.steps(optimizers)
    ((part,), optimizer) = (pair.others, optimizers[1])
    waiting = part(batch(8))
    for _ in range(3):
        descend(optimizer, part, 9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        waiting.sum().backward()


def test_parts_one_after_the_other_and_one_that_does_not_learn() -> None:
    torch.manual_seed(1)
    pair = Pair(Net(), nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 3))
    optimizers = pair.optimizers(torch.optim.Adam, fused=True)

    def through(optimizer: PartOptimizer, first: nn.Module, second: nn.Module, third: nn.Module, seed: int) -> None:
        optimizer.update(F.cross_entropy(third(second(first(batch(seed)))), LABELS))

    assert pair.steps(optimizers, 6, through) == 9
    for side in pair.sides:
        side[1].requires_grad_(False)
    assert pair.steps(optimizers, 6, through) < 9, "an optimizer of what does not learn steps nothing, by itself"

    def without(optimizer: PartOptimizer, first: nn.Module, second: nn.Module, third: nn.Module, seed: int) -> None:
        recorder = pair.recorder if first is pair.others[0] else None
        own = optimizers_of.setdefault(first, PartOptimizer([optimizer.of(0), optimizer.of(2)], recorder))
        own.update(F.cross_entropy(third(second(first(batch(seed)))), LABELS))

    optimizers_of: dict[nn.Module, PartOptimizer] = {}
    assert pair.steps(optimizers, 6, without) == 8, "two steps, and six passes"


def test_along_a_gradient_and_at_the_other_side_of_a_cut() -> None:
    torch.manual_seed(2)
    pair = Pair(Net(), nn.Linear(3, 3))
    clients = [PartOptimizer([torch.optim.SGD(side[0].parameters(), 0.1)], recorder)
               for side, recorder in zip(pair.sides, (None, pair.recorder), strict=True)]  # fmt: skip
    servers = [PartOptimizer([torch.optim.SGD(side[1].parameters(), 0.1)], recorder)
               for side, recorder in zip(pair.sides, (None, pair.recorder), strict=True)]  # fmt: skip
    for seed in range(6):
        Stream.replayed, received = 0, list[Tensor]()
        for (client, server), own, other in zip(pair.sides, clients, servers, strict=True):
            z = client(batch(seed))
            crossed = z.detach().clone().requires_grad_()
            other.update(F.cross_entropy(server(crossed), LABELS))
            own.update(z, crossed.grad)
            received.append(crossed.grad)
        assert torch.equal(*received)
        for one, twin in zip(*pair.sides, strict=True):
            _equal(one.state_dict(), twin.state_dict())
    assert Stream.replayed == 6


def aligned(model: nn.Module, seed: int) -> AlignmentBatch:
    z = batch(seed)
    return AlignmentBatch(model, z, LABELS, torch.full_like(z, 0.01 * seed))


@pytest.mark.parametrize("name", [*OPTIMIZERS, *READING])
def test_closures_are_recorded_with_their_steps(name: str, caplog: Any) -> None:
    pair, (kind, options) = Pair(), {**OPTIMIZERS, **READING}[name]
    for _ in range(2):
        optimizers = pair.optimizers(kind, **options)
        batches = {part: [aligned(part, seed) for seed in (1, 2)] for side in pair.sides for part in side}

        def work(optimizer: PartOptimizer, part: nn.Module, seed: int, batches: Any = batches) -> None:
            for each in batches[part]:
                optimizer.step(each.differentiate)

        assert pair.steps(optimizers, 6, work) == (0 if name in READING else 2)
        for each in optimizers:
            each.set([{"lr": 0.01}])
        assert pair.steps(optimizers, 1, work) == 0
        assert pair.steps(optimizers, 4, work) == (0 if name in READING else 2)
        for each in optimizers:
            each.renew(0)
        pair.steps(optimizers, 4, work)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (name in READING)
    assert all("reads a value" in text for text in said)


def test_closures_that_draw_are_computed(caplog: Any) -> None:
    pair = Pair(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, 3)))
    optimizers = pair.optimizers(torch.optim.SGD)
    batches = {part: aligned(part, 1) for side in pair.sides for part in side}

    def work(optimizer: PartOptimizer, part: nn.Module, seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.step(batches[part].differentiate)

    assert pair.steps(optimizers, 6, work) == 0
    assert "a step of sgd draws random numbers" in caplog.text
