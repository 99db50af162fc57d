"""The `transport` section of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from cutlayer.runtime.ground.config import ConfigError, build, scoped


@dataclass(frozen=True)
class LocalTransport:
    """All clients in this process."""

    name: Literal["local"] = field(default="local", metadata=scoped(identifies=True))


@dataclass(frozen=True)
class GrpcTransport:
    """Clients in processes of their own, on this machine or others.

    Attributes:
        host: address that the server listens on. port: its port; 0 takes a free one.
        certificates: folder of the files that ``certificates.py`` makes; None only where both are on one machine.
        insecure: allow other machines without certificates.
        timeout: seconds that a client's next message is waited for.
        keepalive: seconds of silence after which a link is probed, and that the answer may take.
        deadline: seconds that a round may take; None for no limit.
        quorum: share of a round's clients that have to finish it, 0 < quorum <= 1. With fewer the round is repeated
            from its start, so that with 1 the result is that of a run in which no client was ever lost.
        gather: seconds that a server that has just started waits for clients beyond the quorum.
        ahead: clients that may work ahead of their turn; each holds a message in the server's memory.
        max_message_mb: MB (10^6 bytes) of the largest message that is taken.
    """

    name: Literal["grpc"] = field(default="grpc", metadata=scoped(identifies=True))
    host: str = "127.0.0.1"
    port: int = 50505
    certificates: Path | None = None
    insecure: bool = False
    timeout: float = 300.0
    keepalive: float = 10.0
    deadline: float | None = None
    quorum: float = 1.0
    gather: float = 60.0
    ahead: int = 4
    max_message_mb: float = 1024.0

    @property
    def message_bytes(self) -> int:
        """The same limit in bytes."""
        return round(self.max_message_mb * 1e6)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError("port", self.port, "an integer from 0 to 65535")
        for key in ("timeout", "keepalive", "deadline", "max_message_mb"):
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(key, value, "a finite number > 0")
        if not 0 <= self.gather < float("inf"):
            raise ConfigError("gather", self.gather, "a finite number >= 0")
        if not 0 < self.quorum <= 1:
            raise ConfigError("quorum", self.quorum, "a number > 0 and <= 1")
        if self.ahead < 1:
            raise ConfigError("ahead", self.ahead, "an integer >= 1")


TransportConfig: TypeAlias = LocalTransport | GrpcTransport
_KINDS: dict[str, type[Any]] = {"local": LocalTransport, "grpc": GrpcTransport}


def transport_config(values: object, where: str) -> TransportConfig:
    """The section as typed configuration; a bare name stands for its defaults.

    Raises:
        ConfigError: an unknown transport, key or a bad value.
    """
    given: Mapping[str, Any] = {"name": values} if isinstance(values, str) else cast(Mapping[str, Any], values)
    name = given.get("name") if isinstance(cast(object, given), Mapping) else given
    if name not in _KINDS:
        raise ConfigError(where, name, "a transport", _KINDS)
    return build(_KINDS[cast(str, name)], given, where)
