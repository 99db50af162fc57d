"""Fuzz the server of a small federation with all that one hostile client may send, by atheris (libFuzzer).

    pip install atheris
    python -m fuzz.fuzz_handlers -max_total_time=600

There is no network: the client's bytes are what its stream reads, all else is the server's own code. Whatever comes
in, the greeting ends in a refusal or a connection, and the round ends with the honest client counted, the hostile one
counted or dropped. Of a client that was dropped before anything of it was served, or with which the round was lost,
no trace is left in figures and weights. What was served has values within bounds, which may still spoil the training.
The first byte of an input chooses what is fuzzed: a method that asks at every batch, one that uploads only, one whose
clients are tested, or the greeting.
"""

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from random import Random
from typing import Any

import atheris
import torch

with atheris.instrument_imports(include=["cutlayer.runtime.network"]):
    from cutlayer.runtime.messages import bounds
    from cutlayer.runtime.network import wire
    from cutlayer.runtime.network.server import hub
    from cutlayer.runtime.network.server import remote_clients as remote

from cutlayer.runtime.ground.serial import _strip
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.messages.boundary import owned
from cutlayer.runtime.network.agreement import PROTOCOL, data_facts, fingerprint, shared, version
from cutlayer.runtime.network.wire import Head, What
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.seats import Seats
from cutlayer.runtime.rounds.servers import make_server
from fuzz import fuzz_wire
from fuzz.harness import join, run, split

HOSTILE, HONEST = 0, 1
SETTING = (
    *("num_clients=2", "batch_size=400", "rounds=100000", "device=cpu", "dataset=digits", "model=mlp"),
    *("transport=grpc", "role=server", "transport.quorum=0.5", "transport.gather=0", "transport.max_message_mb=1"),
)
ARENAS = (
    ("algorithm=sl_single_server", "eval_interval=1000000", "optimizer=sgd", "lr=1"),
    ("algorithm=fed_avg", "eval_interval=1000000"),
    ("algorithm=lg_fed_avg", "eval_interval=1"),
)
GREETING = len(ARENAS)  # the first byte that stands for it
LOOP = asyncio.new_event_loop()
MANY = bounds.Limits(message_bytes=2**20)


class Stream:
    """What the client has sent, as the server reads it from gRPC."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = deque(pieces)
        self.written = 0

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def read(self) -> Any:
        return self._pieces.popleft() if self._pieces else hub.aio.EOF

    async def write(self, piece: bytes) -> None:
        self.written += len(piece)


class Unplugged(hub.Hub):
    """A hub that listens nowhere: what others do on its loop is done at once."""

    def __init__(self, config: Any, population: int, greeting: Any) -> None:
        self.config, self.population, self.network = config, population, Undone(self)
        self.connections = {}
        self.seen = [hub.Seen() for _ in range(population)]
        self.changed = threading.Condition()
        self.closing = self.secure = False
        self.note = greeting.changed
        self._greeting = greeting


class Undone:
    """The loop of such a hub."""

    def __init__(self, of: Unplugged) -> None:
        self.loop, self._hub = LOOP, of

    def call(self, function: Any, *args: Any) -> None:
        function(*args)
        connections = self._hub.connections
        for connection in connections.values():  # it takes what it is sent
            connection._outbox.clear()
            connection._asleep = True
        for client in [client for client, connection in connections.items() if connection.why]:
            del connections[client]

    def submit(self, work: Any) -> Any:
        done: Future[Any] = Future()
        try:
            work.send(None)
        except StopIteration as end:
            done.set_result(end.value)
        except Exception as error:
            done.set_exception(error)
        return done


class Here:
    """A session in this process whose messages are the receiver's own, as over a network."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.close = session.close

    def send(self, message: Any) -> None:
        self._session.send(owned(message))

    def receive(self) -> Any:
        event = self._session.receive()
        return replace(event, fields=owned(event.fields))


class Pair(remote.RemoteClients):
    """One client at the other end of a stream, and one in this process."""

    def __init__(self, setup: Any, store: Any) -> None:
        super().__init__(setup, "fuzz")
        self._seats = Seats(setup, store)

    def _open(self, client: int, until: float) -> Any:
        return Here(self._seats.open(client, self._round)) if client == HONEST else super()._open(client, until)

    def scores(self, evaluator: Any) -> Any:
        self._evaluator = evaluator
        return super().scores(evaluator)

    def _ask(self, clients: list[int], held: Any) -> Any:
        found = super()._ask([client for client in clients if client != HONEST], held)
        return found | {HONEST: self._evaluator.of_client(HONEST)}


