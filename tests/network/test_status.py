"""What a server tells of itself: its file in the run's folder, and the program that shows it."""

import fcntl
import importlib
import io
import json
import logging
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from cutlayer import status as viewer
from cutlayer.runtime import network
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import replace_file
from cutlayer.runtime.ground.locks import FileLock
from cutlayer.runtime.network.server import status_file
from cutlayer.runtime.network.server.overview import View, picture
from cutlayer.runtime.network.server.status import NETWORK, Seen, Status, read_status_of
from cutlayer.runtime.network.server.status_file import StatusFile
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import LOCK
from tests.places import ROOT, checkout, program


def until(what: Callable[[], Any], seconds: float = 120.0) -> None:
    """Wait for what has to become true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---------------------------------------------------------------------- the file of a run


def test_the_file_tells_of_a_run_what_federation_ledger_and_hub_know(tmp_path: Path, caplog: Any) -> None:
    pytest.importorskip("grpc", reason="the extra grpc is not installed")
    from tests.network.serving import served, start_client

    folder, setting = tmp_path / "reported", ("algorithm=sl_single_server", "num_clients=2", "eval_interval=1")
    records: list[Any] = []
    caplog.set_level(logging.WARNING)
    with served(tmp_path, *setting, clients=1) as federation:
        remote: Any = federation.clients
        with StatusFile(folder, federation, remote, accuracy=0.25) as file:
            until(lambda: "network.json cannot be written" in caplog.text)  # there is no folder: as on a full disk
            folder.mkdir()
            file.mark_changed()
            until((folder / NETWORK).exists)
            first = read_status_of(folder)
            assert (first.accuracy, first.round, first.rounds, first.payload) == (0.25, 0, 2, 0)
            assert (first.pid, first.tls, first.address) == (os.getpid(), False, f"127.0.0.1:{remote.hub.port}")
            run = threading.Thread(target=lambda: records.append(federation.step()))
            run.start()
            until(lambda: read_status_of(folder).waiting == "for round 1: 1 of 2 clients are here, not yet 1")
            late = start_client(1, remote.hub.port, tmp_path)
            run.join(120)
            until(lambda: read_status_of(folder).round == 1)
            remote.hub.connections[0].cut("cut by hand")
            until(lambda: [each.joined for each in read_status_of(folder).clients] == [2, 1])
            records.append(federation.step())
            until(lambda: read_status_of(folder).round == 2)
        reported = read_status_of(folder)
        assert [asdict(each) for each in reported.clients] == [asdict(each) for each in remote.hub.seen]
    assert late.error() == ""
    sent = federation.ledger.training
    assert (reported.payload, reported.framed) == (sent().payload, sent().framed)
    assert (reported.up, reported.down) == (sent("up").payload, sent("down").payload)
    assert (reported.state, reported.waiting, reported.attempt, reported.repeats) == ("finished", "", 0, 0)
    record = records[-1][0]
    assert (reported.accuracy, reported.seconds) == (record.test_acc, record.time_wall)
    assert [each.state for each in reported.clients] == ["idle", "idle"]
    assert [each.error for each in reported.clients] == ["cut by hand", ""]
    for client, seen in enumerate(reported.clients):
        assert seen.peer.startswith("ipv4:127.0.0.1:")
        assert first.began < seen.since <= reported.time
        assert first.began < seen.last <= reported.time
        for direction, wire in (("up", seen.up), ("down", seen.down)):
            of_it = [each for _, found in records for each in found if (each[4], each[1]) == (client, direction)]
            payload, framed = sum(each[5] for each in of_it), sum(each[6] for each in of_it)
            assert payload < wire < 1.1 * framed + 20_000  # a head for each message, and what opens a round
    assert reported.wire_up == sum(each.up for each in reported.clients)


def stub(federation: Federation, seen: list[Seen]) -> Any:
    """Clients of which only the server's knowledge is there."""
    hub = SimpleNamespace(secure=True, address="[::1]:50505", seen=seen, refused=(1, "who"))
    rest = {"record": None, "accuracy": None, "attempt": 0, "repeats": 0, "waiting": ("", 0.0)}
    return SimpleNamespace(hub=hub, watch=None, **rest)


@pytest.mark.parametrize(("error", "state"), [(None, "finished"), (KeyboardInterrupt, "stopped")])
def test_many_changes_are_one_writing_and_the_end_does_not_wait(
    configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, state: str
) -> None:
    written: list[str] = []
    monkeypatch.setattr(status_file, "_PAUSE_S", 3600.0)
    monkeypatch.setattr(status_file, "replace_file", lambda path, text, durable: written.append(text))
    federation = Federation(configure())
    clients = stub(federation, [Seen() for _ in range(4)])
    try:
        with StatusFile(tmp_path, federation, clients):
            until(lambda: len(written) == 1)
            for number in range(1000):
                clients.hub.seen[0].up = number
                clients.watch()
            assert len(written) == 1
            if error is not None:
                raise error
    except KeyboardInterrupt:
        pass
    assert len(written) == 2
    last = json.loads(written[-1])
    assert (last["state"], last["clients"][0]["up"], last["wire_up"], last["tls"]) == (state, 999, 999, True)


