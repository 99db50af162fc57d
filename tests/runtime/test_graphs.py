"""Recorded passes give what the part gives, or leave a call to it; on a processor a stand-in replays."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cutlayer import algorithms
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.parties import graphs, recording
from cutlayer.runtime.parties.graphs import PassRecorder, ReplayedForward
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.seats import Seats
from tests.conftest import play, same, weights
from tests.contract.test_contract import CONVOLUTIONS, quick
from tests.runtime.stand_ins import TapeStream


class Net(nn.Module):
    """With running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Pair:
    """A part that replays, and a twin that does not."""

    def __init__(self, part: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.plain = part or Net()
        self.replayed = copy.deepcopy(self.plain)
        self.made: list[TapeStream] = []
        self.recorder = PassRecorder(self._make)
        self.recorder.attach(self.replayed)

    def _make(self, device: torch.device) -> TapeStream:
        self.made.append(TapeStream(device))
        return self.made[-1]

    @property
    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.plain, self.replayed

    def same(self, work: Callable[[nn.Module], Any]) -> None:
        """Both come to the same to the bit, their statistics included."""
        one, other = (work(part) for part in self.both)
        for a, b in zip(_tensors(one), _tensors(other), strict=True):
            assert torch.equal(a, b)
        self.check_state()

    def check_state(self) -> None:
        one, other = (part.state_dict() for part in self.both)
        assert all(torch.equal(one[name], other[name]) for name in one)
        for a, b in zip(*(part.parameters() for part in self.both), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)

    def warm(self, calls: int = 3) -> None:
        """As many steps as lead to a recording."""
        for seed in range(calls):
            self.same(lambda part, seed=seed: step(part, batch(seed)))
        assert len(self.made) == 1


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [tensor for each in found for tensor in _tensors(each)]


def batch(seed: int, size: int = 5) -> Tensor:
    return torch.randn(size, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def step(part: nn.Module, x: Tensor, rate: float = 0.1) -> Tensor:
    """A step of plain descent; what the part gave."""
    part.zero_grad(set_to_none=True)
    output = part(x)
    output.square().sum().backward()
    with torch.no_grad():
        for parameter in part.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    return output.detach()


def test_steps_are_replayed() -> None:
    pair = Pair()
    pair.warm()
    for seed in range(3, 9):
        pair.same(lambda part, seed=seed: step(part, batch(seed)))
    assert len(pair.made) == 1


def test_what_was_given_stays_when_the_next_pass_comes() -> None:
    pair = Pair()
    pair.warm()

    def keeping(part: nn.Module) -> list[Tensor]:
        kept: list[Tensor] = []
        for seed in (7, 8):
            x = batch(seed).requires_grad_()
            for _ in range(3):
                output = part(x)
                gradients = torch.autograd.grad(output.sum(), [x, *part.parameters()])
            kept += [output.detach(), *gradients]
        return kept

    pair.same(keeping)
    assert len(pair.made) == 2, "an input that needs a gradient is another kind"


def test_gradients_of_several_passes_add_up() -> None:
    pair = Pair()
    pair.warm()

    def twice(part: nn.Module) -> None:
        part.zero_grad(set_to_none=True)
        for seed in (4, 5):
            part(batch(seed)).sum().backward()

    for part in pair.both:
        twice(part)
    pair.check_state()


def test_a_second_forward_pass_before_the_firsts_backward_pass() -> None:
    pair = Pair()
    pair.warm()

    def crossed(part: nn.Module) -> list[Tensor]:
        part.zero_grad(set_to_none=True)
        one, two, three = (part(batch(seed)) for seed in (4, 5, 6))
        one.square().sum().backward()
        three.sum().backward()
        two.square().sum().backward()
        return [one.detach(), two.detach(), three.detach()]

    pair.same(crossed)
    assert len(pair.made) == 2, "one more recording, and the third pass is the part's own"
    pair.same(lambda part: step(part, batch(9)))
    assert len(pair.made) == 2


def test_a_pass_that_nobody_comes_back_to_frees_its_recording() -> None:
    pair = Pair()
    pair.warm()
    for part in pair.both:
        for seed in range(4):
            part(batch(seed))
    pair.same(lambda part: step(part, batch(9)))
    assert len(pair.made) == 1


def test_a_backward_pass_again_is_computed_anew() -> None:
    pair = Pair()
    pair.warm()

    def retained(part: nn.Module) -> list[Tensor]:
        part.zero_grad(set_to_none=True)
        output = part(batch(4))
        first = torch.autograd.grad(output.sum(), [*part.parameters()], retain_graph=True)
        other = part(batch(5))
        again = torch.autograd.grad(output.square().sum(), [*part.parameters()])
        return [*first, *again, *torch.autograd.grad(other.sum(), [*part.parameters()])]

    one, other = (retained(part) for part in pair.both)
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    pair.check_state()


def test_gradients_of_gradients_are_those_of_the_part() -> None:
    pair = Pair()
    pair.warm()

    for part in pair.both:
        part.out.bias.requires_grad_(False)

    def penalised(part: nn.Module) -> list[Tensor]:
        x = batch(4).requires_grad_()
        (slope,) = torch.autograd.grad(part(x).square().sum(), x, create_graph=True)
        learning = [parameter for parameter in part.parameters() if parameter.requires_grad]
        return [slope.detach(), *torch.autograd.grad(slope.square().sum(), learning)]

    for _ in range(4):
        for one, other in zip(*map(penalised, pair.both), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
        pair.check_state()
    assert len(pair.made) == 2
    pair.same(lambda part: step(part, batch(5)))
    pair.same(penalised)  # by then it computes as ever


def test_parameters_changed_between_the_passes_are_refused_as_ever() -> None:
    pair = Pair()
    pair.warm()
    output = pair.replayed(batch(4))
    with torch.no_grad():
        for parameter in pair.replayed.parameters():
            parameter += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_another_shape_is_another_recording_and_there_are_not_many() -> None:
    pair = Pair()
    pair.warm()
    for size in (3, 4, 6, 7, 8):
        for seed in range(5):
            pair.same(lambda part, seed=seed, size=size: step(part, batch(seed, size)))
    assert len(pair.made) == graphs._KINDS


def test_a_part_that_learns_in_part_is_another_kind() -> None:
    pair = Pair()
    pair.warm()
    for part in pair.both:
        part.conv.requires_grad_(False)
    for seed in range(4):
        pair.same(lambda part, seed=seed: step(part, batch(seed)))
    assert len(pair.made) == 2
    for part in pair.both:
        part.requires_grad_(False)
    pair.same(lambda part: part(batch(1)))
    x = batch(2)

    def of_input(part: nn.Module) -> Tensor:
        own = x.clone().requires_grad_()
        return torch.autograd.grad(part(own).square().sum(), own)[0]

    for _ in range(4):
        pair.same(of_input)
    assert len(pair.made) == 3


def test_evaluation_and_other_weights_are_the_parts_own() -> None:
    pair = Pair()
    pair.warm()
    with torch.no_grad():
        pair.same(lambda part: part(batch(4)))
    for part in pair.both:
        part.eval()
    pair.same(lambda part: part(batch(4)))
    for part in pair.both:
        part.train()
    others = {name: value + 1 for name, value in pair.plain.named_parameters()}
    for _ in range(4):
        pair.same(lambda part: functional_call(part, others, (batch(4),)))
    buffers = {name: buffer.clone() for name, buffer in pair.plain.named_buffers()}
    for _ in range(4):
        pair.same(lambda part: functional_call(part, {name: b.clone() for name, b in buffers.items()}, (batch(4),)))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            pair.same(lambda part: step(part, batch(4)))
    assert len(pair.made) == 1
    for parameter in pair.replayed.parameters():
        parameter.data = parameter.data.clone()
    pair.same(lambda part: step(part, batch(5)))
    assert len(pair.made) == 1


def test_a_layer_in_evaluation_mode_is_another_kind() -> None:
    pair = Pair()
    pair.warm()
    for part in pair.both:
        part.norm.eval()
    for seed in range(5):
        pair.same(lambda part, seed=seed: step(part, batch(seed)))
    assert len(pair.made) == 2


def test_under_autocast_is_another_kind() -> None:
    pair = Pair()
    pair.warm()
    for seed in range(5):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            pair.same(lambda part, seed=seed: step(part, batch(seed)))
    assert len(pair.made) == 2


def test_hooks_run() -> None:
    pair = Pair()
    pair.warm()
    for module in ("conv", "norm", "out"):
        seen: list[Tensor] = []
        hooks = [
            part.get_submodule(module).register_forward_hook(lambda *given, seen=seen: seen.append(given[-1]))
            for part in pair.both
        ]
        pair.same(lambda part: step(part, batch(4)))
        for hook in hooks:
            hook.remove()
        assert len(seen) == 2
        assert torch.equal(*seen)


def test_copies_compute_by_themselves() -> None:
    pair = Pair()
    pair.warm()
    first, second = copy.deepcopy(pair.replayed), copy.deepcopy((pair.replayed, 1))[0]
    for twin in (first, second, copy.deepcopy(first)):
        assert not isinstance(twin.forward, ReplayedForward)
        step(twin, batch(4), rate=1.0)
        assert not torch.equal(twin.out.weight, pair.replayed.out.weight)
    pair.check_state()
    assert len(pair.made) == 1


def test_weights_in_another_order_in_memory() -> None:
    pair = Pair(Net().to(memory_format=torch.channels_last))
    assert not pair.replayed.conv.weight.is_contiguous()
    for seed in range(6):
        pair.same(lambda part, seed=seed: step(part, batch(seed).contiguous(memory_format=torch.channels_last)))
    assert len(pair.made) == 1
    assert pair.replayed.conv.weight.grad.stride() == pair.replayed.conv.weight.stride()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3), nn.Dropout(0.5)), "draws random numbers"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3), nn.Linear(3, 3)), None),
    ],
)
def test_what_cannot_be_recorded_computes_as_ever(
    make: Callable[[], nn.Module], reason: str | None, caplog: Any
) -> None:
    torch.manual_seed(0)
    part = make()
    if reason is None:
        part.unused = nn.Parameter(torch.ones(1))
        reason = "cannot be recorded (RuntimeError: "
    pair = Pair(part)
    for seed in range(6):
        found = []
        for each in pair.both:
            torch.manual_seed(seed)
            found.append(step(each, batch(seed)))
            found.append(torch.rand(1))
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3]), "numbers are drawn on from where they were"
        pair.check_state()
    (record,) = caplog.records
    assert reason in record.getMessage()


