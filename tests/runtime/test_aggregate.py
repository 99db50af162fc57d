"""The streamed mean equals the weighted mean, and a single state comes out as it went in."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.parties.aggregate import AggregateConfig, Average

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


def test_states_of_other_names_are_refused() -> None:
    """The first three by which they differ are named."""
    average = Average()
    average.add({name: torch.zeros(1) for name in "abc"}, 1)
    with pytest.raises(ValueError, match=r"^uploads differ in their tensors: \['a', 'b', 'd'\]$"):
        average.add({name: torch.zeros(1) for name in "cdef"}, 1)


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


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(-(2**62), 2**62), min_size=3, max_size=3)), min_size=1),
    st.sampled_from([torch.int64, torch.int32, torch.bool]),
)
def test_an_integer_buffer_is_the_largest_in_any_order(uploads, dtype: torch.dtype) -> None:
    """Neither the first client's nor the last one's, and never by weight."""
    kept = [(weight, torch.tensor(values).clamp(-(2**31), 2**31 - 1).to(dtype)) for weight, values in uploads]
    average = Average()
    for weight, value in kept:
        average.add({"n": value, "w": torch.ones(1)}, weight)
    found = average.result()["n"]
    assert found.dtype == dtype
    assert found.tolist() == [max(values) for values in zip(*(value.tolist() for _, value in kept), strict=True)]


@given(pairs, st.integers(0, 30), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_a_weight_of_zero_says_nothing_and_states_are_not_changed(items, place: int, dtype: torch.dtype) -> None:
    average, other = Average(), Average()
    assert len(average) == 0
    states = [(weight, {"w": torch.tensor([value / 64], dtype=dtype)}) for weight, value in items]
    before = [state["w"].clone() for _, state in states]
    for weight, state in states:
        average.add(state, weight)
    states.insert(place, (0, {"w": torch.tensor([1e3], dtype=dtype)}))
    for weight, state in states:
        other.add(state, weight)
    states.pop(min(place, len(states) - 1))
    assert all(torch.equal(state["w"], kept) for (_, state), kept in zip(states, before, strict=True))
    assert torch.equal(average.result()["w"], other.result()["w"])
    assert average.result()["w"].dtype == dtype
    assert len(average) == 1
    exact = sum(weight * float(kept) for (weight, _), kept in zip(states, before, strict=True)) / sum(
        weight for weight, _ in states
    )
    assert average.result()["w"].item() == pytest.approx(exact, rel=1e-2, abs=1e-3 + 2 * torch.finfo(dtype).eps * 16)


def test_a_weight_for_each_client_none_negative_not_all_zero() -> None:
    assert AggregateConfig(weights=(0.0, 0.25)).weight(1, 7) == 0.25
    for weights, shown in (((0.0,), "[0.0]"), ((1.0, -0.5), "[1.0,-0.5]"), ((-1.0,), "[-1.0]")):
        with pytest.raises(ConfigError) as caught:
            AggregateConfig(weights=weights)
        expected = "samples, uniform or one weight >= 0 per client, not all zero"
        assert str(caught.value) == f"weights={shown}: expected {expected}"
    AggregateConfig(weights=(1.0, 2.0)).check(2)
    AggregateConfig().check(2)
    for count in (1, 3):
        with pytest.raises(ConfigError) as caught:
            AggregateConfig(weights=(1.0, 2.0)).check(count)
        assert str(caught.value) == f"aggregate.weights=[1.0,2.0]: expected {count} weights, one per client"
