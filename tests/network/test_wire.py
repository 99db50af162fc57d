"""Messages come out as they went in, in the bytes of safetensors; anything else is refused in one way."""

import json
import struct
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.runtime.messages import frames
from cutlayer.runtime.messages.boundary import Payload, Value
from cutlayer.runtime.messages.bounds import read_object, shown
from cutlayer.runtime.messages.codec import _DTYPES, decode, encode, framed_bytes
from cutlayer.runtime.network.wire import (
    PIECE_BYTES,
    TEXTS,
    Head,
    Incoming,
    Limits,
    Received,
    What,
    WireError,
    outgoing,
)

LIMITS = Limits(message_bytes=2**30)
ENVELOPE = 16  # bytes

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bits, NaNs with payloads among them, in memory of any order."""
    dtype = draw(st.sampled_from(sorted(_DTYPES, key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = torch.Size(shape).numel()
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    tensor = torch.frombuffer(bytearray(data or b"\0" * 8), dtype=dtype)[:count].reshape(shape)
    order = draw(st.permutations(range(len(shape))))
    return tensor.permute(order) if draw(st.booleans()) else tensor


numbers = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats())
payloads = st.dictionaries(names, st.one_of(tensors(), numbers), max_size=6)
frame_kinds = st.sampled_from(sorted(set(What) - TEXTS))
kinds = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=16)


def bits(value: Value) -> tuple[object, ...]:
    """Type, shape and content to the bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    return type(value), struct.pack("<d" if isinstance(value, float) else "<q", value)


def same(a: Payload, b: Payload) -> bool:
    """Equal to the bit, in the same order."""
    return [(name, bits(value)) for name, value in a.items()] == [(name, bits(value)) for name, value in b.items()]


def take(pieces: Iterable[bytes], limits: Limits = LIMITS, allowed: Iterable[What] = What) -> Received:
    """The one message in these pieces."""
    incoming = Incoming(limits, frozenset(allowed))
    *first, last = pieces
    for piece in first:
        assert incoming.feed(piece) is None
        assert incoming.partial
    received = incoming.feed(last)
    assert received is not None
    assert not incoming.partial
    return received


