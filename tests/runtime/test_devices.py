"""What is asked of devices that work through a queue, and its other way on a processor, which gives the same."""

from typing import Any

import pytest
import torch

from cutlayer.algorithms import mhmd
from cutlayer.algorithms.mhmd import MHMDConfig, gated_divergence
from cutlayer.datasets import blur as blurring
from cutlayer.datasets import colour
from cutlayer.runtime.ground.devices import moved, queued, read_numbers
from cutlayer.runtime.ground.process import Arithmetic
from cutlayer.runtime.messages.boundary import Upload
from cutlayer.runtime.parties.contexts import Means, read_together
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.schedule import RoundReport
from cutlayer.runtime.scoring import scores
from tests.conftest import play, same, weights


def there(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(module, "queued", lambda device: True)


def test_a_processor_is_not_waited_for() -> None:
    assert not queued(torch.device("cpu"))
    assert queued(torch.device("cuda", 0))
    tensor = torch.arange(3)
    assert moved(tensor, torch.device("cpu")) is tensor


def test_numbers_are_read_as_float_does() -> None:
    values = [torch.tensor(0.1), 2.5, torch.tensor([0.1], dtype=torch.float64), torch.tensor(3), torch.tensor(1 / 3)]
    assert read_numbers(values) == [float(value) for value in values]
    assert read_numbers([]) == []


def test_means_are_those_that_are_read_one_by_one() -> None:
    some, other = Means(), Means()
    for value in (0.1, 0.2, 0.7):
        some.log("loss", torch.tensor(value))
        some.log("plain", value)
        other.log("loss", torch.tensor(value, dtype=torch.float64))
    read = read_together([some, {"own": 0.3}, other])
    assert read == [dict(some), {"own": 0.3}, dict(other)]
    assert some.read() == read[0]


def test_a_round_reports_means_weighted_by_samples() -> None:
    report = RoundReport()
    for client, (samples, loss) in enumerate([(3, 1.0), (1, 2.0), (0, 5.0)]):
        means = Means()
        means.log("loss", torch.tensor(loss))
        report.add(client, Upload({}, samples, means))
    assert report.metrics == {"loss": 1.25}


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("teacher_gradient", [True, False])
@pytest.mark.parametrize("right", [0, 3, 6])
def test_gates_that_weigh_all_samples_give_those_that_leave_some_out(
    monkeypatch: pytest.MonkeyPatch, reduction: Any, teacher_gradient: bool, right: int
) -> None:
    config = MHMDConfig(reduction=reduction, teacher_gradient=teacher_gradient)
    torch.manual_seed(0)
    student, teacher = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = teacher.argmax(1)
    y[right:] = (y[right:] + 1) % 4
    found = []
    for _ in range(2):
        loss = gated_divergence(student, teacher, y, config)
        gradients = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
        found.append([loss, *(torch.zeros(6, 4).double() if each is None else each for each in gradients)])
        there(monkeypatch, mhmd)
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-15)
    assert bool(found[0][0] > 0) == (right > 0)


@pytest.mark.parametrize("chosen", [(), (1, 3), (0, 1, 2, 3)])
def test_images_are_turned_and_blurred_the_same_with_all_others(
    monkeypatch: pytest.MonkeyPatch, chosen: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x, which = 255 * torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.bool)
    which[list(chosen)] = True
    order = torch.stack([torch.randperm(4) for _ in range(4)])
    factors = torch.rand(4, 4) * torch.tensor([1.0, 1.0, 1.0, 0.1])
    deviation = 0.1 + torch.rand(4)
    coloured, blurred = colour.jitter_(x.clone(), order, factors, which), blurring.blur(x, deviation, which)
    there(monkeypatch, colour)
    there(monkeypatch, blurring)
    assert torch.equal(colour.jitter_(x.clone(), order, factors, which), coloured)
    assert torch.equal(blurring.blur(x, deviation, which), blurred)
    assert torch.equal(blurred, x) == (not chosen)


def test_a_device_evaluates_in_larger_batches_to_the_same(configure, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = play(Federation(configure("algorithm=fed_avg", "eval_batch_size=10")))
    before, sizes = federation.evaluate(), list[int]()
    there(monkeypatch, scores)
    whole = scores.larger(10, federation.setup.dataset.test)
    assert whole == (1 << 23) // 64
    gathered = scores._gathered

    def seen(*given: Any) -> Any:
        sizes.append(given[4])
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("too large")
        return gathered(*given)

    federation.evaluator.forget()
    monkeypatch.setattr(scores, "_gathered", seen)
    after = federation.evaluate()
    assert sizes == [whole, 10], "where that is too large, as configured"
    federation.evaluator.forget()
    largest = federation.evaluate()
    assert sizes == [whole, 10, whole]
    assert before == after
    assert largest.accuracy == before.accuracy
    assert largest.loss == pytest.approx(before.loss, rel=1e-6)


def test_tf32_is_what_a_gpu_may_do_and_a_processor_does_not(configure) -> None:
    plain, rough = (configure("algorithm=fed_avg", f"precision={precision}") for precision in ("fp32", "tf32"))
    assert (plain.arithmetic, rough.arithmetic) == (Arithmetic(True, False), Arithmetic(True, True))
    assert not configure("algorithm=fed_avg", "deterministic=false").arithmetic.deterministic
    assert same(weights(play(Federation(plain))), weights(play(Federation(rough))))
    assert plain.identity() != rough.identity()


def test_kernels_of_a_gpu_are_asked_for_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches are there without one."""
    from cutlayer.runtime.ground.process import prepare_process

    modes = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    before = [mode.fp32_precision for mode in modes], torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        for arithmetic in (Arithmetic(), Arithmetic(False, True)):
            prepare_process(torch.device("cuda", 0), arithmetic)
            assert torch.are_deterministic_algorithms_enabled() == arithmetic.deterministic
            assert torch.backends.cudnn.benchmark != arithmetic.deterministic
            assert {mode.fp32_precision for mode in modes} == {"tf32" if arithmetic.tf32 else "ieee"}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.backends.cudnn.benchmark = before[1]
        for mode, precision in zip(modes, before[0], strict=True):
            mode.fp32_precision = precision