class Arena:
    """A federation of an honest and a hostile client, played from its first round for each input."""

    def __init__(self, *overrides: str) -> None:
        self.federation = Federation(load_config([*SETTING, *overrides]), clients=Pair)
        self.served: list[int] = []
        self._watch()
        self.clients: Any = self.federation.clients
        self.clients.listen(0)
        self.facts = {
            "config": fingerprint(shared(self.federation.setup.config)),
            "samples": int(self.federation.setup.partition.sizes[HOSTILE]),
            "trains": True,
            "data": data_facts(self.federation.setup.dataset, divided=True),
        }
        self.limits = self.clients._admit(HOSTILE, self.facts)
        self.ledger = self.federation.ledger.state_dict()
        self.fresh()
        self.initial = self.weights()
        self.without = self.play([])
        assert not same(self.initial, self.without)
        assert same(self.play([]), self.without)

    def _watch(self) -> None:
        """Note whose messages the server takes in."""
        served, method = self.served, self.federation.setup.algorithm

        class Watched(method.Server):
            def open_round(self, cohort: Any) -> None:
                served.clear()
                super().open_round(cohort)

            def serve(self, kind: str, inbox: Any) -> Any:
                served.extend(inbox)
                return super().serve(kind, inbox)

            def absorb(self, client: int, upload: Any) -> None:
                served.append(client)
                super().absorb(client, upload)

        self.federation.setup.algorithm = type("Watched", (method,), {"Server": Watched})

    def fresh(self) -> None:
        """Before the first round."""
        federation = self.federation
        federation.round, federation.server = 0, make_server(federation.setup, federation.stores["server"])
        federation.ledger.load_state_dict(self.ledger)
        for store in federation.stores.values():
            store.restore([], 0)
        self.clients.load_state_dict({})

    def weights(self) -> dict[str, torch.Tensor]:
        """The server's parts and its optimizers' state."""
        tensors: dict[str, torch.Tensor] = {}
        _strip(self.federation.server.state_dict(), "", tensors)
        return tensors

    def play(self, pieces: Sequence[bytes]) -> dict[str, torch.Tensor]:
        """One round; the weights that it ends with."""
        self.fresh()
        unplugged: Any = self.clients.hub
        for client in (HOSTILE, HONEST):
            stream = Stream(pieces if client == HOSTILE else ())
            unplugged.connections[client] = hub.Connection(unplugged, client, self.facts, stream, self.limits)
        record, _ = self.federation.step()
        assert HONEST in self.served
        assert record.clients == (2 if HOSTILE in self.clients._reports else 1)
        assert record.clients + record.metrics.get("dropped", 0) == 2
        spoiled = HOSTILE in self.served
        for name, value in record.metrics.items():
            assert spoiled or math.isfinite(value), f"{name} {value}"
        if record.test_acc is not None:
            assert 0 <= record.test_acc <= 1
            assert record.test_loss is not None
            assert spoiled or math.isfinite(record.test_loss)
        return self.weights()

    def target(self, pieces: Sequence[bytes]) -> None:
        """Play a round with these pieces."""
        found = self.play(pieces)
        # An optimizer that has not stepped has no state.
        assert found.keys() == self.without.keys()
        for name, tensor in found.items():
            assert tensor.shape == self.without[name].shape, name
            assert tensor.dtype == self.without[name].dtype, name
        if HOSTILE not in self.served:
            assert same(found, self.without)

    def greet(self, pieces: Sequence[bytes]) -> None:
        """A greeting of these pieces."""
        unplugged: Any = self.clients.hub
        unplugged.connections = {}
        stream = Stream(pieces)
        try:
            connection = LOOP.run_until_complete(unplugged._greet(stream))
        except (hub.ClientRefusedError, bounds.WireError) as error:
            fuzz_wire.one_line(error)
        else:
            assert connection.facts["samples"] == self.federation.setup.partition.sizes[connection.client]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def target(data: bytes) -> None:
    """Give the pieces of one input to what its first byte says."""
    if data:
        which = data[0] % (len(ARENAS) + 1)
        if which == GREETING:
            arenas[0].greet(split(data[1:]))
        else:
            arenas[which].target(split(data[1:]))


def mutate(data: bytes, random: Random) -> bytes:
    """Change a message as bytes, or the values of a payload; now and then what is fuzzed."""
    which, pieces = data[:1] or b"\0", data[1:]
    if random.random() < 0.02:
        which = bytes([random.randrange(len(ARENAS) + 1)])
    return which + (fuzz_wire.mutate(pieces, random) if random.random() < 0.5 else mutate_values(pieces, random))


