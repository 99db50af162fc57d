"""A `PerClient` computes for each client what torch computes for one, forward and backward, or refuses."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.runtime.parties.optim import OPTIMIZERS, load_optimizer, optimizer_tensors
from cutlayer.runtime.parties.per_client import ApartError, PerClient, apart, stacked, unfolded_conv2d, whole
from cutlayer.runtime.parties.together import _NOT_ELEMENTWISE, RowsTogether, _OptimizerRows  # pyright: ignore[reportPrivateUsage]

CLIENTS = 3
Function = Callable[[Tensor, Tensor], Tensor]
Y = torch.tensor([0, 3, -100])
# Of x [3, 4] and w [4, 4].
FUNCTIONS: dict[str, Function] = {
    "operators": lambda x, w: (2 - x / 3) @ w - x * 0.5 + (-x),
    "sums": lambda x, w: x.sum() + w.mean(0).square().sum() - x.amax(),
    "shapes": lambda x, w: x.reshape(x.shape[0] * 2, -1) * len(x) + x.numel() + x.dim() + w.size(1),
    "indices": lambda x, w: x[:2, 1] + w[0, :2] + x.unbind(1)[0][:2],
    "joined": lambda x, w: torch.cat([x, w[:1]]) + torch.stack([x[0], x[1], x[2], w[3]]),
    "divided": lambda x, w: sum((each.sum() * i for i, each in enumerate(torch.split(x @ w, [1, 2]))), x.new_zeros(())),
    "largest": lambda x, w: torch.max(x @ w, dim=1)[0] + (x @ w).topk(2, dim=1).values.sum(1),
    "linear": lambda x, w: functional.linear(x, w, w[0]),
    "losses": lambda x, w: functional.cross_entropy(x @ w, Y) + functional.mse_loss(x, x @ w),
    "softmax": lambda x, w: functional.kl_div(x.log_softmax(1), (x @ w).softmax(1), reduction="batchmean"),
    "normalised": lambda x, w: functional.layer_norm(x, [4], w[0], w[1]) + functional.relu(x),
    "choice": lambda x, w: torch.where(x > 0, x, x @ w) + x.clamp(min=0.1),
    "nested": lambda x, w: torch.einsum("bi,ij->bj", x, w) + torch.nn.functional.pad(x, (1, 0))[:, :4],
    "in place": lambda x, w: (x @ w).mul_(2).add_(x, alpha=3).lerp_(x, 0.25),
    "gradient": lambda x, w: torch.autograd.grad((x @ w).square().sum(), x, create_graph=True)[0],
}
THOUSANDTHS = st.integers(-2000, 2000)


def tensors(draw: st.DataObject, *shape: int) -> list[Tensor]:
    drawn = draw.draw(arrays(np.int64, (CLIENTS, *shape), elements=THOUSANDTHS))
    return [*torch.from_numpy(drawn / 1000)]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=30)
@given(data=st.data())
def test_a_function_and_its_gradient_are_those_of_each(name: str, data: st.DataObject) -> None:
    function, own = FUNCTIONS[name], [tensors(data, 3, 4), tensors(data, 4, 4)]
    alone: list[tuple[Tensor, ...]] = []
    for x, w in zip(*own, strict=True):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        result = function(*leaves)
        found = torch.autograd.grad(result.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        alone.append((result, *found))
    leaves = [stacked(each).requires_grad_() for each in own]
    result = function(*leaves)
    assert isinstance(result, PerClient)
    assert result.shape == alone[0][0].shape
    found = torch.autograd.grad(result.square().sum(), leaves, allow_unused=True, materialize_grads=True)
    for together, single in zip((result, *found), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole(together.detach()), torch.stack([each.detach() for each in single]))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: functional.dropout(x),
        lambda x: x + torch.rand_like(x),
        lambda x: torch.equal(x, x),
        lambda x: torch.add(x, x, out=torch.empty(3, 4, dtype=torch.float64)),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
    ],
)
def test_what_is_not_one_computation_is_refused(function: Callable[[Tensor], object]) -> None:
    with pytest.raises(ApartError):
        function(stacked([torch.randn(3, 4, dtype=torch.float64) for _ in range(CLIENTS)]))


def test_tensors_of_different_shapes_or_types_are_refused() -> None:
    for other in (torch.zeros(2), torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(ApartError, match="different shapes or types"):
            stacked([torch.zeros(3), other])


def test_taken_apart_each_has_its_own() -> None:
    each = [torch.randn(2) for _ in range(CLIENTS)]
    assert all(torch.equal(*pair) for pair in zip(apart(stacked(each), CLIENTS), each, strict=True))
    assert apart(0.5, CLIENTS) == [0.5] * CLIENTS


def test_a_backward_pass_gives_each_leaf_its_gradient() -> None:
    own = [torch.randn(3, 4) for _ in range(CLIENTS)]
    leaf = nn.Parameter(stacked(own))
    torch.autograd.backward((leaf * leaf).sum())
    assert isinstance(leaf.grad, PerClient)
    torch.testing.assert_close(whole(leaf.grad), 2 * torch.stack(own))
    twin = copy.deepcopy(leaf)
    assert isinstance(twin, PerClient)
    assert twin.shape == (3, 4)
    assert twin.data_ptr() != leaf.data_ptr()


@given(data=st.data())
def test_an_unfolded_convolution_is_a_convolution(data: st.DataObject) -> None:
    """Values and gradients, for all sizes, steps and borders."""
    kernel, stride, padding, dilation = (
        tuple(data.draw(st.integers(low, high)) for _ in range(2)) for low, high in ((1, 3), (1, 3), (0, 2), (1, 2))
    )
    channels, out, batch = (data.draw(st.integers(1, 3)) for _ in range(3))
    made = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).requires_grad_()

    x, weight = random(batch, channels, 7, 8), random(out, channels, *kernel)
    bias = random(out) if data.draw(st.booleans()) else None
    leaves = [x, weight, *([] if bias is None else [bias])]
    ours, theirs = (
        function(x, weight, bias, stride, padding, dilation) for function in (unfolded_conv2d, functional.conv2d)
    )
    torch.testing.assert_close(ours, theirs)
    along = torch.randn(theirs.shape, generator=made, dtype=torch.float64)
    for own, other in zip(*(torch.autograd.grad(each, leaves, along) for each in (ours, theirs)), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in _NOT_ELEMENTWISE])
def test_optimizers_of_torch_work_on_elements(name: str) -> None:
    """So one over stacked parameters takes the steps of one for each client."""
    kind = OPTIMIZERS[name]
    start, gradients = torch.randn(CLIENTS, 4, 5), torch.randn(4, CLIENTS, 4, 5)
    together, each = nn.Parameter(start.clone()), [nn.Parameter(own.clone()) for own in start]
    optimizers = [kind([together], lr=0.1), *(kind([own], lr=0.1) for own in each)]
    for gradient in gradients:
        together.grad = gradient.clone()
        for own, value in zip(each, gradient, strict=True):
            own.grad = value.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together.detach(), torch.stack([own.detach() for own in each]))


@pytest.mark.parametrize("name", sorted(_NOT_ELEMENTWISE & OPTIMIZERS.keys()))
def test_the_others_do_not(name: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        test_optimizers_of_torch_work_on_elements(name)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in _NOT_ELEMENTWISE])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_what_an_optimizer_keeps_of_each_is_taken_up_again(name: str, shape: tuple[int, ...]) -> None:
    """Also of a parameter that is one number, whose state looks like a count of steps."""
    kind, rows = OPTIMIZERS[name], [dict[str, Any]() for _ in range(CLIENTS)]
    together = nn.Parameter(torch.randn(CLIENTS, *shape))
    first, second = kind([together], lr=0.1), kind([together], lr=0.1)
    together.grad = torch.ones_like(together)  # the same of each: so is what is kept
    first.step()
    kept = RowsTogether([Kept(row) for row in rows])
    _OptimizerRows(kept, CLIENTS).put("part.optimizer", optimizer_tensors(first))
    kept.stage()
    found = _OptimizerRows(RowsTogether([Kept(row) for row in rows]), CLIENTS).get("part.optimizer")
    load_optimizer(second, found or {})
    for key, value in optimizer_tensors(first).items():
        torch.testing.assert_close(optimizer_tensors(second)[key], value)


class Kept:
    """Rows of a client in a mapping."""

    def __init__(self, rows: dict[str, Any]) -> None:
        self._rows = rows

    def get(self, name: str) -> Any:
        return self._rows.get(name)

    def put(self, name: str, row: Any) -> None:
        self._rows[name] = row

    def drop(self, name: str) -> None:
        self._rows.pop(name, None)
