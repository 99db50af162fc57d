"""What a bad link does to what crosses it, and a link made of two TAP devices where the kernel cannot shape one.

`python -m tests.network.shaping NAME NAME SEED` carries frames between two TAP devices that it makes in its network
namespace, and takes the conditions from its standard input, a line of JSON for each change. It ends with its input.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass

_QUEUE = 1000
"""Frames that wait for one end of a link; more are lost, as where the kernel shapes it."""
_FRAME = 65536
_TUNSETIFF, _TAP, _NO_HEADER = 0x400454CA, 0x0002, 0x1000


@dataclass(frozen=True)
class Conditions:
    """Of each of a link's two directions; zeros are those of a good link.

    delay_ms: time that everything takes to cross.
    jitter_ms: by how much more or less it may be, evenly; nothing overtakes anything.
    loss_percent: share of packets that are lost.
    rate_mbit: 10^6 bits that get in in a second; 0: any number.
    """

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss_percent: float = 0.0
    rate_mbit: float = 0.0


class Line:
    """One direction of a link: when what goes in at one end comes out at the other. Times in seconds."""

    def __init__(self, seed: int) -> None:
        self.conditions = Conditions()
        self._random = random.Random(seed)
        self._free = self._last = 0.0

    def due(self, size: int, now: float) -> float | None:
        """When `size` bytes that go in now have come out; None if they are lost on the way."""
        on = self.conditions
        if self._random.random() * 100 < on.loss_percent:
            return None
        takes = size * 8 / (on.rate_mbit * 1e6) if on.rate_mbit else 0.0
        self._free = max(self._free, now) + takes
        delay = max(0.0, on.delay_ms + on.jitter_ms * self._random.uniform(-1, 1)) / 1000
        self._last = max(self._last, self._free + delay)
        return self._last


class _Direction:
    """From one TAP device to the other."""

    def __init__(self, source: int, sink: int, seed: int) -> None:
        self.source, self.sink = source, sink
        self.line = Line(seed)
        self.waiting: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        """Everything that waits at the source."""
        while True:
            try:
                frame = os.read(self.source, _FRAME)
            except OSError:  # nothing left, or the device is down
                return
            due = self.line.due(len(frame), time.monotonic())
            if due is not None and len(self.waiting) < _QUEUE:
                self.waiting.append((due, frame))

    def give(self) -> float | None:
        """Everything that is due; when the next will be."""
        while self.waiting and self.waiting[0][0] <= time.monotonic():
            frame = self.waiting.popleft()[1]
            try:
                os.write(self.sink, frame)
            except OSError:  # the device is down: the frame is lost
                continue
        return self.waiting[0][0] if self.waiting else None


def _tap(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_HEADER))
    return device


def encode(conditions: Conditions) -> str:
    """A line for the forwarder's input."""
    return json.dumps(asdict(conditions)) + "\n"


def forward(one: str, other: str, seed: int) -> None:
    """Carry frames until the input ends; says "ready" once both devices are there and after each change."""
    a, b = _tap(one), _tap(other)
    directions = (_Direction(a, b, 2 * seed), _Direction(b, a, 2 * seed + 1))
    takes: dict[int, Callable[[], None]] = {each.source: each.take for each in directions}
    print("ready", flush=True)
    while True:
        nexts = [due for due in (each.give() for each in directions) if due is not None]
        # A poll of the system rounds to milliseconds: what is due is asked for again, never given early.
        wait = max(0.0, min(nexts) - time.monotonic()) if nexts else None
        readable, _, _ = select.select([sys.stdin.fileno(), a, b], [], [], wait)
        for source in readable:
            if source != sys.stdin.fileno():
                takes[source]()
                continue
            line = sys.stdin.readline()
            if not line:
                return
            for each in directions:
                each.line.conditions = Conditions(**json.loads(line))
            print("ready", flush=True)


if __name__ == "__main__":
    forward(sys.argv[1], sys.argv[2], int(sys.argv[3]))