@pytest.mark.parametrize(
    "text",
    ['{"round": 1', "[]", '{"round": "1"}', '{"clients": [1]}', '{"clients": [{"since": "now"}]}', '{"clients": null}'],
)
def test_a_file_that_no_server_wrote_is_refused_in_one_line(tmp_path: Path, text: str, capsys: Any) -> None:
    (tmp_path / NETWORK).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=NETWORK):
        read_status_of(tmp_path)
    assert viewer.main([str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert (shown.out, len(shown.err.splitlines())) == ("", 1)


def test_what_another_version_wrote_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    (tmp_path / NETWORK).write_text('{"round": 3, "accuracy": 1, "new": [], "clients": [{"joined": 2}]}', "utf-8")
    found = read_status_of(tmp_path)
    assert found == Status(round=3, accuracy=1, clients=[Seen(joined=2)])


# ---------------------------------------------------------------------- the program


def write(folder: Path, reported: Status) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / NETWORK, json.dumps(asdict(reported)), durable=False)
    return folder


def a_run(**changes: Any) -> Status:
    now = time.time()
    clients = [
        Seen("working", "ipv4:10.0.0.2:40000", now - 75, now - 5, 12_000_000, 3_000_000, 1),
        Seen("absent", "ipv6:%5Bfd00::3%5D:40001", now - 7300, now - 7301, 500, 400, 3, "no message in 300 s", now),
        Seen(),
    ]
    first = Status(title="sl mlp digits-iid", round=12, rounds=50, attempt=2, repeats=1, accuracy=0.9306, seconds=60)
    reported = replace(first, payload=22_900_000, waiting="", address="10.0.0.1:50505", tls=True, began=now, time=now)
    return replace(reported, clients=clients, **changes)


def shown(folder: Path, capsys: Any) -> list[str]:
    assert viewer.main([str(folder), "once=true"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return [" ".join(line.split()) for line in captured.out.splitlines()]


def test_a_run_is_shown_once(tmp_path: Path, capsys: Any) -> None:
    folder = write(tmp_path / "run", a_run())
    lock = FileLock.take(folder / LOCK)
    assert lock is not None
    lines = shown(folder, capsys)
    assert re.fullmatch(r"sl mlp digits-iid [━╸╺ ]+round 12/50, 93.06%", lines[0])
    assert "sent 22.9 MB" in lines[1]
    assert "60.0 s" not in lines[2]
    assert "1 min 0 s of training, about 3 min 10 s left" in lines[2]
    assert "10.0.0.1:50505, TLS" in lines[3]
    assert lines[4] == "round 13, attempt 2: 1 working, 2 absent; 1 repeated"
    assert lines[-4:-3] == ["client state for last word up down joins from"]
    assert re.fullmatch(r"0 working 1 min \d+ s 12.0 MB 3.00 MB 1 10.0.0.2:40000", lines[-3])
    assert re.fullmatch(r"1 absent 2 h 2 h 500 B 400 B 3 \[fd00::3\]:40001 \d+ s ago: no message in 300 s", lines[-2])
    assert lines[-1] == "2 absent"
    lock.release()
    lines = shown(folder, capsys)
    assert any(line.startswith("the server is not running") for line in lines)
    assert re.match("0 unknown ", lines[-3]), "of a dead server nothing is known"
    over = subprocess.Popen(["true"])
    over.wait()
    write(folder, a_run(pid=over.pid, host=socket.gethostname()))
    lock = FileLock.take(folder / LOCK)
    assert lock is not None
    assert any(line.startswith("the server is starting") for line in shown(folder, capsys))
    lock.release()
    write(folder, a_run(state="finished"))
    assert any(line.startswith("the run is over") for line in shown(folder, capsys))


def test_without_a_name_it_is_the_run_that_lives_or_else_that_wrote_last(tmp_path: Path, capsys: Any) -> None:
    for number, name in enumerate(("a/old", "b/alive", "c/new")):
        path = write(tmp_path / "saves" / name, a_run(title=name)) / NETWORK
        os.utime(path, (1000 + number, 1000 + number))
    save_dir = f"save_dir={tmp_path / 'saves'}"
    assert viewer.main([save_dir]) == 0
    assert capsys.readouterr().out.startswith("c/new")
    lock = FileLock.take(tmp_path / "saves" / "b" / "alive" / LOCK)
    assert lock is not None
    assert viewer.main([save_dir]) == 0
    assert capsys.readouterr().out.startswith("b/alive")
    lock.release()
    assert viewer.main([f"run={tmp_path / 'saves' / 'a'}"]) == 0
    assert capsys.readouterr().out.startswith("a/old")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["save_dir=nowhere"], "save_dir=nowhere"),
        (["nowhere"], "run=nowhere"),
        (["one", "two"], "run=two"),
        (["once=1"], "once=1"),
        (["onec=true"], "onec"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], line: str, capsys: Any) -> None:
    assert viewer.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(line)
    assert (captured.out, len(captured.err.splitlines())) == ("", 1)


def test_a_folder_of_another_user_is_one_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def refuse(path: Path) -> bool:  # as below a folder of mode 700; root, who may be who tests, is never refused
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert viewer.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"run={tmp_path}: expected a folder that this user may read\n"


NAMES = st.sampled_from(["", "cut by hand", "a reason that is longer than any column is wide " * 3])
CLIENTS = st.builds(
    Seen,
    state=st.sampled_from(["absent", "idle", "working", "testing"]),
    joined=st.integers(0, 3),
    error=NAMES,
    peer=st.just("ipv4:10.0.0.2:40000"),
    up=st.integers(0, 10**15),
)


@settings(max_examples=60)
@given(st.lists(CLIENTS, min_size=5, max_size=40), st.integers(78, 200), st.integers(24, 30), st.booleans())
def test_what_does_not_fit_the_terminal_is_reported_in_a_line(
    clients: list[Seen], width: int, height: int, alive: bool
) -> None:
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    view = View(Path("saves/run"), replace(a_run(), clients=clients), alive, "", 9e9)
    console.print(picture(view, console, fit=True))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width
    named = [
        int(found[1]) for line in lines if (found := re.match(r" *(\d+) (absent|idle|working|testing|unknown)", line))
    ]
    left = re.search(r"^\.\.\. and (\d+) more", lines[-1])
    assert len(named) + (int(left[1]) if left else 0) == len(clients)
    if not left:
        assert named == sorted(named)


def test_those_that_were_lost_come_before_those_that_never_came_and_all_others() -> None:
    clients = [Seen("working", joined=1) for _ in range(120)]
    clients[30] = Seen()
    clients[50] = Seen("idle", joined=2, error="cut by hand")
    clients[70] = clients[99] = Seen("absent", joined=1, error="no message in 300 s")
    view = View(Path("saves/run"), replace(a_run(), clients=clients), True, "", 9e9)
    console = Console(width=80, height=24, file=io.StringIO(), color_system=None)
    console.print(picture(view, console, fit=True))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.findall(r"^ +(\d+) (?:absent|idle|working)", text, re.MULTILINE)[:6] == ["70", "99", "30", "50", "0", "1"]
    assert re.search(r"more: \d+ working$", text.strip())


def test_it_is_refreshed_on_a_terminal_until_ctrl_c_or_the_runs_end(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, a_run()) for name in ("one", "two")]
    locks = [FileLock.take(folder / LOCK) for folder in folders]
    processes: list[tuple[subprocess.Popen[bytes], list[bytes]]] = []
    for folder in folders:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm"}
        command = [*program("status"), str(folder)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        seen: list[bytes] = []
        threading.Thread(target=_drain, args=(ours, seen), daemon=True).start()
        processes.append((process, seen))
    try:
        for (process, seen), folder in zip(processes, folders, strict=True):
            until(lambda seen=seen: b"12/50" in b"".join(seen))
            write(folder, a_run(round=13))
            until(lambda seen=seen: b"13/50" in b"".join(seen))
            assert process.poll() is None
        processes[0][0].send_signal(signal.SIGINT)
        write(folders[1], a_run(round=50, state="finished"))
        for process, seen in processes:
            assert process.wait(60) == 0
            assert b"Traceback" not in b"".join(seen)
        until(lambda: b"the run is over" in b"".join(processes[1][1]))
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()
        for lock in locks:
            if lock is not None:
                lock.release()


def _drain(terminal: int, seen: list[bytes]) -> None:
    try:
        while data := os.read(terminal, 65536):
            seen.append(data)
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(terminal)


def test_the_documents_show_what_the_program_shows(tmp_path: Path, capsys: Any) -> None:
    docs = checkout() / "docs"
    from tests.test_readme import blocks  # late: it needs a checkout

    (block,) = [block for block in blocks(docs / "deployment.md", "text") if "last word" in block]
    heads = shown(write(tmp_path, a_run()), capsys)[-4]
    assert heads in [" ".join(line.split()) for line in block.splitlines()]
    described = (docs / "results_format.md").read_text(encoding="utf-8")
    for name in (*asdict(Status()), *asdict(Seen())):
        assert f"`{name}`" in described, name


@pytest.mark.parametrize(("wanted", "found"), [(None, "ERROR"), ("INFO", "INFO")])
def test_grpc_is_quiet_unless_the_user_wants_to_hear_it(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, found: str
) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY")  # set when the package was imported, or by the user
    if wanted is not None:
        monkeypatch.setenv("GRPC_VERBOSITY", wanted)
    importlib.reload(network)
    assert os.environ["GRPC_VERBOSITY"] == found
