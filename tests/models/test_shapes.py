"""Shapes found without computing are those that are computed, and what torch refuses is refused."""

import pytest
import torch
from model_cases import SHALLOWER, built, images
from torch import nn

from cutlayer.models.shapes import QuickShapes, trace


@pytest.mark.parametrize("name", SHALLOWER)
def test_a_trace_has_the_shape_of_what_is_computed(name: str) -> None:
    model, x = built(name, "cifar10"), images("cifar10", 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = trace(model, x.to("meta"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    computed = model(x)
    assert (found.shape, found.dtype, found.device.type) == (computed.shape, computed.dtype, "meta")


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 4, 5, 5), (4,)])
def test_what_normalisation_refuses_is_refused_in_the_same_words(shape: tuple[int, ...]) -> None:
    norm, x = nn.BatchNorm2d(3), torch.zeros(shape)
    with pytest.raises((ValueError, RuntimeError)) as expected:
        norm(x)
    with pytest.raises(expected.type) as found:
        trace(norm, x.to("meta"))
    assert str(found.value) == str(expected.value)


def test_elsewhere_than_on_the_meta_device_it_is_computed() -> None:
    norm, x = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    with QuickShapes():
        found = norm(x)
    assert torch.equal(found, nn.BatchNorm2d(3)(x))
    assert bool(norm.running_mean.any())  # type: ignore[union-attr]
