"""Messages over a link: an envelope that says what comes, then a body, a text (JSON object) or a frame (safetensors).

A message is one or more pieces, each the content of one gRPC message. The first begins with the envelope: 16 bytes in
little-endian order, then the kind.

======  ==========================================
bytes   content
======  ==========================================
0       0xC1: this format, in its version 1
1       what the message is (``What``)
2-3     bytes of the kind
4-7     session
8-15    bytes of the body
======  ==========================================

The body follows in the same piece, and what has no room there in further ones.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, cast

from cutlayer.runtime.messages.boundary import Payload, Reply
from cutlayer.runtime.messages.bounds import MIB, Limits, WireError, read_object, shown
from cutlayer.runtime.messages.frames import FrameReader, chunks, pieces

CHUNK_BYTES = MIB
"""Bytes of a piece, the envelope aside."""

KIND_BYTES = 64
_ENVELOPE = struct.Struct("<BBHIQ")
_FORMAT = 0xC1

PIECE_BYTES = CHUNK_BYTES + _ENVELOPE.size + KIND_BYTES
"""The most bytes of a piece: what a channel has to let through."""


class What(IntEnum):
    """What a message is."""

    HELLO = 1
    WELCOME = 2
    ROUND = 3
    OPEN = 4
    TELL = 5
    ASK = 6
    REPLY = 7
    METRICS = 8
    UPLOAD = 9
    EVALUATE = 10
    EVALUATED = 11
    CLOSE = 12
    FAILED = 13
    END = 14
    REPORT = 15


_WHATS = {int(what): what for what in What}

TEXTS = frozenset(
    (What.HELLO, What.WELCOME, What.ROUND, What.EVALUATED, What.CLOSE, What.FAILED, What.END, What.REPORT)
)
"""Messages whose body is a JSON object; that of all others is the frame of a payload."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a message is, the session it belongs to (32 bits) and its kind (printable, up to 64 bytes).

    Raises:
        WireError: if one of them does not fit.
    """

    what: What
    session: int = 0
    kind: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.session < 2**32:
            raise WireError(f"session {shown(self.session)} does not fit in 32 bits")
        if not self.kind.isprintable() or len(self.kind.encode()) > KIND_BYTES:
            raise WireError(f"kind {shown(self.kind)} is not printable, or longer than {KIND_BYTES} bytes")


class Received(NamedTuple):
    """A message that is in: a text's object or a frame's payload; bytes of its body and of its envelope."""

    head: Head
    body: Reply | dict[str, Any]
    frame_bytes: int
    envelope_bytes: int


def outgoing(head: Head, body: Payload | Mapping[str, Any], chunk: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The pieces of one message, in order; a frame has the bytes of ``codec.encode``, an empty one has none.

    Tensors are read as the iterator moves on: they must not change before it is through.

    Raises:
        ValueError: if the body cannot be written; before the first piece.
    """
    if head.what in TEXTS:
        parts: Iterable[bytes | memoryview] = [
            json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        ]
    else:
        parts = pieces(cast(Payload, body)) if body else []
    kind = head.kind.encode()
    length = sum(map(len, parts))
    envelope = _ENVELOPE.pack(_FORMAT, head.what, len(kind), head.session, length) + kind
    return chunks(parts, chunk, envelope)


class _Body(Protocol):
    def feed(self, data: memoryview) -> None: ...

    def finish(self) -> Reply | dict[str, Any]: ...


class _TextReader:
    """One text on its way in."""

    def __init__(self, length: int, limits: Limits) -> None:
        if length > limits.text_bytes:
            raise WireError(f"a text of {length} bytes; {limits.text_bytes} are accepted")
        self._raw = bytearray()

    def feed(self, data: memoryview) -> None:
        self._raw += data

    def finish(self) -> dict[str, Any]:
        return read_object(self._raw, "a text")


class _NoFrame:
    """The frame of an empty payload: nothing."""

    def feed(self, data: memoryview) -> None: ...

    def finish(self) -> Reply:
        return {}


class Incoming:
    """What one peer sends: pieces in, messages out. After an error nothing more of it is read.

    ``limits`` and ``allowed`` (what it may send) count from the next message on when they are set anew.
    """

    def __init__(self, limits: Limits, allowed: Collection[What]) -> None:
        self.limits, self.allowed = limits, allowed
        self._head: Head | None = None
        self._body: _Body = _NoFrame()
        self._length = self._missing = self._envelope = 0
        self._broken = False

    @property
    def partial(self) -> bool:
        """Whether a message has begun and not ended: a link that ends now has cut it."""
        return self._head is not None

    def feed(self, data: bytes) -> Received | None:
        """Take in a piece; the message, if it is complete with this.

        Raises:
            WireError: if the piece does not belong to a message that is allowed and within the limits.
        """
        if self._broken:
            raise WireError("nothing more is read of a peer that did not keep to the protocol")
        try:
            return self._feed(memoryview(data))
        except Exception:
            self._broken = True
            self._body = _NoFrame()
            raise

    def _feed(self, data: memoryview) -> Received | None:
        if not data:
            raise WireError("an empty piece")
        if self._head is None:
            self._head, data = self._open(data)
        if len(data) > self._missing:
            raise WireError(f"{len(data) - self._missing} bytes behind the end of a message")
        self._missing -= len(data)
        self._body.feed(data)
        if self._missing:
            return None
        received = Received(self._head, self._body.finish(), self._length, self._envelope)
        self._head, self._body = None, _NoFrame()
        return received

    def _open(self, data: memoryview) -> tuple[Head, memoryview]:
        """The head of a message, and what its first piece has behind the envelope."""
        if len(data) < _ENVELOPE.size:
            raise WireError(f"a message begins with {len(data)} bytes; its envelope has {_ENVELOPE.size}")
        form, what, kind, session, length = _ENVELOPE.unpack_from(data)
        if form != _FORMAT:
            raise WireError(f"a message begins with byte {form:#04x}, not {_FORMAT:#04x}: no peer of this version")
        known = _WHATS.get(what)
        if known is None or known not in self.allowed:
            expected = ", ".join(each.name for each in sorted(self.allowed))
            raise WireError(f"message {known.name if known else what} is not expected; {expected}")
        self._envelope = _ENVELOPE.size + kind
        if kind > KIND_BYTES or len(data) < self._envelope:
            raise WireError(f"a kind of {kind} bytes; {KIND_BYTES} are accepted, all in the first piece")
        try:
            head = Head(known, session, str(data[_ENVELOPE.size : self._envelope], "utf-8"))
        except UnicodeDecodeError:
            raise WireError("a kind that is not UTF-8") from None
        self._length = self._missing = length
        self._body = self._reader(head.what, length)
        return head, data[self._envelope :]

    def _reader(self, what: What, length: int) -> _Body:
        if what in TEXTS:
            return _TextReader(length, self.limits)
        return FrameReader(length, self.limits) if length else _NoFrame()