def test_a_recording_is_tried_twice(caplog: Any) -> None:
    class Settling(TapeStream):
        fails = 1

        def record(self, work: Any, *, large: bool = False) -> Any:
            type(self).fails -= 1
            if self.fails >= 0:
                raise RuntimeError("a library is initialised")
            return super().record(work, large=large)

    for Settling.fails, recorded in ((1, True), (2, False)):
        pair = Pair()
        pair.recorder._make_stream = Settling
        for seed in range(6):
            pair.same(lambda part, seed=seed: step(part, batch(seed)))
        assert bool(pair.recorder._made) == recorded
        assert len(caplog.records) == (not recorded)
    assert "cannot be recorded (RuntimeError: a library is initialised), and computes without" in caplog.text


def test_recordings_of_all_parts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_IN_ALL", 2)
    made: list[TapeStream] = []

    def make(device: torch.device) -> TapeStream:
        made.append(TapeStream(device))
        return made[-1]

    recorder, parts = PassRecorder(make), [Net() for _ in range(4)]
    for part in parts:
        recorder.attach(part)
        for seed in range(4):
            step(part, batch(seed))
    assert len(made) == 2


KEPT = "sgd optimizer.momentum=0.9 optimizer.keep=run scheduler=cosine"
APART = {"scaffold", "per_fed_avg", "fed_prox", "fl_moco", "mhmd", "moco_sfl"}
"""Methods whose steps are along gradients that they make themselves or that come by several ways, or are too few."""


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        *((name, "sgd" if name == "scaffold" else "adam") for name in algorithms.names()),
        *((name, KEPT) for name in ("fed_avg", "fed_rep", "sl_single_server", "sl_multi_server", "fsl_sage")),
    ],
)
def test_methods_come_to_the_same(configure, monkeypatch: pytest.MonkeyPatch, name: str, optimizer: str) -> None:
    setting = (f"algorithm={name}", *quick(name), *CONVOLUTIONS, "batch_size=20", "num_clients=2", "rounds=3")
    setting += ("dataset.fraction=0.25", *f"optimizer={optimizer}".split(), "lr=0.01", "+optimizer.fused=true")
    plain = play(Federation(configure(*setting)))
    monkeypatch.setitem(recording.STREAMS, "cpu", TapeStream)
    for count in ("recorded", "replayed", "passes"):
        monkeypatch.setattr(TapeStream, count, 0)
    replayed = play(Federation(configure(*setting, "compile=true")))
    assert same(weights(plain), weights(replayed))
    assert TapeStream.replayed > TapeStream.passes > 0
    assert (TapeStream.recorded > TapeStream.passes) == (name not in APART), "steps are recorded too"


