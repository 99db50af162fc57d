"""Fuzz what a client makes of a server's greeting, and a server of a client's, by atheris (libFuzzer).

    pip install atheris
    python -m fuzz.fuzz_greeting -max_total_time=600

The first byte of an input chooses who reads: a client, up to the configuration that it would build its data and its
parts of, or a server. Whatever comes in, it ends in a configuration or a connection, or in one line that says why not.
Until then a client imports nothing, starts nothing and opens nothing, and what it takes is within the bounds that it
states: its own where a key is a machine's own, no foreign code, no file.
"""

import json
import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import atheris
import torch

with atheris.instrument_imports(
    include=[
        "cutlayer.runtime.network",
        "cutlayer.runtime.trust",
        "cutlayer.runtime.ground.config",
        "cutlayer.runtime.settings",
    ]
):
    from cutlayer.runtime import keys, settings, trust  # noqa: F401
    from cutlayer.runtime.ground import config  # noqa: F401
    from cutlayer.runtime.messages import bounds
    from cutlayer.runtime.network import agreement, wire
    from cutlayer.runtime.network.client import program as client
    from cutlayer.runtime.network.server import remote_clients as remote

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.network.agreement import PROTOCOL, shared, version
from cutlayer.runtime.network.wire import Head, What
from fuzz import fuzz_handlers, fuzz_wire
from fuzz.harness import join, mutate_json, run, split
from tests.audited import HOSTILE, watched

OWN = ["transport=grpc", "role=client", "server=127.0.0.1:1", "client_id=0", "transport.max_message_mb=1"]
LIMITS = bounds.Limits(message_bytes=2**20)
SETTINGS = (
    ("algorithm=sl_single_server", "model=mlp"),
    ("algorithm=fsl_sage", "model=cnn2", "model.client.optimizer.lr=0.1", "scheduler=multistep"),
    ("algorithm=mhmd", "model=cnn4", "dataset=image_folder", "dataset.options.size=32", "num_clients=4"),
    ("algorithm=fl_moco", "model=resnet20", "dataset=synthetic", "dataset.options.n_train=100"),
)


class TakenError(Exception):
    """The client has a configuration to build of."""


class Link:
    """A client's link on which a server's bytes lie ready."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = deque(pieces)
        self._incoming = wire.Incoming(LIMITS, {What.WELCOME, What.END})

    def send(self, *_: Any) -> None:
        """The server hears nothing."""

    def receive(self, whats: Any) -> wire.Received:
        while self._pieces:
            received = self._incoming.feed(self._pieces.popleft())
            if received is not None:
                if received.head.what not in whats:
                    raise bounds.WireError(f"message {received.head.what.name} is not expected")
                return received
        raise client.LinkLostError("the server has ended the stream")


def taken(found: Any, _: Path, *, download: bool) -> Any:
    """Stands for the client's data and parts: checks what they would be made of."""
    assert not download
    theirs, mine = found.to_mapping(), OWN_CONFIG.to_mapping()
    for key in (key for key, use in keys.uses_of(settings.RunConfig).items() if use.scope != "result"):
        assert agreement._named(theirs, key) == agreement._named(mine, key), key
    assert "/" not in found.model.name
    assert found.model.init is None
    assert found.num_clients <= 100_000
    assert found.rounds <= 10**6
    assert found.batch_size <= 65_536
    assert settings.RunConfig.from_mapping(theirs) == found
    raise TakenError


def read_welcome(pieces: Sequence[bytes]) -> None:
    """A client greets and is answered with these pieces."""
    with watched():
        joining = client._Client(OWN_CONFIG, OWN)
        try:
            joining._join(Link(pieces))  # pyright: ignore[reportArgumentType]
        except (ConfigError, bounds.WireError) as error:
            line = str(error)
            assert 0 < len(line) < 10_000, line
            assert line.isprintable(), line
        except (TakenError, client.LinkLostError, client.RefusedError, client._EndedError):
            pass


def target(data: bytes) -> None:
    """Give the pieces of one input to whom its first byte says."""
    if data:
        (read_welcome if data[0] % 2 == 0 else ARENA.greet)(split(data[1:]))


