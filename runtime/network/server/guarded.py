"""A server whose clients are strangers: a message that it cannot use harms nobody but the client that sent it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from cutlayer.runtime.ground.text import one_line
from cutlayer.runtime.messages.boundary import ClientDroppedError, Payload, Upload
from cutlayer.runtime.rounds.schedule import RoundLostError
from cutlayer.runtime.rounds.session import Serving

T = TypeVar("T")

_UNUSABLE = (AssertionError, LookupError, TypeError, ValueError, RuntimeError)  # what a handler raises at a bad message


class GuardedServer:
    """Stands before the server in a round of clients elsewhere.

    Shapes and bounds of a message have been checked when it came. It may be of the right shapes and still come before
    another one, or not be of the batch of the one before it.

    Args:
        blame: called with a client whose message could not be used, and the reason.
    """

    def __init__(self, server: Serving, blame: Callable[[int, str], None]) -> None:
        self._server, self._blame = server, blame

    def down(self, client: int) -> Payload:
        return self._server.down(client)

    def serve(self, kind: str, inbox: Mapping[int, Payload]) -> dict[int, Payload | None]:
        """What the server replies.

        Raises:
            ClientDroppedError: it cannot use the message of the one client.
            RoundLostError: it cannot use what some of several clients sent; what they have done to the server cannot
                be undone otherwise.
        """
        if len(inbox) == 1:
            (client,) = inbox
            return self._or_drop(client, lambda: self._server.serve(kind, inbox))
        try:
            return self._server.serve(kind, inbox)
        except torch.OutOfMemoryError:
            raise
        except _UNUSABLE:
            lost = [client for client, message in inbox.items() if self._fails(kind, client, message)]
            if not lost:  # a fault of this program
                raise
        raise RoundLostError(f"the server cannot use what it was sent by client {', '.join(map(str, lost))}")

    def absorb(self, client: int, upload: Upload) -> None:
        self._or_drop(client, lambda: self._server.absorb(client, upload))

    def forget(self, client: int) -> None:
        self._server.forget(client)

    def _fails(self, kind: str, client: int, message: Payload) -> bool:
        """Whether a client's message fails alone too."""
        try:
            self._or_drop(client, lambda: self._server.serve(kind, {client: message}))
        except ClientDroppedError:
            return True
        return False

    def _or_drop(self, client: int, work: Callable[[], T]) -> T:
        try:
            return work()
        except torch.OutOfMemoryError:
            raise
        except _UNUSABLE as error:
            self._blame(client, f"the server cannot use what it was sent: {type(error).__name__}: {one_line(error)}")
            raise ClientDroppedError from None
