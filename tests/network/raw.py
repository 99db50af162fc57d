"""Peers that speak HTTP/2 by hand, as no library lets one: with no window, with many streams, or not at all.

All of a crowd's connections are served by one thread, which answers what keeps a connection alive: settings and probes.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from cutlayer.runtime.network.links import METHOD, SERVICE
from cutlayer.runtime.network.wire import Head, What, outgoing

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACK, END_STREAM, END_HEADERS = 1, 1, 4
_WINDOW = 4  # the setting INITIAL_WINDOW_SIZE


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    """One frame of HTTP/2."""
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content


def greeting(window: int = 65535) -> bytes:
    """What a connection begins with: so many bytes may be sent on each stream."""
    return PREFACE + frame(SETTINGS, 0, 0, _WINDOW.to_bytes(2, "big") + window.to_bytes(4, "big"))


def request(stream: int, **more: str) -> bytes:
    """The headers that open a stream to the server's one method."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/{SERVICE}/{METHOD}",
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    fields |= {key.replace("_", "-"): value for key, value in more.items()}
    block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields.items())
    return frame(HEADERS, END_HEADERS, stream, block)


def _text(text: str) -> bytes:
    raw = text.encode()
    if len(raw) < 127:
        return bytes([len(raw)]) + raw
    rest, length = len(raw) - 127, b"\x7f"
    while rest >= 128:
        length, rest = length + bytes([rest % 128 | 128]), rest // 128
    return length + bytes([rest]) + raw


def data(stream: int, content: bytes, compressed: bool = False) -> bytes:
    """One gRPC message of up to 16 kB on a stream."""
    return frame(DATA, 0, stream, bytes([compressed]) + len(content).to_bytes(4, "big") + content)


def says(stream: int, what: What, body: Mapping[str, Any]) -> bytes:
    """A text of the platform's own, on a stream."""
    return b"".join(data(stream, piece) for piece in outgoing(Head(what), body))


class Crowd:
    """Connections to a port of this machine; a context manager, which ends them all."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._port, self._tls = port, tls
        self._sockets: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._came = 0
        self._raw: dict[int, bytearray] = {}
        self.frames: dict[int, Counter[int]] = {}
        self.closed: set[int] = set()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Crowd:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for each in self._sockets.values():
            each.close()
        self._selector.close()

    @property
    def open(self) -> int:
        """How many connections the server has not ended."""
        return self._came - len(self.closed)

    def come(self, first: bytes = b"") -> int:
        """Open a connection and say something; its number, whether the server keeps it or not."""
        made = socket.create_connection(("127.0.0.1", self._port), timeout=10)
        if self._tls is not None:
            made = self._tls.wrap_socket(made, server_hostname="localhost")
        number = self._came
        self._came += 1
        self._sockets[number], self._raw[number], self.frames[number] = made, bytearray(), Counter()
        self.say(number, first)
        with self._lock:
            self._selector.register(made, selectors.EVENT_READ, number)
        return number

    def say(self, number: int, raw: bytes) -> None:
        """Send bytes, if the server takes them."""
        with contextlib.suppress(OSError):
            self._sockets[number].sendall(raw)

    def leave(self, number: int) -> None:
        """End a connection."""
        with self._lock:
            if number not in self.closed:
                self._selector.unregister(self._sockets[number])
                self.closed.add(number)
            self._sockets[number].close()

    def _serve(self) -> None:
        while not self._over.is_set():
            with self._lock:
                ready = self._selector.select(0)
                for key, _ in ready:
                    self._hear(key.data)
            self._over.wait(0.01 if not ready else 0)

    def _hear(self, number: int) -> None:
        try:
            raw = self._sockets[number].recv(1 << 16)
        except (TimeoutError, ssl.SSLWantReadError):
            return
        except OSError:
            raw = b""
        if not raw:
            self._selector.unregister(self._sockets[number])
            self.closed.add(number)
            return
        waiting = self._raw[number]
        waiting += raw
        while len(waiting) >= 9 and len(waiting) >= 9 + (length := int.from_bytes(waiting[:3], "big")):
            kind, flags, content = waiting[3], waiting[4], bytes(waiting[9 : 9 + length])
            del waiting[: 9 + length]
            self.frames[number][kind] += 1
            if kind in (SETTINGS, PING) and not flags & ACK:
                self.say(number, frame(kind, ACK, 0, content if kind == PING else b""))
