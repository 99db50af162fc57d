"""Fuzz what reads a peer's bytes, ``runtime.network.wire.Incoming`` and ``check_values``, by atheris (libFuzzer).

    pip install atheris
    python -m fuzz.fuzz_wire -max_total_time=600

Whatever comes in is refused by a WireError or is a message; a frame that is accepted is one to the safetensors library
too, with the same content, and goes out again as it came in. No more memory is taken than the limits say. A finding
ends the run and leaves its input in ``crash-...``; ``python -m fuzz.fuzz_wire crash-...`` runs it again.
"""

import json
import struct
from functools import partial
from random import Random
from typing import Any

import atheris
import safetensors
import torch

from cutlayer.datasets import DatasetInfo
from cutlayer.tasks import TASKS
from fuzz.harness import join, json_of, mutate_json, pairs_of, recut, run, split

with atheris.instrument_imports(include=["cutlayer.runtime.network"]):
    from cutlayer.runtime.messages import bounds, frames
    from cutlayer.runtime.network import check, wire

LIMITS = bounds.Limits(message_bytes=2**16, header_bytes=2**14, tensors=32, text_bytes=2**14)
ENVELOPE = struct.Struct("<BBHIQ")
GROWTH = 64  # bytes from which a tensor grows with its data: small, so that some do

taken = 0
real_empty = torch.empty


def counted_empty(*args: Any, **named: Any) -> torch.Tensor:
    """torch.empty, its bytes counted before they are taken."""
    global taken
    taken += real_empty(*args, **named, device="meta").nbytes
    assert taken <= 4 * LIMITS.message_bytes, f"{taken} bytes of tensors within limits of {LIMITS}"
    return real_empty(*args, **named)


def target(data: bytes) -> None:
    """Feed the pieces of one input to a fresh reader."""
    global taken
    incoming = wire.Incoming(LIMITS, set(wire.What))
    whole = b""
    for piece in split(data):
        whole += piece
        taken = taken if incoming.partial else 0
        try:
            received = incoming.feed(piece)
        except bounds.WireError as error:
            one_line(error)
            refuses(incoming, piece)
            return
        assert taken <= 4 * len(whole) + GROWTH, f"{taken} bytes of tensors for {len(whole)} that came"
        if received is not None:
            assert received.envelope_bytes + received.frame_bytes == len(whole)
            accepted(received, whole[received.envelope_bytes :])
            whole = b""


def one_line(error: Exception) -> None:
    """An error says in one line what was wrong, whatever was in it."""
    text = str(error)
    assert 0 < len(text) < 500, text
    assert text.isprintable(), text


def refuses(incoming: wire.Incoming, piece: bytes) -> None:
    """After an error nothing more is read."""
    try:
        incoming.feed(piece)
    except bounds.WireError:
        return
    raise AssertionError("read on after an error")


def accepted(received: wire.Received, raw: bytes) -> None:
    """A message that came in is what its bytes say, and goes out as it came in."""
    again = wire.Incoming(LIMITS, set(wire.What))
    *_, last = [again.feed(piece) for piece in wire.outgoing(received.head, received.body, 50)]
    assert last is not None
    assert last.head == received.head
    if received.head.what in wire.TEXTS:
        assert last.body == received.body
        assert json.loads(raw) == received.body
        return
    content = contents(received.body)
    assert contents(last.body) == content
    if raw and b"-0" not in raw:  # a zero to Python, a fraction to the library
        library = {
            name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in safetensors.deserialize(raw)
        }
        assert library == content, f"{library} to the library, {content} here"
    info = DatasetInfo("any", 1, 8, 8, 10, (), length=16)
    for task in TASKS.values():
        try:
            check.check_values(received.body, partial(task.wrong, info=info))
        except bounds.WireError as error:
            one_line(error)


def contents(payload: Any) -> dict[str, tuple[str, list[int], bytes]]:
    """Names, dtypes, shapes and bytes of a payload."""
    made: dict[str, tuple[str, list[int], bytes]] = {}
    for name, value in payload.items():
        if isinstance(value, torch.Tensor):
            made[name] = (
                frames.DTYPES[value.dtype],
                list(value.shape),
                value.reshape(-1).view(torch.uint8).numpy().tobytes(),
            )
        else:
            real = isinstance(value, float)
            made[name] = ("F64" if real else "I64", [], struct.pack("<d" if real else "<q", value))
    return made


def messages(data: bytes) -> list[bytes]:
    """The messages of an input, as far as their envelopes say where they end."""
    found: list[bytes] = []
    missing = 0
    for piece in split(data):
        if missing > 0 and found:
            found[-1] += piece
            missing -= len(piece)
        else:
            found.append(piece)
            if len(piece) >= ENVELOPE.size:
                _, _, kind, _, length = ENVELOPE.unpack_from(piece)
                missing = ENVELOPE.size + kind + length - len(piece)
    return found


