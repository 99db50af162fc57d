"""What crosses a cut: one tensor or several, in messages and out of them, and never taken for another."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cutlayer.models.cutting import Crossing, Several, SeveralError, as_crossing, tensors
from cutlayer.runtime.messages.crossing import (
    backward,
    crossed,
    detached,
    divided,
    floating,
    gradients,
    joined,
    mapped,
    packed,
    require_gradients,
    scaled,
    tensor,
)

KINDS = st.lists(st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]), min_size=1, max_size=4)
SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def made(kinds: list[torch.dtype], samples: int, start: int = 0) -> Crossing:
    """Tensors [samples, 1], [samples, 2] and so on, each of its kind."""
    values = torch.arange(start, start + 50 * samples).view(samples, 50)
    return as_crossing(tuple(values[:, : index + 1].to(kind) for index, kind in enumerate(kinds)))


def equal(one: Crossing, other: Crossing) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return type(one) is type(other) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@given(kinds=KINDS, sizes=SIZES)
def test_batches_of_clients_are_joined_and_divided_again(kinds: list[torch.dtype], sizes: list[int]) -> None:
    each = [made(kinds, size, start=100 * index) for index, size in enumerate(sizes)]
    together = joined(each)
    assert all(len(value) == sum(sizes) for value in tensors(together))
    assert all(equal(one, other) for one, other in zip(divided(together, sizes), each, strict=True))


@given(kinds=KINDS)
def test_what_is_packed_is_what_crossed(kinds: list[torch.dtype]) -> None:
    z, y = made(kinds, 3), torch.arange(3)
    message = packed({"grad": y, "z": z, "count": 2, "zz": y})
    assert all(isinstance(value, Tensor | int) for value in message.values())
    assert len(message) == 3 + len(kinds)
    assert equal(crossed(message, "z"), z)
    assert crossed(message, "grad") is tensor(message, "y" if "y" in message else "grad") is y
    with pytest.raises(KeyError, match="message has no field 'x'; it has grad, z"):
        crossed(message, "x")
    with pytest.raises(TypeError, match="field 'count' is a int, expected a tensor"):
        crossed(message, "count")


def test_many_tensors_keep_their_order() -> None:
    z = Several(torch.tensor([index]) for index in range(12))
    shuffled = dict(sorted(packed({"z": z}).items()))  # z/10 before z/2
    assert equal(crossed(shuffled, "z"), z)


@given(kinds=KINDS)
def test_only_what_has_gradients_is_changed(kinds: list[torch.dtype]) -> None:
    z = made(kinds, 2)
    doubled = scaled(z, 2)
    for before, after in zip(tensors(z), tensors(doubled), strict=True):
        assert torch.equal(after, 2 * before) if before.is_floating_point() else after is before
    assert equal(mapped(lambda each: each + 1, z), mapped(lambda each: each + 1, z))
    asked = require_gradients(z)
    assert asked is z
    assert [each.requires_grad for each in tensors(z)] == [each.is_floating_point() for each in tensors(z)]
    assert not any(each.requires_grad for each in tensors(detached(z)))
    assert [id(each) for each in floating(z)] == [id(each) for each in tensors(z) if each.requires_grad]


def test_gradients_come_back_and_go_on() -> None:
    """A model in two halves, of which a mask crosses, and a tensor that nothing depends on: as one backward pass."""
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    z = Several((weight * 2, torch.tensor([True, False, True]), weight**2, weight + 1, torch.ones(3)))
    received = require_gradients(detached(z))
    first, mask, second = tensors(received)[:3]
    (first * mask * second).sum().backward()
    sent = gradients(received)
    assert [each.tolist() for each in tensors(sent)[2:]] == [[0.0] * 3] * 2
    backward(z, sent)
    expected = torch.where(mask, 6 * weight.detach() ** 2, 0)
    torch.testing.assert_close(weight.grad, expected)
    with pytest.raises(ValueError, match="shorter"):
        backward(z, Several(tensors(sent)[:2]))


def test_clients_whose_cuts_differ_are_not_joined() -> None:
    with pytest.raises(ValueError, match="shorter"):
        joined([Several((torch.ones(1), torch.ones(1))), torch.ones(1)])


@pytest.mark.parametrize("name", sorted({"grad", "shape", "detach", "requires_grad", "mean", "dtype", "device"}))
def test_several_have_nothing_of_a_tensor(name: str) -> None:
    z = Several((torch.ones(1), torch.ones(1)))
    with pytest.raises(SeveralError, match=rf"2 tensors cross this one and the method takes one \(z\.{name}\)"):
        getattr(z, name)
    assert not hasattr(z, name)
    assert not hasattr(z, "nothing")


def test_several_remain_a_tuple() -> None:
    z = Several((torch.ones(2), torch.zeros(1)))
    assert [each.tolist() for each in copy.deepcopy(z)] == [[1.0, 1.0], [0.0]]
    assert torch.cat(z).tolist() == [1.0, 1.0, 0.0]
    first, second = z
    assert (first, second) == z
