"""MHMD: its loss against numbers worked out by hand, its gradient by finite differences, its client with FedBABU."""

from dataclasses import replace
from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.algorithms.mhmd import MHMDConfig, gated_divergence, mhmd_loss, tempered
from cutlayer.runtime.rounds.federation import Federation
from tests.conftest import play, same, weights

DEFAULT = MHMDConfig()


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_the_published_defaults() -> None:
    assert MHMDConfig(10.0, 1.0, "per_sample", "both", True, "mean", True) == DEFAULT


def test_temperature_by_hand() -> None:
    """sigmoid(0) = 1/2 doubles the logits; sigmoid(log 3) = 3/4."""
    outputs = logits((1, -2, 0), (3, 6, log(3)))
    assert torch.allclose(tempered(outputs, "per_sample"), logits((2, -4), (4, 8)), rtol=0, atol=1e-12)
    assert torch.allclose(tempered(outputs, 4.0), logits((0.25, -0.5), (0.75, 1.5)), rtol=0, atol=1e-12)


# Two samples of class 0. Teacher: p = (3/4, 1/4) is right, p = (1/5, 4/5) is wrong. Student: (1/2, 1/2) and (1/2, 1/2).
TEACHER, STUDENT, LABELS = logits((log(3), 0), (0, log(4))), logits((0, 0), (5, 5)), torch.tensor([0, 0])
FIRST = 0.75 * log(1.5) + 0.25 * log(0.5)
SECOND = 0.2 * log(0.4) + 0.8 * log(1.6)


@pytest.mark.parametrize(
    ("gate", "reduction", "expected"),
    [
        (True, "sum", FIRST),
        (True, "batchmean", FIRST),
        (True, "mean", FIRST / 2),
        (False, "sum", FIRST + SECOND),
        (False, "batchmean", (FIRST + SECOND) / 2),
        (False, "mean", (FIRST + SECOND) / 4),
    ],
)
def test_divergence_by_hand(gate: bool, reduction: str, expected: float) -> None:
    config = replace(DEFAULT, gate=gate, reduction=reduction)
    assert gated_divergence(STUDENT, TEACHER, LABELS, config).item() == pytest.approx(expected, abs=1e-12)


def test_no_sample_that_the_teacher_gets_right_gives_zero_and_a_graph() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = gated_divergence(student, TEACHER, torch.tensor([1, 0]), DEFAULT)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.equal(gradient, torch.zeros_like(student))


def test_the_whole_loss_by_hand() -> None:
    """One sample of class 0, two auxiliary heads at temperatures 1/2 and 3/4; the second head is wrong.

    final (log 3, 0): p = (3/4, 1/4). First head (log 2 / 2, 0) / (1/2): p = (2/3, 1/3). Second (0, 3/4 log 4) / (3/4):
    p = (1/5, 4/5).
    """
    final, y = logits((log(3), 0)), torch.tensor([0])
    heads = [logits((log(2) / 2, 0, 0)), logits((0, 0.75 * log(4), log(3)))]
    to_first = 0.75 * log(9 / 8) + 0.25 * log(3 / 4)
    to_second = 0.75 * log(15 / 4) + 0.25 * log(5 / 16)
    from_first = 2 / 3 * log(8 / 9) + 1 / 3 * log(4 / 3)
    ce, auxiliary = -log(3 / 4), -log(2 / 3) - log(1 / 5)
    expected = {
        "both": (to_first + to_second + from_first) / 2,
        "to_auxiliary": (to_first + to_second) / 2,
        "to_final": from_first / 2,
        "none": 0.0,
    }
    for distill, value in expected.items():
        config = replace(DEFAULT, distill=distill, distillation_weight=3.0)
        terms = {name: term.item() for name, term in mhmd_loss(final, heads, y, config).items()}
        total = ce + 10 * auxiliary + 3 * value
        assert terms == pytest.approx({"loss": ce, "auxiliary_loss": auxiliary, "distillation": value, "total": total})


@given(seed=st.integers(0, 10_000), distill=st.sampled_from(["both", "to_auxiliary", "to_final"]),
       reduction=st.sampled_from(["mean", "batchmean", "sum"]), gate=st.booleans(),
       temperature=st.sampled_from(["per_sample", 2.0]))  # fmt: skip
def test_gradient_against_finite_differences(seed, distill, reduction, gate, temperature) -> None:
    generator = torch.Generator().manual_seed(seed)
    final = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    heads = [torch.randn(4, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
    y = torch.randint(0, 3, (4,), generator=generator)
    config = replace(DEFAULT, distill=distill, reduction=reduction, gate=gate, temperature=temperature)
    assert torch.autograd.gradcheck(lambda f, *a: mhmd_loss(f, a, y, config)["total"], (final, *heads))


def test_without_teacher_gradient_the_teacher_is_constant() -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    for through in (True, False):
        loss = gated_divergence(student, teacher, LABELS, replace(DEFAULT, teacher_gradient=through, gate=False))
        by_student, by_teacher = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
        # d KL / d student logits is softmax(student) - softmax(teacher), here over two samples and two classes.
        assert torch.allclose(by_student, (student.softmax(1) - teacher.softmax(1)) / 4, atol=1e-12)
        assert (by_teacher is not None) == through


def test_without_its_own_terms_it_is_fed_babu(configure) -> None:
    none = ("algorithm.auxiliary_weight=0", "algorithm.distillation_weight=0", "precision=fp64", "optimizer=sgd")
    ours = play(Federation(configure("algorithm=mhmd", *none)))
    babu = play(Federation(configure("algorithm=fed_babu", "precision=fp64", "optimizer=sgd")))
    for key, value in babu.server.ctx.part("body").state_dict().items():
        assert torch.allclose(ours.server.ctx.part("body").state_dict()[key], value, rtol=1e-10, atol=1e-13), key
    assert ours.ledger.training() == babu.ledger.training(), "auxiliary heads never travel"


def test_heads_never_move_and_blocks_matter(configure) -> None:
    runs = {
        blocks: play(Federation(configure("algorithm=mhmd", "model=cnn2", *more)))
        for blocks, more in {"own": (), "one": ("model.auxiliary_heads.blocks=[relu1]",)}.items()
    }
    for federation in runs.values():
        for name in ("head", "auxiliary_heads"):
            seat = federation.clients.seats[0].parts[name].state_dict()
            assert same(dict(seat), federation.setup.blueprint.initial[name])
    assert not same(weights(runs["own"]), weights(runs["one"]))
