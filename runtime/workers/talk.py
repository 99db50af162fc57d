"""What a run's process and its workers say to each other: a short head, then payloads as frames."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeAlias

from cutlayer.runtime.ground.segments import Row
from cutlayer.runtime.messages.boundary import Payload, Reply
from cutlayer.runtime.messages.codec import decode
from cutlayer.runtime.messages.frames import pieces
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from cutlayer.runtime.scoring.scores import ClientScores, Measured


class Open(NamedTuple):
    """Begin a client's round (from 0), on these rows; frames: the message that opens it, then the rows."""

    session: int
    client: int
    round: int
    rows: tuple[str, ...]


class Resume(NamedTuple):
    """The reply to what the client asked; frames: the reply."""

    session: int


class Close(NamedTuple):
    """The round is given up."""

    session: int


class Hold(NamedTuple):
    """What the server's parts are now, for the tests that follow; frames: their whole state."""

    session: int


class Test(NamedTuple):
    """Test a client's own model, with the held parts for the others; frames: the rows of its parts.

    With ``tuning`` the client fine-tunes it, and is tested as ``Tuner.scores`` says.
    """

    session: int
    client: int
    rows: tuple[str, ...]
    tuning: PersonalizeConfig | None = None


class Scored(NamedTuple):
    """What a test found."""

    session: int
    scores: ClientScores | list[Measured]


class Said(NamedTuple):
    """A message of the client; frames: its fields."""

    session: int
    kind: str
    expects_reply: bool


class Ended(NamedTuple):
    """The client's upload; frames: its fields, then the rows that are True. What is False is dropped."""

    session: int
    samples: int
    metrics: dict[str, float]
    seconds: float
    rows: dict[str, bool]


class Failed(NamedTuple):
    """The client's program raised."""

    session: int
    error: Exception


Word: TypeAlias = Open | Resume | Close | Hold | Test | Scored | Said | Ended | Failed
Talk: TypeAlias = tuple[Any, list[Reply]]


def say(connection: Connection, head: Word, payloads: Sequence[Payload] = ()) -> None:
    """Send a head with its payloads.

    Raises:
        OSError: the other end is gone.
        ValueError: a value of a payload has no place in a frame.
    """
    frames = [b"".join(pieces(payload)) for payload in payloads]
    lead = pickle.dumps((head, [len(frame) for frame in frames]))
    connection.send_bytes(b"".join((struct.pack("<I", len(lead)), lead, *frames)))


def hear(connection: Connection) -> Talk:
    """The next head and its payloads, each of the receiver's own.

    Raises:
        EOFError, OSError: the other end is gone.
    """
    content = connection.recv_bytes()
    start = 4 + struct.unpack_from("<I", content)[0]
    head, lengths = pickle.loads(content[4:start])
    found: list[Reply] = []
    for length in lengths:
        found.append(decode(memoryview(content)[start : start + length]))
        start += length
    return head, found


def given(rows: Mapping[str, Row | None]) -> tuple[dict[str, bool], list[Payload]]:
    """Rows as what a message says of them and as its payloads."""
    return {name: row is not None for name, row in rows.items()}, [row for row in rows.values() if row is not None]
