"""A client's end of the network: one stream to the server, used by one thread."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import grpc

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.messages.bounds import Limits, WireError
from cutlayer.runtime.network.certificates.tls import client_credentials, is_loopback
from cutlayer.runtime.network.links import METHOD, SERVICE, LinkLostError, channel_options, hand_over_quickly
from cutlayer.runtime.network.wire import Head, Incoming, Received, What, outgoing
from cutlayer.runtime.transport import GrpcTransport

# Pieces that wait to be sent, and messages that wait to be read: more of them gain nothing and cost memory.
_PIECES, _MESSAGES = 2, 2
# What gRPC says of an address that it cannot connect to, before it says why.
_TRIED = re.compile(r"^failed to connect to all addresses; last error: \w+: ipv[46]:\S+: ")
_ANSWERS = frozenset({What.WELCOME, What.ROUND, What.OPEN, What.REPLY, What.EVALUATE, What.CLOSE, What.END})


class ServerLink:
    """One stream to the server; what is sent leaves in order, what comes is read ahead by a message or two.

    Args:
        address: HOST:PORT of the server.

    Raises:
        ConfigError: the server is on another machine and there are no certificates.
    """

    def __init__(self, address: str, client: int, config: GrpcTransport) -> None:
        hand_over_quickly()
        # A pool of its own: else gRPC waits by itself before it tries an address again that has just failed.
        options = [*channel_options(config), ("grpc.use_local_subchannel_pool", 1)]
        if config.certificates is not None:
            credentials = client_credentials(config.certificates, client)
            self._channel = grpc.secure_channel(address, credentials, options)
        elif config.insecure or is_loopback(address.rpartition(":")[0].strip("[]")):
            self._channel = grpc.insecure_channel(address, options)
        else:
            expected = f"a folder of certificates for {address}, or transport.insecure=true"
            raise ConfigError("transport.certificates", None, expected)
        self._outbox: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._over = self._done = False
        self._end: Exception | None = None
        self._inbox: deque[Received] = deque()
        self._incoming = Incoming(Limits(message_bytes=config.message_bytes), _ANSWERS)
        # Bytes go as they are: there is no protobuf.
        self._call: Any = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")(self._pieces())
        self._reader = threading.Thread(target=self._read, name="network", daemon=True)
        self._reader.start()

    def send(self, what: What, body: Any, session: int = 0, kind: str = "") -> None:
        """Send a message; returns when most of it has left. Once the stream is over nothing is sent."""
        for piece in outgoing(Head(what, session, kind), body):
            with self._changed:
                self._changed.wait_for(lambda: self._over or len(self._outbox) < _PIECES)
                if self._over:
                    break
                self._outbox.append(piece)
                self._changed.notify_all()

    def receive(self, whats: Collection[What] = _ANSWERS) -> Received:
        """The next message, one of these.

        Raises:
            LinkLostError: the stream is over; says why.
            WireError: it is another one, or none at all.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self._inbox) or self._end is not None)
            if not self._inbox:
                assert self._end is not None
                raise self._end
            received = self._inbox.popleft()
            self._changed.notify_all()
        if received.head.what not in whats:
            raise WireError(f"message {received.head.what.name} is not expected")
        return received

    def push_back(self, received: Received) -> None:
        """Make a message the next one again."""
        with self._changed:
            self._inbox.appendleft(received)

    def peek(self) -> What | None:
        """What the next message is, if it is here already.

        Raises:
            LinkLostError, WireError: as ``receive``.
        """
        with self._changed:
            if not self._inbox and self._end is not None:
                raise self._end
            return self._inbox[0].head.what if self._inbox else None

    def close(self) -> None:
        """End the stream."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._call.cancel()
        self._channel.close()
        self._reader.join()

    def finish(self, seconds: float) -> None:
        """Send nothing more; return when the server has ended the stream, as on a last word, or after some seconds."""
        with self._changed:
            self._done = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._end is not None, seconds)

    # ------------------------------------------------------------------ in gRPC's threads

    def _pieces(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over or self._done or bool(self._outbox))
                if self._over or not self._outbox:
                    return
                piece = self._outbox.popleft()
                self._changed.notify_all()
            yield piece

    def _read(self) -> None:
        end: Exception = LinkLostError("the server has ended the stream")
        try:
            for data in self._call:
                received = self._incoming.feed(data)
                if received is not None:
                    self._put(received)
        except WireError as error:
            end = error
        except grpc.RpcError as error:
            end = LinkLostError(_reason(error))
        except Exception as error:
            end = LinkLostError(f"{type(error).__name__}: {error}")
        with self._changed:
            self._over, self._end = True, end
            self._changed.notify_all()

    def _put(self, received: Received) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._inbox) < _MESSAGES)
            self._inbox.append(received)
            self._changed.notify_all()


def _reason(error: Any) -> str:
    """gRPC's reason in one line."""
    details = _TRIED.sub("", " ".join(str(error.details() or "").split()))
    return f"{error.code().name.lower().replace('_', ' ')}: {details[:300]}" if details else str(error.code())
