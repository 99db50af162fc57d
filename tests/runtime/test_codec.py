"""The codec round-trips every payload, and its predicted frame size is the size of the real frame."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.runtime.messages.boundary import Value, field_of, owned, payload_bytes
from cutlayer.runtime.messages.codec import _DTYPES, decode, encode, framed_bytes

names = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters='"\\'), min_size=1, max_size=12).filter(
    lambda name: name.isprintable() and name != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=3)
tensors = st.builds(
    lambda shape, dtype: torch.randint(0, 2, shape).to(dtype), shapes, st.sampled_from(sorted(_DTYPES, key=str))
)
numbers = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
payloads = st.dictionaries(names, st.one_of(tensors, numbers), max_size=8)


def same(a: Value, b: Value) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


@given(payloads)
def test_round_trip(payload: dict[str, Value]) -> None:
    decoded = decode(encode(payload))
    assert decoded.keys() == payload.keys()
    assert all(same(payload[name], decoded[name]) for name in payload)


@given(payloads)
def test_framed_bytes_is_the_size_of_the_frame(payload: dict[str, Value]) -> None:
    sizes = framed_bytes(payload)
    assert sum(sizes.values()) == (len(encode(payload)) if payload else 0)
    assert list(sizes) == list(dict.fromkeys(field_of(name) for name in payload))


@given(payloads)
def test_framed_is_never_less_than_payload(payload: dict[str, Value]) -> None:
    by_field: dict[str, int] = {}
    for name, value in payload.items():
        by_field[field_of(name)] = by_field.get(field_of(name), 0) + payload_bytes(value)
    framed = framed_bytes(payload)
    assert all(framed[field] >= by_field[field] for field in by_field)


@given(st.binary(max_size=64))
def test_garbage_is_refused_in_one_way(frame: bytes) -> None:
    with pytest.raises(ValueError, match="not a safetensors frame"):
        decode(frame)


def test_a_dtype_outside_the_format_is_refused() -> None:
    with pytest.raises(ValueError, match="complex64 cannot cross"):
        encode({"z": torch.zeros(2, dtype=torch.complex64)})


def test_owned_copies_and_detaches() -> None:
    z = torch.ones(3, requires_grad=True) * 2
    received = owned({"z": z, "k": 3})["z"]
    assert isinstance(received, torch.Tensor)
    assert not received.requires_grad
    received.add_(1)
    assert z.tolist() == [2, 2, 2]


def test_owned_refuses_what_may_not_cross() -> None:
    with pytest.raises(TypeError, match="f: only tensors and numbers"):
        owned({"f": math.sqrt})  # type: ignore[dict-item]