def test_a_processor_refuses(configure) -> None:
    with pytest.raises(ConfigError, match="compile=true: expected false on a processor"):
        Federation(configure("algorithm=fed_avg", "compile=true"))


@pytest.mark.parametrize(
    "name", ["fed_avg", "fed_prox", "scaffold", "ditto", "fed_babu", "per_fed_avg", "cse_fsl", "sl_multi_server"]
)
@pytest.mark.parametrize("keys", [(), (*CONVOLUTIONS, "batch_size=60")], ids=["mlp", "normalised over the batch"])
def test_clients_computed_as_one_are_replayed_as_one(
    configure, monkeypatch: pytest.MonkeyPatch, name: str, keys: tuple[str, ...]
) -> None:
    monkeypatch.setitem(recording.STREAMS, "cpu", TapeStream)
    monkeypatch.setattr(TapeStream, "replayed", 0)
    monkeypatch.delattr(Seats, "open")  # none computes by itself
    setting = (f"algorithm={name}", *keys, "optimizer=sgd", "lr=0.05", "dataset.fraction=0.4", "batch_size=60")
    setting += ("num_clients=3", "cohort.together=3", "precision=fp64", "dataset.drop_last=always")
    plain, replayed = (play(Federation(configure(*setting, f"compile={on}"))) for on in ("false", "true"))
    assert TapeStream.replayed > 0
    one, other = weights(plain), weights(replayed)
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-10, atol=1e-12)


def test_recordings_stay_in_their_process() -> None:
    pair = Pair()
    pair.warm()
    recorder = pair.replayed.forward._recorder
    recorder._make_stream = TapeStream
    assert len(recorder._made) == 1
    assert not pickle.loads(pickle.dumps(recorder))._made
