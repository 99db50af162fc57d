"""A client that sends what it should not: its own session ends with a line in the log, and nobody else notices."""

import contextlib
import copy
import json
import logging
import struct
import threading
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cutlayer.runtime.messages.boundary import ClientDroppedError
from cutlayer.runtime.messages.bounds import WireError
from cutlayer.runtime.network.agreement import PROTOCOL, data_facts, fingerprint, shared, version
from cutlayer.runtime.network.server.guarded import GuardedServer
from cutlayer.runtime.network.wire import What
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.session import ServerParty, Workplace
from cutlayer.runtime.scoring.scores import Measured
from tests.conftest import same, weights
from tests.network.serving import served

pytest.importorskip("grpc", reason="the extra grpc is not installed")

SETTING = ("algorithm=sl_single_server", "num_clients=2", "batch_size=400", "rounds=100000", "eval_interval=1000000")
HONEST, HOSTILE = 0, 1
Z, Y = torch.zeros(4, 128), torch.zeros(4, dtype=torch.int64)


class Hostile:
    """A peer that greets as client 1 of a federation does, then does as it is told."""

    def __init__(self, federation: Federation, **greeting: object) -> None:
        from cutlayer.runtime.network.client.link import ServerLink

        transport = federation.setup.config.transport
        self.link = ServerLink(f"127.0.0.1:{federation.clients.hub.port}", HOSTILE, transport)
        hello = {"client": HOSTILE, "protocol": PROTOCOL, "version": version()}
        self.link.send(What.HELLO, hello | {key: value for key, value in greeting.items() if key in hello})
        facts = {
            "config": fingerprint(shared(federation.setup.config)),
            "samples": int(federation.setup.partition.sizes[HOSTILE]),
            "trains": True,
            "data": data_facts(federation.setup.dataset, divided=True),
        }
        self.link.send(What.HELLO, facts | {key: value for key, value in greeting.items() if key in facts})

    def raw(self, *pieces: bytes) -> None:
        """Send bytes as they are."""
        self.link.send_pieces(pieces)

    def end(self) -> dict:
        """Wait for the server's last word."""
        while (received := self.link.receive()).head.what is not What.END:
            pass
        return dict(received.body)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Generator[Federation]:
    """A server with one honest client; the other place is free."""
    quorum = ("transport.quorum=0.5", "transport.timeout=20", "transport.max_message_mb=8")
    with served(tmp_path_factory.mktemp("arena"), *SETTING, *quorum, clients=1) as federation:
        hub = federation.clients.hub
        with hub.changed:
            assert hub.changed.wait_for(lambda: HONEST in hub.connections, 60)
        yield federation


def attack(federation: Federation, act: Callable[[Hostile, int], None]) -> str:
    """One round in which the hostile client does something when its turn begins; what the server says of it."""
    hub = federation.clients.hub
    hostile = Hostile(federation)
    heard: list[str] = []

    def play() -> None:
        with contextlib.suppress(Exception):
            opened = hostile.link.receive()
            while opened.head.what is not What.OPEN:
                opened = hostile.link.receive()
            act(hostile, opened.head.session)
            heard.append(str(hostile.end()))

    thread = threading.Thread(target=play, daemon=True)
    try:
        with hub.changed:
            assert hub.changed.wait_for(lambda: {HONEST, HOSTILE} <= hub.connections.keys(), 30)
        thread.start()
        before = hub.connections[HOSTILE]
        record, _ = federation.step()
        assert record.clients == 1
        assert record.metrics["dropped"] == 1
        with hub.changed:
            assert hub.changed.wait_for(lambda: hub.connections.get(HOSTILE) is not before, 30)
        assert HONEST in hub.connections
    finally:
        hostile.link.close()
        thread.join(30)
    assert not thread.is_alive()
    return hub.seen[HOSTILE].error


def envelope(what: int, session: int, length: int, kind: bytes = b"") -> bytes:
    return struct.pack("<BBHIQ", 0xC1, what, len(kind), session, length) + kind


def asks(kind: str, **fields: object) -> Callable[[Hostile, int], None]:
    return lambda hostile, session: hostile.link.send(What.ASK, fields, session, kind)


def uploads(fields: dict, samples: object = None, **metrics: object) -> Callable[[Hostile, int], None]:
    def act(hostile: Hostile, session: int) -> None:
        reported = SAMPLES if samples is None else samples
        hostile.link.send(What.METRICS, {"samples": reported, **metrics}, session)
        hostile.link.send(What.REPORT, {"keeps": False, "seconds": 0.0}, session)
        hostile.link.send(What.UPLOAD, fields, session, "model")

    return act