def mutate(data: bytes, random: Random) -> bytes:
    """Change one message in its envelope, its header or its data, or the order or the pieces of all."""
    all_messages = messages(data) or [random.choice(SEEDS)]
    at = random.randrange(len(all_messages))
    choice = random.randrange(10)
    if choice == 0:
        all_messages.insert(at, random.choice(all_messages))
    elif choice == 1:
        all_messages.insert(at, random.choice(messages(random.choice(SEEDS))))
    elif choice == 2:
        all_messages.pop(at)
    elif choice > 3:
        all_messages[at] = mutate_message(all_messages[at], random)
    return join(piece for whole in all_messages for piece in recut(whole, ENVELOPE.size, random))


def mutate_message(whole: bytes, random: Random) -> bytes:
    """Change one part of a message, and mostly mend the lengths that it changed."""
    if len(whole) < ENVELOPE.size:
        return whole + bytes(random.randrange(20))
    form, what, kind_bytes, session, length = ENVELOPE.unpack_from(whole)
    kind, body = whole[ENVELOPE.size :][:kind_bytes], whole[ENVELOPE.size + kind_bytes :]
    choice = random.randrange(8)
    if choice == 0:
        what = random.randrange(16)
    elif choice == 1:
        kind = random.choice([b"", b"smashed", b"\xff", b"\n", b"k" * 64, b"k" * 65, kind + b"k"])
    elif choice == 2:
        session = random.choice([0, 1, 2**32 - 1])
    elif what in wire.TEXTS:
        body = json_of(mutate_json(pairs_of(body), random))
    else:
        body = mutate_frame(body, random)
    if random.random() < 0.95:
        length, kind_bytes = len(body), len(kind)
    else:
        length = random.choice([0, 7, 8, length + 1, max(0, length - 1), LIMITS.message_bytes, 2**63, 2**64 - 1])
    return ENVELOPE.pack(form, what, kind_bytes % 2**16, session, length % 2**64) + kind + body


def mutate_frame(body: bytes, random: Random) -> bytes:
    """Change the header or the data of a frame."""
    size = int.from_bytes(body[:8], "little")
    raw, data = body[8 : 8 + size], body[8 + size :]
    header = pairs_of(raw)
    choice = random.randrange(8)
    if header is None or choice == 0:
        raw = atheris.Mutate(raw, len(raw) + 16)
    elif choice == 1:
        data = data + bytes(random.choice([1, 8, 100])) if random.random() < 0.5 else data[: -random.choice([1, 4, 8])]
    elif choice == 2:
        data = random.randbytes(len(data))
    elif choice == 3 and isinstance(header, tuple) and header:
        name, entry = random.choice(header)
        raw = json_of((*header, (f"{name}{random.randrange(9)}", entry)))
    else:
        for _ in range(random.choice([1, 1, 2, 5])):
            header = mutate_json(header, random)
        if random.random() < 0.6:
            header, total = tile(header)
            data = data[:total].ljust(total, random.choice([b"\0", b"\1", b"\xff"]))
        raw = json_of(header) + b" " * random.randrange(9)
    if random.random() < 0.95:
        size = len(raw)
    return (size % 2**64).to_bytes(8, "little") + raw + data


def tile(header: Any) -> tuple[Any, int]:
    """A header with the places of its tensors mended to fit their shapes, if it has any; the bytes of all."""
    sizes = {name: dtype.itemsize for dtype, name in frames.DTYPES.items()}
    mended: list[tuple[str, Any]] = []
    offset = 0
    for name, entry in header if isinstance(header, tuple) else ():
        fields = dict(entry) if isinstance(entry, tuple) else {}
        shape = fields.get("shape")
        if (
            name != "__metadata__"
            and isinstance(shape, list)
            and all(type(each) is int and each >= 0 for each in shape)
        ):
            size = sizes.get(fields.get("dtype") if isinstance(fields.get("dtype"), str) else "", 1)
            for each in shape:
                size *= each
            if size <= LIMITS.message_bytes:
                places = [offset, offset + size]
                offset += size
                entry = tuple((key, places if key == "data_offsets" else inner) for key, inner in entry)
        mended.append((name, entry))
    return tuple(mended), offset


def seeds() -> list[bytes]:
    """Valid messages of each kind."""
    bodies: list[dict[str, Any]] = [
        {"z": torch.arange(12.0).reshape(3, 4), "y": torch.tensor([0, 9, 3])},
        {"n": 3, "lr": 0.5, "last": True, "z": torch.ones(2, 0, 3)},
        {
            "model/a.weight": torch.ones(40),
            "model/b": torch.tensor([True, False]),
            "c": torch.ones((), dtype=torch.bfloat16),
        },
        {str(index): torch.ones(index, dtype=dtype) for index, dtype in enumerate(frames.DTYPES)},
        {},
    ]
    text = {"round": 1, "clients": [0, 1], "deadline": None, "more": {"a": 1.5, "b": "text \u00e9"}}
    made = [join(wire.outgoing(wire.Head(wire.What.ASK, 7, "smashed"), body, 30)) for body in bodies]
    made += [join(wire.outgoing(wire.Head(what, 1), text)) for what in sorted(wire.TEXTS)]
    return [*made, b"".join(made)]


if __name__ == "__main__":
    frames._WHOLE = GROWTH
    torch.empty = counted_empty
    SEEDS = seeds()
    run(target, mutate, SEEDS, max_bytes=2**16)