def mutate_values(data: bytes, random: Random) -> bytes:
    """Change one field of one payload to another that can be sent."""
    messages = fuzz_wire.messages(data)
    frames = [at for at, whole in enumerate(messages) if len(whole) > 1 and whole[1] not in wire.TEXTS]
    if frames:
        at = random.choice(frames)
        try:
            received = wire.Incoming(MANY, set(What)).feed(messages[at])
        except bounds.WireError:
            return data
        if received is not None and received.body:
            body = dict(received.body)
            name = random.choice([*body])
            body[name] = other(body[name], random)
            if random.random() < 0.1:
                body[random.choice(["z", "y", "loss", "a/b", name + "x"])] = body.pop(name)
            messages[at] = b"".join(wire.outgoing(received.head, body, 2**20))
    return join(messages)


def other(value: Any, random: Random) -> Any:
    """Another tensor or number, mostly of the same kind."""
    if not isinstance(value, torch.Tensor):
        return random.choice([0, 1, -1, 2**62, value, 0.5, 1e30, -1e300, 1e308, True])
    choice = random.randrange(6)
    if choice == 0:
        return value[: random.randrange(4)] if value.dim() else value[None]
    if choice == 1:
        return value.to(random.choice([torch.float32, torch.int64, torch.float64, torch.float16, torch.bool]))
    if choice == 2:
        return value.reshape(random.choice([(-1,), (1, *value.shape), (*value.shape, 1)]))
    made = value.double() if value.is_floating_point() else value.clone()
    if value.is_floating_point():
        amounts = [0.0, 1e-40, 1.0, -1.0, 1e4, 1e10, 1e18, -1e19, 1e25, 3e38, -3e38]
    else:
        amounts = [0, 1, 9, 10, -1]
    if choice == 3 and value.is_floating_point():
        return (made * random.choice(amounts)).to(value.dtype)
    flat = made.reshape(-1)
    for _ in range(random.choice([1, 3])):
        if len(flat):
            start = random.randrange(len(flat))
            flat[start : start + random.choice([1, 5, len(flat)])] = random.choice(amounts)
    return flat.reshape(value.shape).to(value.dtype)


def seeds() -> list[bytes]:
    """What an honest client sends in each of the arenas, with little in it."""
    generator = torch.Generator().manual_seed(0)
    made: list[bytes] = []
    for which, arena in enumerate(arenas):
        z, y = torch.rand(4, 128, generator=generator), torch.tensor([0, 9, 3, 1])
        upload = arena.federation.server.ctx.dump(*arena.federation.server.ctx.shared)
        done: list[tuple[Any, Any, str]] = [
            (What.METRICS, {"samples": arena.facts["samples"], "loss": 0.5}, "metrics"),
            (What.REPORT, {"keeps": which == 2, "seconds": 0.5}, ""),
            (What.UPLOAD, upload, "model"),
        ]
        asks: list[tuple[Any, Any, str]] = [(What.ASK, {"z": z, "y": y}, "smashed")] * (2 if which == 0 else 0)
        said = [(Head(what, 1, kind), body) for what, body, kind in asks + done]
        if which == 2:
            scores = {name: each.to_json() for name, each in arena.federation.evaluator.of_client(HONEST).items()}
            said.append((Head(What.EVALUATED, 2), scores))
        pieces = [piece for head, body in said for piece in wire.outgoing(head, body)]
        made.append(bytes([which]) + join(pieces))
        made.append(bytes([which]) + join(wire.outgoing(Head(What.FAILED, 1), {"error": "no memory"})))
    hello = {"client": HOSTILE, "protocol": PROTOCOL, "version": version()}
    greeting = [*wire.outgoing(Head(What.HELLO), hello), *wire.outgoing(Head(What.HELLO), arenas[0].facts)]
    return [*made, bytes([GREETING]) + join(greeting)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable()
    remote.Hub = Unplugged
    arenas = [Arena(*overrides) for overrides in ARENAS]
    SEEDS = seeds()
    for which, seed in enumerate(SEEDS[0:-1:2]):
        arenas[which].target(split(seed[1:]))
        assert HOSTILE in arenas[which].clients._reports, "an honest client is not counted"
    fuzz_wire.SEEDS = [seed[1:] for seed in SEEDS]
    run(target, mutate, SEEDS, max_bytes=2**18)
