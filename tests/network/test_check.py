"""Values that training cannot use, and messages of another shape than expected, are refused by their name."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.datasets import DatasetInfo
from cutlayer.runtime.messages.boundary import Payload
from cutlayer.runtime.messages.bounds import WireError
from cutlayer.runtime.network.check import Shapes, check_values
from cutlayer.tasks import TASKS


def wrong(y: torch.Tensor, classes: int) -> str | None:
    return TASKS["classification"].wrong(y, DatasetInfo("any", 1, 8, 8, classes, ()))


ten_classes = partial(wrong, classes=10)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(
    st.sampled_from(FLOATS),
    st.lists(st.floats(width=16) | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=80),
)
def test_only_finite_values_pass(dtype: torch.dtype, values: list[float]) -> None:
    payload = {"fine": torch.ones(3), "z": torch.tensor(values, dtype=dtype)}
    if all(map(math.isfinite, values)):
        check_values(payload, ten_classes)
    else:
        with pytest.raises(WireError, match="'z' has values that are not finite"):
            check_values(payload, ten_classes)


@pytest.mark.parametrize("at", [0, 1, 511, 512, 1022, 1023])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_among_many_is_found(at: int, value: float) -> None:
    z = torch.randn(1024)
    z[at] = value
    with pytest.raises(WireError, match="not finite"):
        check_values({"z": z})


@given(st.floats() | st.integers() | st.booleans())
def test_plain_numbers_are_checked(value: float) -> None:
    if not isinstance(value, float) or -1e18 <= value <= 1e18:
        check_values({"loss": value})
    else:
        with pytest.raises(WireError, match="'loss'"):
            check_values({"loss": value})


@pytest.mark.parametrize("value", [1.1e18, -1.1e18, 3.4e38, -3.4e38])
def test_values_too_large_to_compute_with(value: float) -> None:
    with pytest.raises(WireError, match=r"'z' has values from .* 1e\+18 is the largest"):
        check_values({"z": torch.tensor([0.0, value])})
    check_values({"y": torch.tensor([9]), "z": torch.tensor([0.0, -1e17])}, ten_classes)


@given(st.lists(st.integers(-300, 300), max_size=9), st.integers(1, 300))
def test_targets_are_classes(labels: list[int], classes: int) -> None:
    payload = {"y": torch.tensor(labels, dtype=torch.int64), "other": torch.tensor([-5, 1000])}
    if all(0 <= label < classes for label in labels):
        check_values(payload, partial(wrong, classes=classes))
    else:
        with pytest.raises(WireError, match=f"'y' has values from .* classes are 0 to {classes - 1}"):
            check_values(payload, partial(wrong, classes=classes))
    check_values(payload)


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (torch.tensor([], dtype=torch.int64), True),
        (torch.tensor([3, 9]), True),
        (torch.tensor([3, -100]), False),
        (3, False),
        (torch.tensor(9, dtype=torch.uint8), False),
        (torch.tensor([True]), False),
        (torch.tensor([math.nan]), False),
        (torch.tensor([1.0, 9.5]), False),
    ],
)
def test_targets_have_the_type_of_the_task(value: torch.Tensor | int, fits: bool) -> None:
    for name in ("y", "y/0"):
        if fits:
            check_values({name: value}, ten_classes)
        else:
            with pytest.raises(WireError, match=name):
                check_values({name: value}, ten_classes)


SMASHED = Shapes({"z": (torch.float32, (None, 8, None)), "y": (torch.int64, (None,)), "lr": (float, ())})


def smashed(**changed: torch.Tensor | float) -> Payload:
    return {"z": torch.ones(5, 8, 3), "y": torch.zeros(5, dtype=torch.int64), "lr": 0.1, **changed}


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({}, "fields 'lr, y, z'"),
        ({"z": torch.ones(5, 8, 3), "y": torch.zeros(5, dtype=torch.int64)}, "fields 'lr'"),
        (smashed(more=1.0), "fields 'more'"),
        (smashed(z=torch.ones(5, 8, 3).double()), r"'z' is float64\[5, 8, 3\], expected float32\[any, 8, any\]"),
        (smashed(z=torch.ones(5, 7, 3)), "'z' is"),
        (smashed(z=torch.ones(5, 8)), "'z' is"),
        (smashed(z=torch.ones(5, 8, 3, 1)), "'z' is"),
        (smashed(z=torch.ones(5, 8, 0)), "'z' is"),
        (smashed(z=torch.ones(0, 8, 3), y=torch.zeros(0, dtype=torch.int64)), "'z' is"),
        (smashed(y=torch.zeros(4, dtype=torch.int64)), "'y' has 4 samples, where another field has 5"),
        (smashed(lr=torch.tensor(0.1)), "'lr' is"),
        (smashed(lr=1), r"'lr' is int\[\], expected float\[\]"),
        (smashed(lr=True), "'lr' is bool"),
    ],
)
def test_a_message_of_another_shape_is_refused(payload: Payload, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        SMASHED.check(payload)


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_message_of_any_batch_passes(batch: int, width: int) -> None:
    SMASHED.check(smashed(z=torch.ones(batch, 8, width), y=torch.zeros(batch, dtype=torch.int64)))
    Shapes({}).check({})
