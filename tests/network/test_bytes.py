"""The bytes of the ledger are those of the frames in its messages, and the sockets carried these and gRPC's framing.

The kernel's own count of each socket (TCP_INFO, read before it closes) is held against a bound from what HTTP/2 and TLS
add: so nothing travels that no message has, and no message travels uncounted.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cutlayer.runtime.network.certificates.authority import Order, make_certificates
from cutlayer.runtime.network.wire import TEXTS, Head, Incoming, outgoing
from cutlayer.runtime.rounds.federation import Federation
from tests.network.serving import served, start_client

pytest.importorskip("grpc", reason="the extra grpc is not installed")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP_INFO is read as Linux lays it out")

CLIENTS, ROUNDS = 2, 2
ENVELOPE = struct.Struct("<BBHIQ")
# struct tcp_info of linux/tcp.h: tcpi_unacked, tcpi_notsent_bytes, tcpi_bytes_acked and tcpi_bytes_received.
_UNACKED, _ACKED, _RECEIVED, _NOT_SENT, _INFO = 24, 120, 128, 144, 192
DIRECTIONS = ("up", "down")

# RFC 9113: a frame's head, a window update, a ping, an entry of a SETTINGS frame; gRPC: what stands before a message.
FRAME, WINDOW_UPDATE, PING, SETTING, PREFIX = 9, 9 + 4, 9 + 8, 6, 5
DATA = 16384  # bytes of a frame that every peer has to take
SETTINGS, CHANGE = FRAME + 10 * SETTING, FRAME + 3 * SETTING  # the first ones; windows and the size of a frame anew
PREFACE, HEADERS = 24, FRAME + 1024  # a client's first words; a call's headers, its path and user agent, and trailers
RECORD = 5 + 1 + 16  # RFC 8446: a record's head, its type and its tag; one has up to 16384 bytes
# Certificates, of about 600 bytes, the rest of a handshake, and two session tickets with the peer's certificate.
HANDSHAKE = 8192


@dataclass
class Way:
    """What went one way: frames' bytes by kind; pieces of messages, their bytes, and the HTTP/2 frames they need."""

    frames: Counter[str] = field(default_factory=Counter)
    pieces: int = 0
    data: int = 0
    needed: int = 0

    def add(self, piece: bytes) -> None:
        self.pieces += 1
        self.data += len(piece)
        self.needed += math.ceil((PREFIX + len(piece)) / DATA)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> dict[str, Way]:
    """What the server's end of the wire sends and receives, by its pieces alone."""
    ways = {direction: Way() for direction in DIRECTIONS}
    taken = Incoming.feed

    def sending(head: Head, body: Any) -> Iterator[bytes]:
        for index, piece in enumerate(outgoing(head, body)):
            ways["down"].add(piece)
            if head.what not in TEXTS:
                ways["down"].frames[head.kind] += len(piece) - (0 if index else ENVELOPE.size + len(head.kind))
            yield piece

    def receiving(self: Incoming, piece: bytes) -> Any:
        ways["up"].add(piece)
        received = taken(self, piece)
        if received is not None and received.head.what not in TEXTS:
            ways["up"].frames[received.head.kind] += received.frame_bytes
        return received

    monkeypatch.setattr("cutlayer.runtime.network.server.connection.outgoing", sending)
    monkeypatch.setattr(Incoming, "feed", receiving)
    return ways


def accepted(port: int) -> Iterator[socket.socket]:
    """This process's sockets that others have connected to a port."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            each = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed meanwhile
        with each:
            try:
                connected = each.family in (socket.AF_INET, socket.AF_INET6) and each.getpeername()
            except OSError:
                continue
            if connected and each.getsockname()[1] == port:
                yield each


def carried(port: int) -> dict[str, int]:
    """Bytes of each way over all sockets of a port, once all has arrived."""
    until = time.monotonic() + 30
    while True:
        infos = [each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO) for each in accepted(port)]
        assert len(infos) == CLIENTS
        if not any(struct.unpack_from("<I", info, at)[0] for info in infos for at in (_UNACKED, _NOT_SENT)):
            break
        assert time.monotonic() < until, "bytes are still under way"
        time.sleep(0.01)
    places = {"up": _RECEIVED, "down": _ACKED}
    return {way: sum(struct.unpack_from("<Q", info, at)[0] for info in infos) for way, at in places.items()}


def most(way: Way, other: Way, seconds: float, keepalive: float, tls: bool) -> int:
    """The bytes that a way's messages take at most, with all that the transport says of itself and of the other way."""
    # A frame ends where it is full, where its message ends, or where a window does: twice as many as are needed.
    frames, coming = 2 * way.needed, 2 * other.needed
    # To what comes: a window update of the stream and one of the connection, a ping that measures the link, and new
    # settings if that has changed; and the other end's pings and settings are answered.
    answers = coming * (2 * WINDOW_UPDATE + PING + CHANGE) + frames * (PING + FRAME)
    probes = 2 * PING * CLIENTS * math.ceil(1 + seconds / keepalive)
    opening = CLIENTS * (PREFACE + 2 * SETTINGS + WINDOW_UPDATE + HEADERS)
    total = way.data + PREFIX * way.pieces + FRAME * frames + answers + probes + opening
    if tls:  # at most a record for each frame, of either sort
        records = frames + coming * 4 + frames * 2 + CLIENTS * 8 + 2 * CLIENTS * math.ceil(1 + seconds / keepalive)
        total += RECORD * records + CLIENTS * HANDSHAKE
    return total


def charged(federation: Federation) -> dict[str, Counter[str]]:
    """The ledger's framed bytes by direction and kind."""
    found: dict[str, Counter[str]] = {direction: Counter() for direction in DIRECTIONS}
    for direction, kind, _, count in federation.ledger.totals():
        found[direction][kind] += count.framed
    return found


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("algorithm", ["sl_single_server", "fed_avg"])
def test_the_ledgers_bytes_are_those_on_the_wire(
    algorithm: str, tls: bool, wire: dict[str, Way], tmp_path: Path
) -> None:
    more: tuple[str, ...] = ()
    if tls:
        make_certificates(tmp_path / "certs", Order(server=("localhost",), clients=tuple(range(CLIENTS))))
        more = (f"transport.certificates={tmp_path / 'certs'}",)
    setting = (f"algorithm={algorithm}", f"num_clients={CLIENTS}", f"rounds={ROUNDS}", "model=mlp", *more)
    start = time.monotonic()
    with served(tmp_path, *setting, clients=0) as federation:
        hub = federation.clients.hub
        processes = [start_client(client, hub.port, tmp_path, *more) for client in range(CLIENTS)]
        while not federation.done:
            federation.step()
        assert [seen.joined for seen in hub.seen] == [1] * CLIENTS
        counted, seconds = carried(hub.port), time.monotonic() - start
    assert [process.error() for process in processes] == [""] * CLIENTS
    assert charged(federation) == {direction: way.frames for direction, way in wire.items()}
    for direction, other in zip(DIRECTIONS, reversed(DIRECTIONS), strict=True):
        way = wire[direction]
        assert way.data + PREFIX * way.pieces < counted[direction]
        assert counted[direction] <= most(way, wire[other], seconds, hub.config.keepalive, tls)
