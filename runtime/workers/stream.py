"""Heads and frames over a socket, written from the tensors' own memory and read into that in which they stay."""

from __future__ import annotations

import pickle
import socket
import struct
from collections import deque
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

from cutlayer.runtime.messages.boundary import Reply
from cutlayer.runtime.messages.bounds import Limits
from cutlayer.runtime.messages.frames import FrameReader
from cutlayer.runtime.workers.talk import Frame, size_of

_LENGTH = struct.Struct("<I")
_AT_ONCE = 64  # pieces that are handed to the system together
_PIECE = 1 << 18  # bytes that are read together, which a processor's cache keeps until they are where they belong


class WorkerStream:
    """One end of a socket; closed with it. One thread may send while another receives."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._buffer = memoryview(bytearray(_PIECE))

    def send(self, head: Any, frames: Sequence[Frame]) -> None:
        """Send a head, which is pickled, with its frames.

        Raises:
            OSError: the other end is gone.
        """
        lead = pickle.dumps((head, [size_of(frame) for frame in frames]))
        pieces = chain((_LENGTH.pack(len(lead)) + lead,), *frames)
        left = deque(memoryview(piece).cast("B") for piece in pieces if len(piece))
        while left:
            sent = self.socket.sendmsg(list(islice(left, _AT_ONCE)))
            while left and sent >= len(left[0]):
                sent -= len(left.popleft())
            if sent:
                left[0] = left[0][sent:]

    def receive_head(self) -> tuple[Any, list[int]]:
        """The next head, and the lengths of the frames that have to be received then.

        Raises:
            EOFError, OSError: the other end is gone.
        """
        (length,) = _LENGTH.unpack(self.receive_bytes(_LENGTH.size))
        return pickle.loads(self.receive_bytes(length))

    def receive_bytes(self, length: int) -> bytearray:
        """So many bytes."""
        found = bytearray(length)
        view = memoryview(found)
        while view:
            view = view[self._read(view) :]
        return found

    def receive_payload(self, length: int) -> Reply:
        """The payload of a frame of so many bytes."""
        reader = FrameReader(length, Limits(message_bytes=length))
        while length:
            count = self._read(self._buffer[:length])
            reader.feed(self._buffer[:count])
            length -= count
        return reader.finish()

    def _read(self, room: memoryview) -> int:
        count = self.socket.recv_into(room)
        if not count:
            raise EOFError
        return count
