"""The streamed mean equals the weighted mean, and a single state comes out as it went in."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.aggregate import AggregateConfig, Average
from runtime.config import ConfigError

pairs = st.lists(
    st.tuples(st.integers(0, 10_000), st.floats(-1024, 1024, width=32, allow_subnormal=False)), min_size=1, max_size=30
).filter(lambda items: any(weight for weight, _ in items))


@given(pairs)
def test_equals_numpy(items) -> None:
    average = Average()
    for weight, value in items:
        average.add({"w": torch.tensor([value])}, weight)
    expected = np.average([value for _, value in items], weights=[weight for weight, _ in items])
    assert average.result()["w"].item() == pytest.approx(expected, rel=1e-4, abs=1e-2)


@given(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), st.floats(1e-6, 1e6))
def test_one_state_is_returned_exactly(value: float, weight: float) -> None:
    average = Average()
    average.add({"w": torch.tensor(value)}, weight)
    assert average.result()["w"].item() == value


def test_default_of_ten_equal_clients_is_no_problem() -> None:
    """Ten weights of 0.1 do not sum to an exact one; nothing may depend on it."""
    average = Average()
    for value in range(10):
        average.add({"w": torch.tensor(float(value))}, 0.1)
    assert average.result()["w"].item() == pytest.approx(4.5)


def test_integer_buffers_stay_integers_and_halves_are_averaged_wide() -> None:
    average = Average()
    average.add({"n": torch.tensor(3), "h": torch.tensor(1.0, dtype=torch.bfloat16)}, 1)
    average.add({"n": torch.tensor(5), "h": torch.tensor(1.0078125, dtype=torch.bfloat16)}, 3)
    result = average.result()
    assert result["n"].dtype == torch.int64
    assert result["n"].item() == 5
    assert result["h"].dtype == torch.bfloat16
    assert result["h"].item() == 1.0078125


def test_states_of_different_shape_of_names_are_refused() -> None:
    average = Average()
    average.add({"a": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match="differ in their tensors"):
        average.add({"b": torch.zeros(1)}, 1)


@pytest.mark.parametrize("weights", [(), (0.0, 0.0), (-1.0, 2.0)])
def test_bad_weights(weights) -> None:
    with pytest.raises(ConfigError, match="weights="):
        AggregateConfig(weights=weights)


def test_weight_rules() -> None:
    assert AggregateConfig().weight(2, 30) == 30
    assert AggregateConfig(weights="uniform").weight(2, 30) == 1
    assert AggregateConfig(weights=(1.0, 2.0, 3.0)).weight(2, 30) == 3
    with pytest.raises(ConfigError, match="4 weights"):
        AggregateConfig(weights=(1.0, 2.0, 3.0)).check(4)
