"""Ray, joined or started with its token authentication on."""

from __future__ import annotations

import importlib
import os
import secrets
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutlayer.runtime.ground.config import NO_VALUE, ConfigError

_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_PATIENCE_S = 10.0


def secure(key: str, *, alone: bool) -> None:
    """Switch Ray's token authentication on: it listens on every address of the machine, and runs whatever it receives.

    Args:
        key: what asks for Ray. alone: whether Ray is started here; it then gets a token that nobody else knows.

    Raises:
        ConfigError: a cluster's token is not to be found.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.setdefault(_MODE, "token") != "token" or os.environ.get(_TOKEN) or os.environ.get(_TOKEN_PATH):
        return
    if alone:
        os.environ[_TOKEN] = secrets.token_hex(32)
    elif not (Path.home() / ".ray" / "auth_token").exists():
        reason = f"the cluster's token is needed, in {_TOKEN} or ~/.ray/auth_token (or {_MODE}=disabled without one)"
        raise ConfigError(key, NO_VALUE, reason)


def _find(where: str, address: str) -> None:
    """Raise ConfigError where nothing listens at HOST:PORT, for which Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(where, NO_VALUE, f"Ray does not start: nothing answers at {address} ({error})") from error


def join_cluster(key: str, where: str, settings: Mapping[str, Any]) -> Any:
    """The package, connected to a cluster.

    Args:
        key: what asks for Ray. where: what says which cluster it is.
        settings: what ``ray.init`` takes; the address "local" starts a Ray on this machine.

    Raises:
        ConfigError: there is no cluster, or it does not let this process in.
    """
    address: str = settings["address"]
    local = address == "local"
    secure(key, alone=local)
    _find(where, address)
    ray: Any = importlib.import_module("ray")  # only now: it reads the environment
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**({"_node_ip_address": "127.0.0.1"} if local else {}) | dict(settings))
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(where, NO_VALUE, f"Ray does not start: {reason}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process without a word
    return ray
