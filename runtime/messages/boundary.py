"""The boundary between a client and the server: messages, and nothing else, cross it.

A client is a generator. ``reply = yield ask("smashed", z=z, y=y)`` suspends it with its autograd graph alive until the
server answers, ``yield tell("smashed", z=z, y=y)`` is one-way, and ``return payload`` is the upload that ends its part
of the round. A server answers by message kind. Payloads are flat mappings of a name to a tensor or a number; a name
``part/parameter`` belongs to the *field* ``part``, which is what the ledger lists.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from cutlayer.runtime.messages.crossing import packed

Value: TypeAlias = Tensor | int | float | bool
Payload: TypeAlias = Mapping[str, Value]
Reply: TypeAlias = dict[str, Value]
Fields: TypeAlias = Mapping[str, Value | tuple[Tensor, ...]]
"""What a party writes into a message; several tensors that cross a cut are one field, and several entries of a payload.
"""

MODEL = "model"
"""Kind of the message that opens a client's round and of the upload that ends it."""

METRICS = "metrics"
"""Kind of what clients report of themselves (sample count, training loss): counted, but not training traffic."""

SCALAR_BYTES = 8
"""Size of a plain number in a payload: it travels as a 64-bit value."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a client to the server: its kind, its payload, and whether the client waits for a reply."""

    kind: str
    fields: Payload
    expects_reply: bool


@dataclass(frozen=True, slots=True)
class Upload:
    """The end of a client's round: what it returned, the number of its samples, and its own metrics.

    Reading a metric may wait for what a GPU still computes.
    """

    fields: Payload
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


ClientProgram: TypeAlias = Generator[Message, Reply, Fields | None]


class ClientDroppedError(Exception):
    """A client left in the middle of its round: what it staged is discarded, the others continue."""


def ask(kind: str, /, **fields: Value | tuple[Tensor, ...]) -> Message:
    """A message that waits for the server's reply: ``reply = yield ask("smashed", z=z, y=y)``."""
    return Message(kind, packed(fields), expects_reply=True)


def tell(kind: str, /, **fields: Value | tuple[Tensor, ...]) -> Message:
    """A one-way message: ``yield tell("smashed", z=z, y=y)``."""
    return Message(kind, packed(fields), expects_reply=False)


def owned(payload: Payload) -> Reply:
    """The payload as its receiver gets it: tensors detached and copied, so that neither side can reach the other's.

    They are contiguous, as they would be had they come over a network.

    Raises:
        TypeError: if a value is neither a tensor nor a number, the only things that may cross.
    """
    received: Reply = {}
    for name, value in payload.items():
        if isinstance(value, Tensor):
            received[name] = value.detach().clone(memory_format=torch.contiguous_format)
        elif isinstance(value, (bool, int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
            received[name] = value
        else:
            raise TypeError(f"{name}: only tensors and numbers cross the boundary, not {type(value).__name__}")
    return received


def on_device(payload: Payload, device: torch.device) -> Reply:
    """What came from another process, where the party computes."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in payload.items()}


def payload_bytes(value: Value) -> int:
    """Bytes of one value as the papers count them: element count times element size."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) else SCALAR_BYTES


def field_of(name: str) -> str:
    """The ledger's field of a payload name: ``client/conv1.weight`` belongs to ``client``."""
    return name.partition("/")[0]


def flatten(part: str, state: Mapping[str, Tensor]) -> dict[str, Value]:
    """The state of a part as payload entries ``part/name``."""
    return {f"{part}/{name}": tensor for name, tensor in state.items()}


def unflatten(payload: Payload) -> dict[str, dict[str, Tensor]]:
    """Payload entries ``part/name`` as one state per part; entries without a part are left out."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in payload.items():
        part, separator, name = key.partition("/")
        if separator and isinstance(value, Tensor):
            parts.setdefault(part, {})[name] = value
    return parts