def frame(header: Any, data: bytes = b"") -> bytes:
    """A frame of a header as it may not be: an object, or the header's own bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def message(body: bytes, what: int = 6, kind: bytes = b"k", *, form: int = 0xC1, length: int | None = None) -> bytes:
    """A message by its parts, as one piece."""
    head = struct.pack("<BBHIQ", form, what, len(kind), 7, len(body) if length is None else length)
    return head + kind + body


# ---------------------------------------------------------------------- there and back


@given(payloads, frame_kinds, st.integers(0, 2**32 - 1), kinds, st.integers(1, 400))
def test_a_payload_comes_back_to_the_bit(payload: Payload, what: What, session: int, kind: str, chunk: int) -> None:
    head = Head(what, session, kind)
    pieces = list(outgoing(head, payload, chunk))
    received = take(pieces)
    assert received.head == head
    assert same(received.body, payload)
    assert received.envelope_bytes == ENVELOPE + len(kind.encode())
    assert received.frame_bytes == sum(framed_bytes(payload).values())
    assert sum(map(len, pieces)) == received.envelope_bytes + received.frame_bytes
    assert max(map(len, pieces)) <= chunk + received.envelope_bytes


@given(payloads, st.data())
def test_cut_anywhere_it_comes_back(payload: Payload, data: st.DataObject) -> None:
    whole = b"".join(outgoing(Head(What.TELL, 1, "z"), payload, 2**20))
    places = st.integers(ENVELOPE + 1, max(ENVELOPE + 1, len(whole) - 1))
    cuts = sorted(set(data.draw(st.lists(places, max_size=8)))) if payload else []
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert same(take(pieces).body, payload)


@given(payloads)
def test_the_body_is_the_frame_of_the_codec(payload: Payload) -> None:
    [piece] = outgoing(Head(What.ASK, 0, "smashed"), payload)
    assert piece[ENVELOPE + len("smashed") :] == (encode(payload) if payload else b"")


texts = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
        max_leaves=8,
    ),
)


@given(texts, st.sampled_from(sorted(TEXTS)), st.integers(1, 100))
def test_a_text_comes_back(text: dict[str, Any], what: What, chunk: int) -> None:
    received = take(outgoing(Head(what), text, chunk))
    assert received.body == text
    assert received.frame_bytes + received.envelope_bytes == sum(map(len, outgoing(Head(what), text, chunk)))


def test_messages_follow_one_another() -> None:
    incoming = Incoming(LIMITS, What)
    for index, body in enumerate([{"z": torch.ones(300)}, {}, {"k": 3}, {"z": torch.zeros(0), "y": torch.arange(4)}]):
        *_, received = [incoming.feed(piece) for piece in outgoing(Head(What.TELL, index), body, 64)]
        assert received is not None
        assert received.head.session == index
        assert same(received.body, body)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24).reshape(2, 3, 4).transpose(0, 2),
        torch.ones(1).expand(5),
        torch.nn.Parameter(torch.randn(3)),
        torch.randn(3, requires_grad=True) * 2,
        torch.tensor([1 + 2j]).conj().imag,
        torch.arange(10)[3:7],
        torch.zeros((2, 2, 2, 2), dtype=torch.bfloat16).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "expanded", "parameter", "of a graph", "negative bit", "slice", "channels last"],
)
def test_a_tensor_in_any_memory(tensor: torch.Tensor) -> None:
    received = take(outgoing(Head(What.ASK), {"z": tensor}, 16)).body["z"]
    assert torch.equal(received, tensor)
    assert not received.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_tensor_on_a_gpu() -> None:
    payload = {"z": torch.randn(100, 7, device="cuda").t(), "b": torch.ones(3, dtype=torch.bfloat16, device="cuda")}
    received = take(outgoing(Head(What.ASK), payload, 64)).body
    assert all(torch.equal(received[name], tensor.cpu()) for name, tensor in payload.items())


def test_each_tensor_has_memory_of_its_own() -> None:
    """Kernels choose their way by alignment: what comes in is laid out like what a process makes for itself."""
    z = torch.randn(33)
    received = take(outgoing(Head(What.ASK), {"a": torch.ones(3), "z": z, "b": torch.ones(5, dtype=torch.int8)})).body
    z.zero_()
    assert received["z"].abs().sum() > 0
    for tensor in received.values():
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor._base is None


# ---------------------------------------------------------------------- the format is that of safetensors


@given(payloads.filter(bool))
def test_the_library_reads_what_is_written(payload: Payload) -> None:
    tensors = safetensors.torch.load(encode(payload))
    expected = {
        name: value
        if isinstance(value, torch.Tensor)
        else torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
        for name, value in payload.items()
    }
    assert tensors.keys() == expected.keys()
    assert all(bits(tensors[name]) == bits(expected[name]) for name in expected)


@given(st.dictionaries(names, tensors().map(torch.Tensor.contiguous), max_size=6))
def test_what_the_library_writes_is_read(tensors: dict[str, torch.Tensor]) -> None:
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    written = safetensors.torch.save(copies)
    received = take([message(written)]).body
    assert received.keys() == tensors.keys()
    assert all(bits(received[name]) == bits(tensors[name]) for name in tensors)
    assert len(written) == len(encode(tensors))


# ---------------------------------------------------------------------- anything else


def read_or_refused(pieces: Iterable[bytes]) -> Received | None:
    """The message, or None where it was refused; what was accepted is a frame to the library too."""
    incoming = Incoming(Limits(message_bytes=2**20), What)
    received = None
    for piece in pieces:
        try:
            received = incoming.feed(piece)
        except WireError as error:
            reason = str(error)
            with pytest.raises(WireError, match="nothing more is read"):
                incoming.feed(piece)
            break
    else:
        return received
    assert 0 < len(reason) < 500
    assert "\n" not in reason
    return None


@given(payloads, st.data())
def test_a_flipped_bit_is_refused_or_gives_a_payload(payload: Payload, data: st.DataObject) -> None:
    whole = bytearray(b"".join(outgoing(Head(What.TELL, 1, "z"), payload)))
    for at in data.draw(st.lists(st.integers(0, len(whole) * 8 - 1), min_size=1, max_size=3)):
        whole[at // 8] ^= 1 << at % 8
    received = read_or_refused([bytes(whole)])
    if received and received.body and received.head.what not in TEXTS:
        safetensors.deserialize(bytes(whole[received.envelope_bytes :]))
        assert same(decode(encode(received.body)), received.body)


@given(payloads.filter(bool), st.data())
def test_a_cut_message_never_ends(payload: Payload, data: st.DataObject) -> None:
    whole = b"".join(outgoing(Head(What.TELL), payload))
    end = data.draw(st.integers(ENVELOPE, len(whole) - 1))
    incoming = Incoming(LIMITS, What)
    assert incoming.feed(whole[:end]) is None
    assert incoming.partial


@given(payloads.filter(bool), st.data())
def test_a_wrong_length_is_refused(payload: Payload, data: st.DataObject) -> None:
    """Of the body in the envelope, and of the header in the frame; a longer header may still be one, of fewer data."""
    body = encode(payload)
    wrong = data.draw(st.integers(0, 2 * len(body)).filter(lambda length: length != len(body)))
    padded = body.ljust(wrong, b"\0")
    if wrong < len(body):
        assert read_or_refused([message(body, length=wrong)]) is None
    else:
        assert read_or_refused([message(padded, length=wrong)]) is None
    header = data.draw(st.integers(0, 2**64 - 1).filter(lambda length: length != len(body)))
    received = read_or_refused([message(struct.pack("<Q", header) + body[8:])])
    assert received is None or header == int.from_bytes(body[:8], "little")


leaves = st.none() | st.booleans() | st.integers(-5, 2**65) | st.floats() | st.sampled_from(["F32", "I64", "x", ""])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*_DTYPES.values(), "F8_E4M3", "f32"]) | leaves,
        "shape": st.lists(st.integers(0, 3) | leaves, max_size=9) | leaves,
        "data_offsets": st.lists(st.integers(0, 12) | leaves, min_size=1, max_size=3) | leaves,
    },
    optional={"more": leaves},
)
marks = st.dictionaries(st.sampled_from("ab"), st.sampled_from(["int", "bool", "float", "str"]) | leaves)
headers = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", ""]),
    entries | marks | leaves,
    max_size=3,
)


@settings(max_examples=300)
@given(headers, st.binary(max_size=24))
def test_any_header_is_refused_or_gives_a_payload(header: dict[str, Any], data: bytes) -> None:
    raw = frame(header, data)
    received = read_or_refused([message(raw)])
    if received:
        safetensors.deserialize(raw)
        assert same(decode(encode(received.body)), received.body)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_garbage_is_refused(pieces: list[bytes]) -> None:
    assert read_or_refused(pieces) is None
    assert read_or_refused([message(b"".join(pieces) or b"0")]) is None


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
I64 = {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}


FRAMES = [
    (frame({"a": F32, "b": F32}, b"\0" * 8), "begin at 0, not at 8"),
    (frame({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, b"\0" * 12), "begin at 4, not at 8"),
    (frame({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, b"\0" * 20), "begin at 12, not at 8"),
    (frame({"a": {**F32, "data_offsets": [8, 16]}}, b"\0" * 16), "begin at 8, not at 0"),
    (frame({"a": F32}, b"\0" * 9), "9 bytes of data, where the header says 8"),
    (frame({"a": F32}, b"\0" * 7), "7 bytes of data, where the header says 8"),
    (frame({"a": {**F32, "data_offsets": [8, 0]}}, b"\0" * 8), "does not fill"),
    (frame({"a": {**F32, "shape": [3]}}, b"\0" * 8), "does not fill"),
    (frame({"a": {**F32, "shape": [1]}}, b"\0" * 8), "does not fill"),
    (frame({"a": {**F32, "data_offsets": [0, 8, 8]}}, b"\0" * 8), "does not fill"),
    (frame({"a": {**F32, "shape": [2**62, 4, 2]}}, b"\0" * 8), "larger than any tensor"),
    (frame({"a": {**F32, "shape": [0, 2**63], "data_offsets": [0, 0]}}), "larger than any tensor"),
    (frame({"a": {**F32, "shape": [2**32, 2**32], "data_offsets": [0, 0]}}), "larger than any tensor"),
    (frame({"a": {**F32, "shape": [-1, -2]}}, b"\0" * 8), "no list of sizes"),
    (frame({"a": {**F32, "shape": [True, 2]}}, b"\0" * 8), "no list of sizes"),
    (frame({"a": {**F32, "shape": [1] * 9, "data_offsets": [0, 4]}}, b"\0" * 4), "9 dimensions"),
    (frame({"a": {**F32, "dtype": "C64"}}, b"\0" * 8), "dtype 'C64'"),
    (frame({"a": {**F32, "dtype": ["F32"]}}, b"\0" * 8), "of dtype"),
    (frame({"a": {**F32, "name": "b"}}, b"\0" * 8), "or more than these"),
    (frame({"": F32}, b"\0" * 8), "name of 0 bytes"),
    (frame({"é" * 257: F32}, b"\0" * 8), "name of 514 bytes"),
    (frame(b'{"\\ud800": {"dtype": "I8", "shape": [], "data_offsets": [0, 1]}}', b"\0"), "surrogates not allowed"),
    (frame(b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), b"\0" * 8), "'a' is there twice"),
    (frame(b'{"a": {"dtype": "I8", "shape": [], "shape": [1], "data_offsets": [0, 1]}}', b"\0"), "twice"),
    (frame({"a": F32, "__metadata__": {"b": "int"}}, b"\0" * 8), "mark no number"),
    (frame({"a": F32, "__metadata__": {"a": "int"}}, b"\0" * 8), "marked as a number"),
    (frame({"a": I64, "__metadata__": {"a": "float"}}, b"\0" * 8), "marked as a number"),
    (frame({"a": I64, "__metadata__": {"a": "complex"}}, b"\0" * 8), "mark no number"),
    (frame({"a": I64, "__metadata__": {"a": "bool"}}, b"\2" + b"\0" * 7), "a bool of value 2"),
    (
        frame({"a": {"dtype": "BOOL", "shape": [8], "data_offsets": [0, 8]}}, b"\1" * 7 + b"\2"),
        "bools that are neither",
    ),
    (frame({"a": F32, "__metadata__": []}, b"\0" * 8), "metadata are not an object"),
    (frame(b" {}"), "begin with a brace"),
    (frame(b"[]"), "begin with a brace"),
    (frame(b"{} {}"), "not JSON"),
    (frame(b'{"a": 1e0}'), "no dtype"),
    (frame(b'{"a": {"dtype": "I8", "shape": [1.0], "data_offsets": [0, 1]}}', b"\0"), "no list of sizes"),
    (frame(b'{"a": {"dtype": "I8", "shape": [1], "data_offsets": [0, %s]}}' % (b"9" * 5000), b"\0"), "not JSON"),
    (frame(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "not JSON"),
    (frame(b'{"a":' + b'{"a":' * 50_000 + b"0" + b"}" * 50_001), "not JSON"),
    (struct.pack("<Q", 2**64 - 1) + b"{}", "a header of 18446744073709551615 bytes"),
    (b"\2\0\0", "a frame of 3 bytes"),
]


@pytest.mark.parametrize(("body", "reason"), FRAMES, ids=[reason for _, reason in FRAMES])
def test_a_wrong_frame_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        take([message(body)])
    with pytest.raises(ValueError, match="not a safetensors frame"):
        decode(body)


PIECES = [
    (b"", "an empty piece"),
    (b"\xc1\1", "begins with 2 bytes"),
    (message(b"", form=0x50), "byte 0x50"),
    (message(b"", what=0), "message 0 is not expected"),
    (message(b"", what=99), "message 99 is not expected"),
    (message(b"", what=What.REPLY), "message REPLY is not expected; HELLO, ASK"),
    (message(b"", kind=b"k" * 65), "a kind of 65 bytes"),
    (message(b"", kind=b"abcd")[:-1], "all in the first piece"),
    (message(b"", kind=b"\xff"), "not UTF-8"),
    (message(b"", kind=b"a\nb"), "not printable"),
    (message(b"", kind=b"\x1b[2J"), "not printable"),
    (message(b"", length=2**30), "a frame of 1073741824 bytes; 8 to 1000 are accepted"),
    (message(b"", length=2**64 - 1), "a frame of 18446744073709551615 bytes"),
    (message(b"{}", what=What.HELLO, length=101), "a text of 101 bytes; 100 are accepted"),
    (message(b"0", length=0), "1 bytes behind the end"),
    (message(b"{}x", what=What.HELLO, length=2), "1 bytes behind the end"),
    (message(b"", what=What.HELLO), "a text is not JSON"),
    (message(b"[1]", what=What.HELLO), "a JSON list, not an object"),
    (message(b'{"a": NaN}', what=What.HELLO), "NaN is no number"),
    (message(b'{"a": -Infinity}', what=What.HELLO), "-Infinity is no number"),
    (message(b'{"a": 1e999}', what=What.HELLO), "too large a number"),
    (message(b'{"a": {"b": 1, "b": 1}}', what=What.HELLO), "'b' is there twice"),
    (message(b'{"a": "\\udc00"}', what=What.HELLO), "not JSON: .*surrogates"),
    (message(b'{"a": "\xff"}', what=What.HELLO), "not JSON: .*utf-8"),
]


@pytest.mark.parametrize(("piece", "reason"), PIECES, ids=[reason for _, reason in PIECES])
def test_a_wrong_message_is_refused(piece: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        take([piece], Limits(message_bytes=1000, text_bytes=100), [What.ASK, What.HELLO])


def test_text_nested_too_deep_is_refused() -> None:
    with pytest.raises(WireError, match="not JSON"):
        take([message(b'{"a":' * 90_000 + b"0" + b"}" * 90_000, what=What.HELLO)])


def test_a_reason_is_short_whatever_was_sent() -> None:
    long = {"a" * 500: {"dtype": "I8", "shape": [10**4000] * 8, "data_offsets": [10**4000, 10**4000]}}
    for body in (frame(long), frame({"a": {**F32, "dtype": "x" * 10_000}}), frame({"a": {**F32, "shape": "[" * 9999}})):
        with pytest.raises(WireError) as caught:
            take([message(body)])
        assert len(str(caught.value)) < 300


def test_any_value_can_be_shown() -> None:
    assert shown("a\nb") == "'a\\nb'"
    assert shown(10**5000) == "int"
    nested: list[Any] = []
    for _ in range(5_000):
        nested = [nested]
    assert shown(nested) == "list"


def test_a_header_within_the_limit_is_read() -> None:
    raw = encode({"a": torch.ones(2)})
    header = int.from_bytes(raw[:8], "little")
    assert take([message(raw)], Limits(message_bytes=2**20, header_bytes=header)).body
    with pytest.raises(
        WireError, match=f"a header of {header} bytes in a frame of {len(raw)}; {header - 1} are accepted"
    ):
        take([message(raw)], Limits(message_bytes=2**20, header_bytes=header - 1))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ({"": 1}, "no name"),
        ({"__metadata__": 1}, "no name"),
        ({"é" * 257: 1}, "no name"),
        ({"\ud800": 1}, "surrogates"),
        ({"n": 2**63}, "64 bits"),
        ({"z": torch.zeros(2, dtype=torch.complex64)}, "complex64 cannot cross"),
    ],
)
def test_what_cannot_be_read_is_not_sent(payload: Payload, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        outgoing(Head(What.ASK), payload)


def test_text_that_cannot_be_read_is_not_sent() -> None:
    with pytest.raises(ValueError):
        outgoing(Head(What.HELLO), {"a": float("nan")})
    with pytest.raises(WireError, match="32 bits"):
        Head(What.HELLO, 2**32)
    with pytest.raises(WireError, match="longer than 64"):
        Head(What.HELLO, 0, "é" * 33)


def test_limits_count_from_the_next_message_on() -> None:
    incoming = Incoming(Limits(message_bytes=8, text_bytes=2), {What.HELLO})
    assert incoming.feed(message(b"{}", what=What.HELLO)) is not None
    incoming.limits, incoming.allowed = LIMITS, {What.TELL}
    assert incoming.feed(message(encode({"z": torch.ones(9)}), what=What.TELL)) is not None
    with pytest.raises(WireError, match="HELLO is not expected"):
        incoming.feed(message(b"{}", what=What.HELLO))


def test_a_piece_of_a_large_message_passes_where_piece_bytes_pass() -> None:
    pieces = list(outgoing(Head(What.ASK, 0, "é" * 32), {"z": torch.zeros(700_000)}))
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= PIECE_BYTES


# ---------------------------------------------------------------------- memory


class Taken:
    """Bytes of all tensors that are made, counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        real = torch.empty

        def empty(*args: Any, **named: Any) -> torch.Tensor:
            # Nothing as large as what is refused is made, should the test fail.
            made = real(*args, **named, device="meta")
            self.bytes += made.nbytes
            return real(*args, **named)

        monkeypatch.setattr(torch, "empty", empty)


