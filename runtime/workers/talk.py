"""What a run's process and its workers say to each other: a short head, then payloads as frames."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import torch

from cutlayer.runtime.ground.segments import Row
from cutlayer.runtime.messages.boundary import Reply
from cutlayer.runtime.messages.codec import decode
from cutlayer.runtime.messages.frames import Signature, pieces
from cutlayer.runtime.parties.store import Store
from cutlayer.runtime.scoring.fine_tuning import PersonalizeConfig
from cutlayer.runtime.scoring.scores import ClientScores, Measured


class Open(NamedTuple):
    """Begin a client's round (from 0), on these rows; frames: the message that opens it, then the rows.

    Where ``copy`` is not None, with the server's copy for the client, on these rows of the server's, which come last.
    """

    session: int
    client: int
    round: int
    rows: tuple[str, ...]
    copy: tuple[str, ...] | None


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


class Served(NamedTuple):
    """A message between a client and the server's copy for it: what it was, and what the server logged meanwhile.

    What was logged is a value and, of a tensor, its dtype.
    """

    kind: str
    expects_reply: bool
    up: Signature
    down: Signature | None
    logged: list[tuple[str, torch.dtype | None, float]]


class Copied(NamedTuple):
    """What the server's copy for a client has done, which rows it keeps or drops, and seconds that it computed."""

    served: list[Served]
    rows: dict[str, bool]
    seconds: float


class Ended(NamedTuple):
    """The client's upload; frames: its fields, then the rows that are True. What is False is dropped.

    Where there was a copy of the server, its states and its rows follow.
    """

    session: int
    samples: int
    metrics: dict[str, float]
    seconds: float
    rows: dict[str, bool]
    copied: Copied | None


class Failed(NamedTuple):
    """The client's program raised."""

    session: int
    error: Exception


Word: TypeAlias = Open | Resume | Close | Hold | Test | Scored | Said | Ended | Failed
Talk: TypeAlias = tuple[Any, list[Reply]]

Frame: TypeAlias = Sequence[bytes | memoryview]
"""A payload, encoded, in pieces: the memory of its tensors, which is read before the next word."""


class WorkerLink(Protocol):
    """A worker, as its run reaches it."""

    @property
    def pid(self) -> int | None:
        """Its process, on whatever machine; None where it is not known."""
        ...

    @property
    def end(self) -> str:
        """How it ended."""
        ...

    @property
    def starved(self) -> bool:
        """Whether it may have ended for want of memory."""
        ...

    @property
    def hopeless(self) -> bool:
        """Whether another one in its place would end the same way."""
        ...

    def say(self, head: Word, frames: Sequence[Frame] = (), common: bytes | None = None) -> None:
        """Send a word.

        Args:
            common: comes before the frames; what is the same object as the time before is not sent to a worker again.

        Raises:
            OSError: the worker is gone.
        """
        ...

    def hear(self) -> Talk:
        """The next word of the worker.

        Raises:
            EOFError, OSError: the worker is gone.
        """
        ...

    def kill(self) -> None:
        """End it, whatever it does: it keeps nothing. Then ``hear`` says that it is gone."""
        ...

    def close(self) -> None:
        """Give back what it took, once nobody hears it."""
        ...


class Engine(Protocol):
    """What starts workers."""

    @property
    def most(self) -> int:
        """Workers that have a core or a GPU each."""
        ...

    def begin(self, number: int, count: int) -> WorkerLink:
        """Start the worker with that number, from 0, of so many."""
        ...

    def close(self) -> None:
        """Give back what workers were given, once none is left."""
        ...


def size_of(frame: Frame) -> int:
    """Its bytes."""
    return sum(len(piece) for piece in frame)


def pack(head: Any, frames: Sequence[Frame]) -> bytes:
    """A head with its frames as bytes."""
    lead = pickle.dumps((head, [size_of(frame) for frame in frames]))
    return b"".join(chain((struct.pack("<I", len(lead)), lead), *frames))


def unpack(content: bytes | memoryview) -> Talk:
    """The head and the payloads, each of the receiver's own."""
    content = memoryview(content)
    start = 4 + struct.unpack_from("<I", content)[0]
    head, lengths = pickle.loads(content[4:start])
    payloads: list[Reply] = []
    for length in lengths:
        payloads.append(decode(content[start : start + length]))
        start += length
    return head, payloads


def given(rows: Mapping[str, Row | None]) -> tuple[dict[str, bool], list[Frame]]:
    """Rows as what a message says of them and as its frames."""
    return {name: row is not None for name, row in rows.items()}, [
        pieces(row) for row in rows.values() if row is not None
    ]


def taken(store: Store, client: int, names: Mapping[str, bool], rows: Iterator[Reply]) -> None:
    """Put the rows that came back into a store, and drop those that are no more."""
    for name, there in names.items():
        if there:
            store.put(client, name, cast(Row, next(rows)))
        else:
            store.drop(client, name)