SAMPLES = 718  # of 1437 digits, for the second of two clients
WEIGHT, BIAS = "client/fc1.weight", "client/fc1.bias"
ATTACKS: dict[str, tuple[Callable[[Hostile, int], None], str]] = {
    "noise": (lambda h, _: h.raw(b"\x00" * 100), "no peer of this version"),
    "an empty piece": (lambda h, _: h.raw(b""), "empty piece"),
    "half an envelope": (lambda h, _: h.raw(b"\xc1"), "envelope"),
    "a message of 2 GB": (lambda h, s: h.raw(envelope(What.ASK, s, 2**31, b"smashed")), "accepted"),
    "of 2^64 - 1 bytes": (lambda h, s: h.raw(envelope(What.ASK, s, 2**64 - 1, b"smashed")), "accepted"),
    "no safetensors": (lambda h, s: h.raw(envelope(What.ASK, s, 16, b"smashed") + b"\xff" * 16), "header"),
    "what a server sends": (lambda h, s: h.raw(envelope(What.REPLY, s, 0)), "REPLY is not expected"),
    "what nobody sends": (lambda h, s: h.raw(envelope(99, s, 0)), "99 is not expected"),
    "a kind that is not there": (asks("secret", z=Z, y=Y), "'secret', which this method does not have"),
    "a method of the server": (asks("_round", z=Z), "does not have"),
    "no labels": (asks("smashed", z=Z), "'y'"),
    "one field more": (asks("smashed", z=Z, y=Y, w=Z), "'w'"),
    "a wrong width": (asks("smashed", z=torch.zeros(4, 127), y=Y), "float32[4, 127], expected float32[any, 128]"),
    "other dimensions": (asks("smashed", z=torch.zeros(4, 128, 1), y=Y), "expected float32[any, 128]"),
    "another dtype": (asks("smashed", z=Z.double(), y=Y), "float64"),
    "a number for a tensor": (asks("smashed", z=1.0, y=Y), "expected float32"),
    "no samples": (asks("smashed", z=Z[:0], y=Y[:0]), "expected"),
    "labels of another batch": (asks("smashed", z=Z, y=Y[:3]), "samples"),
    "a label that is no class": (asks("smashed", z=Z, y=Y + 10), "classes are 0 to 9"),
    "a label below all": (asks("smashed", z=Z, y=Y - 1), "classes are 0 to 9"),
    "a NaN": (asks("smashed", z=Z * float("nan"), y=Y), "not finite"),
    "an infinity": (asks("smashed", z=Z + float("inf"), y=Y), "not finite"),
    "a round to come": (lambda h, s: h.link.send(What.ASK, {"z": Z, "y": Y}, s + 1, "smashed"), "a message of round"),
    "an upload at once": (lambda h, s: h.link.send(What.UPLOAD, {}, s, "model"), "UPLOAD where METRICS is expected"),
    "a report at once": (lambda h, s: h.link.send(What.REPORT, {}, s), "REPORT where METRICS is expected"),
    "a model of one part": (uploads({WEIGHT: torch.zeros(128, 64)}), "missing"),
    "another model": (uploads({WEIGHT: torch.zeros(2, 2), BIAS: torch.zeros(128)}), "expected float32[128, 64]"),
    "a model of NaN": (uploads({WEIGHT: torch.full((128, 64), torch.nan), BIAS: torch.zeros(128)}), "not finite"),
    "more samples than it has": (uploads({}, samples=10**9), "1000000000 samples; the client came with 718"),
    "a million of samples as text": (uploads({}, samples=1e6), "samples"),
    "samples as a table": (uploads({}, samples=torch.zeros(40, 2)), "metrics that are no numbers"),
    "metrics without end": (uploads({}, **{f"m{i}": 1.0 for i in range(100)}), "more than 64"),
    "a metric with a comma": (uploads({}, **{"a,b": 1.0}), "no word"),
    "a metric that is a NaN": (uploads({}, loss=float("nan")), "not finite"),
    "a failure": (lambda h, s: h.link.send(What.FAILED, {"error": "x" * 10_000}, s), "its program failed: xxx"),
    "a failure that looks like lines of the log": (
        lambda h, s: h.link.send(What.FAILED, {"error": "x\n2026-11-22 client 0 is gone\x1b[2J\u202e\x07"}, s),
        r"its program failed: x 2026-11-22 client 0 is gone\x1b[2J\u202e\x07",
    ),
    "a long text": (lambda h, s: h.link.send(What.FAILED, {"error": "x" * 2**21}, s), "accepted"),
    "the end": (lambda h, s: h.link.close(), "the link was lost"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_it_sends_ends_its_session_alone(arena: Federation, name: str) -> None:
    act, reason = ATTACKS[name]
    before = weights(arena)
    reported = attack(arena, act)
    assert reason in reported
    assert reported.isprintable()
    assert len(reported) < 400
    after = weights(arena)
    assert not same(before, after)  # the honest client's round counts
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_metrics_of_ever_new_names(arena: Federation) -> None:
    for at, reason in enumerate(("missing", "more than 64 metrics in its rounds")):
        assert reason in attack(arena, uploads({}, **{f"new_{at}_{number}": 1.0 for number in range(40)}))


def one_after_another(*payloads: tuple[str, dict]) -> Callable[[Hostile, int], None]:
    def act(hostile: Hostile, session: int) -> None:
        for kind, fields in payloads:
            hostile.link.send(What.ASK, fields, session, kind)

    return act


BODY_IN, BODY_OUT = torch.zeros(4, 64, 2, 2), torch.zeros(4, 192)
OUT_OF_PLACE: dict[str, tuple[tuple[str, ...], Callable[[Hostile, int], None], str]] = {
    "alignment before all": (("algorithm=fsl_sage",), asks("align"), "AssertionError"),
    "a gradient before all": (("algorithm=fsmkd", "model=simple_conv"), asks("gradient", grad=BODY_OUT), "KeyError"),
    "a gradient of another batch": (
        ("algorithm=fsmkd", "model=simple_conv"),
        one_after_another(("smashed", {"z": BODY_IN}), ("gradient", {"grad": BODY_OUT[:3]})),
        "RuntimeError: Mismatch in shape",
    ),
    "what the server alone may call": (
        ("algorithm=moco_sfl",),
        asks("smashed_cohort", query=Z, key=Z),
        "'smashed_cohort', which this method does not have",
    ),
    "one sample, which cannot be normalised": (
        ("algorithm=sl_single_server", "model=vgg", "model.options.width=4"),
        asks("smashed", z=torch.zeros(1, 4, 4, 4), y=Y[:1]),
        "ValueError: Expected more than 1 value",
    ),
}


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_messages_of_the_right_shapes_that_the_server_cannot_use(tmp_path: Path, name: str) -> None:
    overrides, act, reason = OUT_OF_PLACE[name]
    with served(
        tmp_path, *SETTING, *overrides, "transport.quorum=0.5", "transport.timeout=20", clients=1
    ) as federation:
        assert reason in attack(federation, act)


def test_of_several_messages_at_once_the_one_that_cannot_be_used_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In lockstep the server answers all clients together; the round is repeated without the one that sent it."""
    setting = ("algorithm=moco_sfl", "algorithm.together=never", "transport.quorum=0.5", "transport.timeout=20")
    with served(tmp_path, *SETTING, *setting, clients=1) as federation:
        kind = type(federation.server)
        together, seen = kind.on_smashed_cohort, list[set[int]]()

        def on_smashed_cohort(self, inbox: dict) -> dict:
            seen.append({*inbox})
            if any(not message["query"].any() for message in inbox.values()):
                raise ValueError("nothing but zeros")
            return together(self, inbox)

        monkeypatch.setattr(kind, "on_smashed_cohort", on_smashed_cohort)
        clients = federation.clients
        assert "ValueError: nothing but zeros" in attack(federation, asks("smashed", query=Z, key=Z))
        assert {HONEST, HOSTILE} in seen
        assert {HONEST} in seen[seen.index({HOSTILE}) :]
        assert clients.repeats == 1

        def faulty(self, inbox: dict) -> dict:
            if len(inbox) > 1:
                raise ValueError("a fault of this program")
            return together(self, inbox)

        monkeypatch.setattr(kind, "on_smashed_cohort", faulty)
        guarded = GuardedServer(
            ServerParty(federation.server, Workplace(federation.setup.blueprint, 0)), clients._blame
        )
        connected = {*clients.hub.connections}
        with pytest.raises(ValueError, match="a fault of this program"):
            guarded.serve("smashed", {client: {"query": Z + 1, "key": Z + 1} for client in range(2)})
        assert {*clients.hub.connections} == connected


def test_a_round_has_so_many_messages(arena: Federation) -> None:
    """One that goes on and on would hold the round, and with it all others, for ever."""
    most = 64 + 32 * len(arena.setup.steps(HOSTILE))
    answered: list[What] = []

    def act(hostile: Hostile, session: int) -> None:
        for _ in range(most + 1):
            hostile.link.send(What.ASK, {"z": Z, "y": Y}, session, "smashed")
            if len(answered) < most:
                answered.append(hostile.link.receive((What.REPLY,)).head.what)

    assert attack(arena, act) == f"the server does not accept what it was sent: more than {most} messages in a round"
    assert len(answered) == most


def test_answers_that_it_does_not_read_do_not_pile_up(arena: Federation) -> None:
    waiting: list[int] = []

    def act(hostile: Hostile, session: int) -> None:
        connection = arena.clients.hub.connections[HOSTILE]
        for _ in range(100):
            hostile.link.send(What.ASK, {"z": Z.repeat(500, 1), "y": Y.repeat(500)}, session, "smashed")
            waiting.append(len(connection._outbox))
        hostile.link.send(What.FAILED, {"error": "as many as it liked"}, session)

    assert "before the answer to the one before was taken" in attack(arena, act)
    assert max(waiting) < 10  # of 100 answers of a MB each


def test_the_attacker_leaves_no_trace(arena: Federation, configure) -> None:
    """The weights and the ledger are those of a run in which it is lost before it says anything."""
    base = Federation(configure(*SETTING))
    program = base.setup.algorithm.client

    def lost(ctx, down):
        if ctx.id == HOSTILE:
            raise ClientDroppedError
        return (yield from program(ctx, down))

    base.setup.algorithm = type("Lossy", (base.setup.algorithm,), {"client": staticmethod(lost)})
    base.round = arena.round
    base.server.load_state_dict(copy.deepcopy(arena.server.state_dict()))
    base.ledger.load_state_dict(arena.ledger.state_dict())
    expected, lines = base.step()
    seen: list[object] = []
    original = arena.ledger.close_round
    arena.ledger.close_round = lambda round: seen.append(original(round)) or seen[-1]
    attack(arena, asks("smashed", z=Z * float("nan"), y=Y))
    del arena.ledger.close_round
    assert seen == [lines]
    assert same(weights(arena), weights(base))
    assert arena.ledger.training() == base.ledger.training()
    assert expected.clients == 1


NESTED: list = []
for _ in range(900):
    NESTED = [NESTED]
GREETINGS: dict[str, tuple[dict, str]] = {
    "a number that is taken by nobody": ({"client": 2}, "there is no client 2; clients are 0 to 1"),
    "a truth for a number": ({"client": True}, "there is no client True"),
    "a text for a number": ({"client": "1"}, "there is no client '1'"),
    "a long text for a number": ({"client": "\x1b" * 10_000}, "there is no client '\\x1b"),
    "lists in lists for a version": ({"version": NESTED}, "runs version [[["),
    "lists in lists for data": ({"data": {"name": NESTED}}, "the client's data have name [[["),
    "another version": ({"version": "0123"}, "runs version 0123"),
    "another protocol": ({"protocol": 2}, "version"),
    "another configuration": ({"config": "0" * 16}, "another configuration"),
    "other data": ({"data": {"name": "mnist"}}, "the client's data have name mnist, the server's digits"),
    "no data": ({"data": None}, "the client's data have name null"),
    "other samples": ({"samples": 5}, "the client has 5 samples; its share is 718"),
    "a truth for samples": ({"samples": True}, "how many samples"),
    "no truth": ({"trains": 1}, "how many samples"),
}


@pytest.mark.parametrize("name", GREETINGS)
def test_who_greets_otherwise_is_refused(arena: Federation, name: str) -> None:
    greeting, reason = GREETINGS[name]
    hostile = Hostile(arena, **greeting)
    try:
        end = hostile.end()
    finally:
        hostile.link.close()
    assert reason in end["error"]
    assert end["later"] is False
    assert HONEST in arena.clients.hub.connections


def test_who_is_silent_for_too_long_may_come_again(arena: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its link was bad, or it has to load much: with what it has loaded by then it is quick."""
    from cutlayer.runtime.network.client import link
    from cutlayer.runtime.network.server import hub

    here = arena.clients.hub
    with here.changed:
        assert here.changed.wait_for(lambda: HONEST in here.connections, 30)
    monkeypatch.setattr(hub, "_GREETING_S", 0.2)
    silent = link.ServerLink(f"127.0.0.1:{here.port}", HOSTILE, arena.setup.config.transport)
    try:
        end = silent.receive()
    finally:
        silent.close()
    assert end.head.what is What.END
    assert end.body == {"error": "the greeting took too long", "later": True}


def test_it_comes_again_while_the_server_works_for_it(arena: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's answer finds a stream that it has ended itself."""
    hub, server = arena.clients.hub, arena.server
    serve, second = server.serve, list[Hostile]()

    def replaced(kind: str, inbox: dict) -> dict:
        if HOSTILE in inbox and not second:
            first = hub.connections[HOSTILE]
            second.append(Hostile(arena))
            with hub.changed:
                assert hub.changed.wait_for(lambda: first.over.done() and hub.connections[HOSTILE] is not first, 30)
        return serve(kind, inbox)

    monkeypatch.setattr(server, "serve", replaced)
    try:
        attack(arena, asks("smashed", z=Z, y=Y))
    finally:
        for hostile in second:
            hostile.link.close()


payloads = st.dictionaries(
    st.sampled_from(["z", "y", "grad", WEIGHT, BIAS, "samples", "loss", "x"]),
    st.one_of(
        st.floats(width=32),
        st.integers(-(2**31), 2**31),
        st.booleans(),
        st.builds(
            lambda shape, dtype, value: torch.full(shape, value).to(dtype),
            st.sampled_from([(4, 128), (1, 128), (4,), (1,), (), (0, 128), (128, 64), (128,), (2, 1, 3)]),
            st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]),
            st.sampled_from([0.0, 1.0, 11.0, float("nan"), -1.0]),
        ),
    ),
    max_size=4,
)
said = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([What.TELL, What.ASK, What.METRICS, What.UPLOAD]), payloads),
        st.tuples(st.sampled_from([What.REPORT, What.FAILED]), st.dictionaries(st.text(max_size=5), st.integers())),
        st.binary(min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=5,
)


