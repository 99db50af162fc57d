"""What both ends of a stream between server and client have in common."""

from __future__ import annotations

import sys

from cutlayer.runtime.network.wire import PIECE_BYTES
from cutlayer.runtime.transport import GrpcTransport

SERVICE, METHOD = "cutlayer.Federation", "Join"
_TURN_S = 1e-4


class LinkLostError(Exception):
    """A peer is gone, or its next message has not come in time."""


def hand_over_quickly() -> None:
    """Let threads take turns within a fraction of a millisecond, where Python's own five are half a message's way.

    A message goes through the hands of several threads, and one that waits for its turn delays it.
    """
    sys.setswitchinterval(_TURN_S)


def channel_options(config: GrpcTransport) -> list[tuple[str, int]]:
    """Options of both ends: pieces go through whole, a silent link is probed, and is cut if it does not answer."""
    milliseconds = max(1, round(1000 * config.keepalive))
    return [
        ("grpc.max_receive_message_length", PIECE_BYTES),
        ("grpc.max_send_message_length", PIECE_BYTES),
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
        ("grpc.http2.ping_timeout_ms", milliseconds),  # else a minute, where only TCP answers, not the process
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", milliseconds // 2),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.enable_http_proxy", 0),
    ]
