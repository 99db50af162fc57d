"""The gradient of alignment against finite differences and plain double backward passes, for many auxiliary models."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from cutlayer.algorithms.alignment import AlignmentBatch, LinearAlignmentBatch, alignment_batch
from cutlayer.models.layers import FeatureMean, GlobalAvgPool

# Finite differences need smooth functions; norms have an eps of 1 below, without which they are all but steps.
SMOOTH = (nn.Tanh, nn.Softplus, nn.GELU, nn.Sigmoid)
STEP = 1e-4
Sample = tuple[nn.Module, Tensor, Tensor, Tensor]


@st.composite
def vectors(draw: st.DrawFn, *, kink: bool) -> tuple[nn.Sequential, tuple[int, ...], int]:
    """Up to two hidden layers on [b, features], behind a flattening where there are maps: the model but its last layer,
    the shape of a sample, and the width. Norms have an eps of 1, without which they are all but steps."""
    shape = draw(st.sampled_from([(1,), (5,), (2, 3), (3, 2, 2)]))
    width = int(torch.tensor(shape).prod())
    layers: list[nn.Module] = [nn.Flatten()] if len(shape) > 1 or draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        wider = draw(st.integers(1, 4))
        layers.append(nn.Linear(width, wider, bias=draw(st.booleans())))
        layers += draw(st.sampled_from([[], [nn.BatchNorm1d(wider, eps=1)], [nn.LayerNorm(wider, eps=1)]]))
        layers.append(draw(st.sampled_from([*SMOOTH, *([nn.ReLU] if kink else [])]))())
        width = wider
    return nn.Sequential(*layers), shape, width


@st.composite
def maps(draw: st.DrawFn, *, kink: bool) -> tuple[nn.Sequential, tuple[int, ...], int]:
    """A convolution on [b, c, h, w], normalised or not, and a pool; see `vectors`."""
    channels, side, out = draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.integers(1, 4))
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out, draw(st.sampled_from([1, 3])), draw(st.integers(1, 2)), padding=1)
    ]
    layers += draw(st.sampled_from([[], [nn.BatchNorm2d(out, eps=1)], [nn.GroupNorm(1, out, eps=1)]]))
    layers.append(draw(st.sampled_from([*SMOOTH, *([nn.ReLU] if kink else [])]))())
    layers += draw(st.sampled_from([[GlobalAvgPool()], [FeatureMean()], [nn.AdaptiveAvgPool2d(1), nn.Flatten()]]))
    return nn.Sequential(*layers), (channels, side, side), out


@st.composite
def samples(draw: st.DrawFn, *, kink: bool = False) -> Sample:
    """An auxiliary model in double precision, smashed data, labels, and a target."""
    body, shape, width = draw(st.one_of(vectors(kink=kink), maps(kink=kink)))
    classes, size = draw(st.integers(2, 5)), draw(st.integers(3, 6))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model = nn.Sequential(*body, nn.Linear(width, classes)).double()
    for weight in model.parameters():
        nn.init.normal_(weight)
    if len(model) == 1 and draw(st.booleans()):
        (model,) = model
    z = torch.randn(size, *shape, dtype=torch.float64)
    return model, z, torch.randint(classes, (size,)), torch.randn_like(z)


def plain_error(model: nn.Module, z: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The error as it is written, to be differentiated."""
    z = z.clone().requires_grad_()
    (estimate,) = torch.autograd.grad(F.cross_entropy(model(z), y), z, create_graph=True)
    return (estimate - target).square().sum()


def plain_gradients(model: nn.Module, z: Tensor, y: Tensor, target: Tensor) -> list[Tensor | None]:
    error = plain_error(model, z, y, target)
    return list(torch.autograd.grad(error, list(model.parameters()), allow_unused=True))


def moved(model: nn.Module, direction: list[Tensor], by: float) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight, way in zip(twin.parameters(), direction, strict=True):
            weight += by * way
    return twin