@given(said, st.sampled_from(["smashed", "model", "", "x"]))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_it_says(arena: Federation, script: list, kind: str) -> None:
    def act(hostile: Hostile, session: int) -> None:
        for each in script:
            if isinstance(each, bytes):
                hostile.raw(each)
            else:
                what, body = each
                hostile.link.send(what, body, session, kind)
        hostile.link.finish(10)
        hostile.link.send(What.FAILED, {}, session)  # so that it does not just stay silent
        hostile.raw(b"\x00")

    hub = arena.clients.hub
    hub_before = hub.connections[HONEST]
    attack(arena, act)
    assert hub.connections[HONEST] is hub_before
    assert all(tensor.isfinite().all() for tensor in weights(arena).values())


SCORES: dict[str, tuple[dict, str]] = {
    "of what is not tested": ({"test_acc": [1, 0.5, 0.5]}, "'test_acc', which is not tested"),
    "a text": ({"client_acc": "123"}, "no numbers"),
    "texts": ({"client_acc": [1, "0.5", "nan"]}, "no numbers"),
    "two of three": ({"client_acc": [1, 0.5]}, "no numbers"),
    "a truth": ({"client_acc": [True, 0.5, 0.5]}, "no numbers"),
    "a number without end": ({"client_acc": [1, 0.5, 10**400]}, "no numbers"),
    "all right, and more": ({"client_acc": [1, 1.5, 0.5]}, "cannot be"),
    "of nothing": ({"local_acc": [0, 0.5, 0.5]}, "cannot be"),
    "of all there is": ({"local_acc": [2**48, 0.5, 0.5]}, "cannot be"),
    "a loss beyond all bounds": ({"local_acc": [1, 0.5, 1e300]}, "cannot be"),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_that_are_none(arena: Federation, name: str) -> None:
    body, reason = SCORES[name]
    with pytest.raises(WireError, match=reason):
        arena.clients._scores_of(body)
    assert arena.clients._scores_of({"client_acc": [3, 1.0, 0.0]}) == {"client_acc": Measured(3, 1.0, 0.0)}


def test_the_log_has_a_line(arena: Federation, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        attack(arena, asks("smashed", z=Z * float("nan"), y=Y))
    lines = [record.getMessage() for record in caplog.records if "lost" in record.getMessage()]
    assert lines == ["client 1 is lost: 'z' has values that are not finite"]


def test_a_configuration_that_is_sent_can_be_read(tmp_path: Path, arena: Federation) -> None:
    assert json.loads(json.dumps(arena.clients._shared)) == arena.clients._shared