def test_memory_is_taken_as_data_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte announced, in one tensor or in many, is no gigabyte taken."""
    taken = Taken(monkeypatch)
    size = 2**28
    for count in (1, 1024):
        each = size // count
        header = {
            str(index): {"dtype": "F32", "shape": [each], "data_offsets": [4 * each * index, 4 * each * (index + 1)]}
            for index in range(count)
        }
        raw = frame(header)
        incoming = Incoming(Limits(message_bytes=2**31), What)
        assert incoming.feed(message(raw, length=len(raw) + 4 * size)) is None
        assert taken.bytes == 0
        assert incoming.feed(b"\0") is None
        assert 0 < taken.bytes <= 64 * 2**20
        taken.bytes = 0


@given(payloads, st.integers(1, 300))
@settings(max_examples=40)
def test_a_large_tensor_grows_with_its_data(payload: Payload, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(frames, "_WHOLE", 8)
        taken = Taken(monkeypatch)
        payload = {**payload, "big": torch.arange(200, dtype=torch.int16)}
        incoming = Incoming(LIMITS, What)
        fed = 0
        for piece in outgoing(Head(What.ASK), payload, chunk):
            fed += len(piece)
            received = incoming.feed(piece)
            assert taken.bytes <= 4 * fed + 8  # all ever made: twice the last, which is twice what came
        assert received is not None
        assert same(received.body, payload)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":[' + b"[]," * 300_000 + b"[]]}",
        b'{"a":[' + b"{}," * 300_000 + b"{}]}",
        b'{"a":[' + b"1," * 450_000 + b"1]}",
        b'{"a":' + b"[" * 900_000,
        b'{"__metadata__":{' + b'"":0,' * 180_000 + b'"":0}}',
    ],
    ids=["lists", "objects", "numbers", "depth", "marks"],
)
def test_a_header_takes_little_memory(raw: bytes) -> None:
    """A few bytes of JSON may be many bytes of objects: they are counted before they are made."""
    limits = Limits(message_bytes=2**21, header_bytes=2**20, tensors=1000)
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            take([message(frame(raw))], limits)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(raw)


@pytest.mark.parametrize("value", [torch.ones(1), 3], ids=["tensors", "numbers"])
def test_more_tensors_than_accepted_are_refused(value: Value) -> None:
    payload = {str(index): value for index in range(11)}
    limits = Limits(message_bytes=2**20, tensors=10)
    with pytest.raises(WireError, match="more than 10 tensors"):
        take([message(encode(payload))], limits)
    payload.popitem()
    assert same(take([message(encode(payload))], limits).body, payload)


def test_read_object_tells_what_it_reads() -> None:
    assert read_object(b'{"a": "\\u00e9"}', "a text") == {"a": "é"}
    with pytest.raises(WireError, match="^a plan is not JSON"):
        read_object(b"", "a plan")
