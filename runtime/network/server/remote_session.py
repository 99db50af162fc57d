"""A client's round on its machine, as the training loop sees it."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from cutlayer.runtime.ground.text import one_line
from cutlayer.runtime.messages.boundary import MODEL, ClientDroppedError, Message, Payload, Reply, Upload
from cutlayer.runtime.messages.bounds import WireError
from cutlayer.runtime.network.check import check_values
from cutlayer.runtime.network.links import LinkLostError
from cutlayer.runtime.network.server.connection import Connection
from cutlayer.runtime.network.wire import Head, What

log = logging.getLogger(__name__)

# The messages with which a client ends its round, and seconds for the rest of them where the first is there in time.
_LAST, _GRACE_S = (What.METRICS, What.REPORT, What.UPLOAD), 5.0
MOST_MESSAGES, A_STEP = 64, 32
"""Messages of a client in a round, at most: so many, and so many more for each of its steps."""
_METRICS, _NAME = 64, re.compile(r"[\w./-]{1,64}", re.ASCII)


class RemoteSession:
    """A client's round on its machine.

    Args:
        opening: what the client learns about the round before its first message.
        check: raises WireError at a message that cannot be right: its kind and its fields.
        names: of the metrics that the client has reported so far, to be added to.
        most: messages that the client may send before its upload.
        until: when the round has to be over, on the monotonic clock.
    """

    def __init__(
        self,
        connection: Connection,
        opening: Mapping[str, Any],
        check: Callable[[str, Payload], None],
        *,
        timeout: float,
        until: float,
        on_close: Callable[[dict[str, Any] | None], None],
        names: set[str] | None = None,
        most: int = sys.maxsize,
    ) -> None:
        self._connection, self._check = connection, check
        self._timeout, self._until = timeout, until
        self._on_close = on_close
        self._names = set[str]() if names is None else names
        self._opening: Mapping[str, Any] | None = opening
        self._kind = MODEL
        self._report: dict[str, Any] | None = None
        self._replied = self._finished = self._late = False
        connection.session += 1
        self._number = connection.session
        self._left = self._most = most

    def send(self, message: Reply) -> None:
        if self._opening is not None:
            self._connection.send(Head(What.ROUND, self._number), self._opening)
            self._opening = None
            self._connection.become("working")
            self._connection.send(Head(What.OPEN, self._number, MODEL), message)
        else:
            self._connection.send(Head(What.REPLY, self._number, self._kind), message)
            self._replied = True
        self._expect()

    def receive(self) -> Message | Upload:
        try:
            return self._receive()
        except (LinkLostError, WireError) as error:
            if isinstance(error, WireError):
                log.warning("client %d is lost: %s", self._connection.client, error)
                self._connection.reject(error)
            else:
                self._connection.cut(str(error))  # the hub logs why it is gone
            raise ClientDroppedError from None

    def _expect(self) -> None:
        self._connection.expect(What.TELL, What.ASK, What.METRICS, What.REPORT, What.UPLOAD, What.FAILED)

    def _receive(self) -> Message | Upload:
        what, kind, fields = self._next()
        if what in (What.TELL, What.ASK):
            if not self._left:
                raise WireError(f"more than {self._most} messages in a round")
            self._left -= 1
            self._check(kind, fields)
            self._kind = kind
            if what is What.TELL:
                self._expect()
            return Message(kind, fields, expects_reply=what is What.ASK)
        metrics = self._in_order(what, What.METRICS, fields)
        self._expect()
        what, _, self._report = self._next()
        self._in_order(what, What.REPORT, {})
        self._expect()
        what, _, fields = self._next()
        self._check(MODEL, self._in_order(what, What.UPLOAD, fields))
        self._finished = True
        return Upload(fields, int(metrics.pop("samples")), {name: float(value) for name, value in metrics.items()})

    def _in_order(self, what: What, wanted: What, fields: dict[str, Any]) -> dict[str, Any]:
        if what is not wanted:
            raise WireError(f"message {what.name} where {wanted.name} is expected")
        if wanted is What.METRICS:
            if len(fields) > _METRICS or any(isinstance(value, Tensor) for value in fields.values()):
                raise WireError(f"metrics that are no numbers, or more than {_METRICS}")
            samples = fields.get("samples")
            if type(samples) is not int or samples != self._connection.facts["samples"]:
                raise WireError(f"{samples!r} samples; the client came with {self._connection.facts['samples']}")
            if not all(_NAME.fullmatch(name) for name in fields):
                raise WireError("a metric whose name is no word")
            if len(self._names | fields.keys()) > _METRICS:
                raise WireError(f"more than {_METRICS} metrics in its rounds")
            self._names.update(fields)
            check_values(fields)
        return fields

    def _next(self) -> tuple[What, str, dict[str, Any]]:
        """The next message of this round; those of a round that was given up are passed over."""
        while True:
            left = self._until - time.monotonic()
            if left <= 0 and not self._late and self._connection.waiting in _LAST:
                # It was done in time, and the turn of others before it has used that up.
                self._late, left = True, _GRACE_S
                self._until = time.monotonic() + left
            if left <= 0:
                raise LinkLostError("the round's deadline has passed")
            self._expect()
            received = self._connection.receive(min(self._timeout, left))
            head = received.head
            if head.session == self._number:
                break
            if head.session > self._number:
                raise WireError(f"a message of round {head.session} in round {self._number}")
        if self._replied and self._connection.behind:  # else answers that nobody reads would fill the memory
            raise WireError("a further message before the answer to the one before was taken")
        if head.what is What.FAILED:
            raise LinkLostError(f"its program failed: {one_line(received.body.get('error'))}")
        return head.what, head.kind, dict(received.body)

    def close(self) -> None:
        self._connection.become("idle")
        if not self._finished and not self._connection.over.done():
            self._connection.send(Head(What.CLOSE, self._number), {})
        self._on_close(self._report if self._finished else None)