def mutate(data: bytes, random: Random) -> bytes:
    """Change a message as bytes, or the JSON in it, or put a hostile value in a place of it."""
    which, pieces = data[:1] or b"\0", data[1:]
    if random.random() < 0.3:
        return which + fuzz_wire.mutate(pieces, random)
    messages = fuzz_wire.messages(pieces) or [random.choice(fuzz_wire.SEEDS)]
    at = random.randrange(len(messages))
    try:
        body = json.loads(messages[at][fuzz_wire.ENVELOPE.size :])
    except (ValueError, RecursionError):
        return which + fuzz_wire.mutate(pieces, random)
    for _ in range(random.choice([1, 1, 2, 3])):
        place(body, random)
    raw = json.dumps(body).encode()
    form, what, _, session, _ = fuzz_wire.ENVELOPE.unpack_from(messages[at])
    messages[at] = fuzz_wire.ENVELOPE.pack(form, what, 0, session, len(raw)) + raw
    return which + join(messages)


def place(body: Any, random: Random) -> None:
    """Put something else somewhere in JSON."""
    while isinstance(body, dict | list) and body:
        keys = list(body) if isinstance(body, dict) else list(range(len(body)))
        key = random.choice(keys)
        inner = body[key]
        if isinstance(inner, dict | list) and inner and random.random() < 0.85:
            body = inner
            continue
        choice = random.randrange(5)
        if choice == 0 and isinstance(body, dict):
            body[random.choice([*WORDS, *keys])] = random.choice(HOSTILE)
        elif choice == 1 and isinstance(body, dict):
            body[random.choice(WORDS)] = body.pop(key)
        elif choice == 2:
            body[key] = random.choice(HOSTILE)
        elif choice == 3:
            body[key] = random.choice(WORDS)
        elif not isinstance(inner, dict | list):
            changed = mutate_json(inner, random)
            body[key] = changed if isinstance(changed, str | int | float | bool | None) else [1]
        return


def welcomes() -> list[bytes]:
    """What honest servers answer."""
    made: list[bytes] = []
    for setting in SETTINGS:
        said = shared(load_config(["transport=grpc", "role=server", *setting]))
        body = {"config": said, "run": "2026-01-01", "round": 0, "rounds": 200}
        made.append(join(wire.outgoing(Head(What.WELCOME), body)))
    return made


def words_of(value: Any) -> set[str]:
    """Every key, and every text, of a configuration."""
    if isinstance(value, dict):
        return set(value) | {word for inner in value.values() for word in words_of(inner)}
    if isinstance(value, list):
        return {word for inner in value for word in words_of(inner)}
    return {value} if isinstance(value, str) else set()


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable()
    remote.Hub = fuzz_handlers.Unplugged
    OWN_CONFIG = load_config(OWN)
    ARENA = fuzz_handlers.Arena(*fuzz_handlers.ARENAS[0])
    client.Site = taken  # pyright: ignore[reportAttributeAccessIssue]
    client.FileLock.take = classmethod(lambda *_: object())  # pyright: ignore[reportAttributeAccessIssue]
    client._Client._claim = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    client.prepare_process = lambda *_: None
    hello = {"client": 0, "protocol": PROTOCOL, "version": version()}
    greeting = join([*wire.outgoing(Head(What.HELLO), hello), *wire.outgoing(Head(What.HELLO), ARENA.facts)])
    honest = welcomes()
    WORDS = sorted(words_of([shared(load_config(["transport=grpc", "role=server", *each])) for each in SETTINGS]))
    WORDS += ["root", "init", "logger", "hydra", "save_dir", "_target_", "resnet18", "vit", "sgd", "onecyclelr", ""]
    for seed in honest:  # an honest server's is taken
        try:
            client._Client(OWN_CONFIG, OWN)._join(Link(split(seed)))  # pyright: ignore[reportArgumentType]
        except TakenError:
            continue
        raise AssertionError("an honest server's configuration is refused")
    fuzz_wire.SEEDS = [*honest, greeting]
    run(target, mutate, [*(b"\0" + seed for seed in honest), b"\1" + greeting], max_bytes=2**16)