@given(samples())
def test_the_slope_along_any_direction_is_that_of_finite_differences(sample: Sample) -> None:
    model, *data = sample
    alignment_batch(model, *data).differentiate()
    pairs = [(torch.randn_like(weight), weight.grad) for weight in model.parameters()]
    direction = [way for way, _ in pairs]

    def central(step: float) -> float:
        above, below = (plain_error(moved(model, direction, by), *data).detach() for by in (step, -step))
        return float(above - below) / (2 * step)

    one, two, four = (central(k * STEP) for k in (1, 2, 4))
    expected = (64 * one - 20 * two + four) / 45  # Richardson's extrapolation, twice
    terms = [way * gradient for way, gradient in pairs if gradient is not None]
    rounding = 1e-12 * float(plain_error(model, *data).detach()) / STEP
    within = 1e-5 * sum(float(term.abs().sum()) for term in terms) + rounding
    assert sum(float(term.sum()) for term in terms) == pytest.approx(expected, rel=0, abs=within)


@given(samples(kink=True))
def test_it_is_that_of_the_plain_double_backward_pass(sample: Sample) -> None:
    """To the bit where there is no closed form; running statistics move by one step as they do there."""
    model, *data = sample
    twin, batch = copy.deepcopy(model), alignment_batch(model, *data)
    batch.differentiate()
    expected = plain_gradients(twin, *data)
    for weight, gradient in zip(model.parameters(), expected, strict=True):
        if isinstance(batch, LinearAlignmentBatch):
            assert gradient is not None
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-11, atol=1e-12)
        else:
            assert (weight.grad is None) == (gradient is None)
            assert gradient is None or torch.equal(weight.grad, gradient)
    for found, wanted in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(found, wanted)


@given(samples(kink=True))
def test_the_error_is_as_it_is_written_and_leaves_the_model_alone(sample: Sample) -> None:
    model, *data = sample
    before = copy.deepcopy(model.state_dict())
    error = float(alignment_batch(model, *data).error())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert error == pytest.approx(float(plain_error(model, *data).detach()), rel=1e-12)


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    layer = nn.Linear(6, 3)
    layer.register_forward_hook(lambda _module, _args, output: 2 * output)
    return layer


def half_frozen() -> nn.Module:
    layer = nn.Linear(6, 3)
    layer.bias.requires_grad_(False)
    return layer


@pytest.mark.parametrize(
    ("model", "linear"),
    [
        (nn.Linear(6, 3), True),
        (nn.Sequential(nn.Linear(6, 3)), True),
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), True),
        (nn.Sequential(nn.Flatten(), nn.Flatten(), nn.Linear(6, 3)), True),
        (nn.Linear(6, 3, bias=False), False),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (4, 6)), nn.Linear(6, 3)), False),
        (nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), False),
        (nn.Sequential(nn.Linear(6, 3), nn.Tanh()), False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), False),
        (Doubling(6, 3), False),
        (hooked(), False),
        (half_frozen(), False),
    ],
)
def test_the_closed_form_is_for_one_linear_layer_alone(model: nn.Module, linear: bool) -> None:
    """Whatever looks like one and is more goes the general way, to the same gradient."""
    torch.manual_seed(0)
    model = model.double()
    z, y = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 2])
    batch = alignment_batch(model, z, y, torch.randn_like(z))
    assert isinstance(batch, LinearAlignmentBatch) == linear
    batch.differentiate()
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    expected = torch.autograd.grad(plain_error(model, z, y, batch.target), learning, allow_unused=True)
    for weight, gradient in zip(learning, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-11, atol=1e-12)


def test_it_takes_the_place_of_what_the_weights_held() -> None:
    torch.manual_seed(0)
    z, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 2])
    for batch in (kind(z) for kind in (lambda z: alignment_batch(nn.Linear(6, 3), z, y, z),
                                       lambda z: AlignmentBatch(nn.Linear(6, 3), z, y, z))):  # fmt: skip
        batch.differentiate()
        first = [weight.grad for weight in batch.model.parameters()]
        batch.differentiate()
        again = [weight.grad for weight in batch.model.parameters()]
        assert all(torch.equal(a, b) and a is not b for a, b in zip(first, again, strict=True))
