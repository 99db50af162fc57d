"""The test network itself: what its links do to a connection, as two programs on its hosts see it, and that it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.network import hosts, namespaces
from tests.network.namespaces import NamespaceHost, Namespaces
from tests.network.programs import Network, Program, until
from tests.network.shaping import Conditions, Line
from tests.places import ROOT

TALK = (sys.executable, "-m", "tests.network.talk")
FOR_EVER = 10**6


def serve(network: Network, folder: Path) -> Program:
    server = network.server.start([*TALK, "serve", network.listen, str(network.port)], folder / "server.txt")
    server.wait_for("listening", 20)
    return server


def ask(network: Network, folder: Path, client: int, size: int, times: int) -> Program:
    address, port = network.dial(client)
    command = [*TALK, "ask", address, str(port), str(size), str(times)]
    return network.clients[client].start(command, folder / f"{client}.txt")


def answers(program: Program) -> list[float]:
    """Seconds of each answer so far."""
    return [float(line.split()[1]) for line in program.text.splitlines() if line.startswith("answered")]


def in_all(network: Network, folder: Path, size: int, times: int, **conditions: float) -> list[float]:
    """Seconds that each message of client 0 took, once its link is as it shall be."""
    network.clients[0].link.shape(**conditions)
    program = ask(network, folder, 0, size, times)
    program.finish(60)
    return answers(program)


def test_every_message_arrives_and_is_counted(each_network: Network, tmp_path: Path) -> None:
    serve(each_network, tmp_path)
    before = each_network.server.link.traffic()
    asking = [ask(each_network, tmp_path, client, 100_000, 2) for client in range(3)]
    for program in asking:
        program.finish(30)
        assert len(answers(program)) == 2
    each = [host.link.traffic() for host in each_network.clients]
    assert all(traffic.sent_bytes >= 2 * 100_008 and traffic.received_bytes >= 2 * 32 for traffic in each)
    after = each_network.server.link.traffic()
    assert after.received_bytes - before.received_bytes >= 6 * 100_008


def test_a_delay_is_there_and_back(each_network: Network, tmp_path: Path) -> None:
    serve(each_network, tmp_path)
    took = in_all(each_network, tmp_path, 10, 3, delay_ms=60)
    assert len(took) == 3
    assert min(took) >= 0.120


def test_a_rate_bounds_what_gets_through(each_network: Network, tmp_path: Path) -> None:
    serve(each_network, tmp_path)
    [took] = in_all(each_network, tmp_path, 125_000, 1, rate_mbit=2)
    assert took >= 125_000 * 8 / 2e6


def test_a_cut_link_lets_nothing_through_until_it_is_healed(each_network: Network, tmp_path: Path) -> None:
    serve(each_network, tmp_path)
    one, other = (ask(each_network, tmp_path, client, 10, FOR_EVER) for client in (0, 1))
    for program in (one, other):
        program.wait_for("answered", 20, times=3)
    each_network.clients[0].link.cut()
    one.wait_for("silent", 20)
    came, arrived = len(answers(one)), len(answers(other))
    one.wait_for("silent", 20, times=3)
    assert len(answers(one)) == came
    other.wait_for("answered", 20, times=arrived + 3)
    each_network.clients[0].link.heal()
    one.wait_for("answered", 20, times=came + 3)


def test_what_was_cut_stays_cut_in_other_conditions(each_network: Network, tmp_path: Path) -> None:
    serve(each_network, tmp_path)
    program = ask(each_network, tmp_path, 0, 10, FOR_EVER)
    program.wait_for("answered", 20, times=3)
    link = each_network.clients[0].link
    link.cut()
    program.wait_for("silent", 20)
    came = len(answers(program))
    link.shape(delay_ms=20)
    program.wait_for("silent", 20, times=2)
    assert len(answers(program)) == came
    link.heal()
    program.wait_for("answered", 20, times=came + 3)
    assert min(answers(program)[came + 1 :]) >= 0.040
    link.shape()
    until(lambda: answers(program)[-1] < 0.040, "as quick as before", 20)


def test_the_server_cut_off_is_cut_off_from_all(each_network: Network, tmp_path: Path) -> None:
    serve(each_network, tmp_path)
    asking = [ask(each_network, tmp_path, client, 10, FOR_EVER) for client in range(3)]
    for program in asking:
        program.wait_for("answered", 20, times=2)
    each_network.server.link.cut()
    for program in asking:
        program.wait_for("silent", 20)
    each_network.server.link.heal()
    for program in asking:
        program.wait_for("answered", 20, times=len(answers(program)) + 2)


def test_a_program_hangs_and_goes_on_and_is_killed(each_network: Network, tmp_path: Path) -> None:
    serve(each_network, tmp_path)
    program = ask(each_network, tmp_path, 0, 10, FOR_EVER)
    program.wait_for("answered", 20, times=2)
    program.hang()
    came = len(answers(program))
    other = ask(each_network, tmp_path, 1, 10, 20)
    other.finish(20)
    assert len(answers(program)) == came
    program.go_on()
    program.wait_for("answered", 20, times=came + 2)
    program.kill()
    assert program.status == -signal.SIGKILL


@pytest.fixture(params=[pytest.param(True, id="netem"), pytest.param(False, id="program")])
def namespaces_network(request: pytest.FixtureRequest, tmp_path: Path):
    if reason := namespaces.missing():
        pytest.skip(reason)
    if request.param and not namespaces.has_netem():
        pytest.skip("the kernel has no netem")
    (tmp_path / "network").mkdir()
    with Namespaces(tmp_path / "network", netem=request.param, seed=1) as made:
        yield made


def test_lost_packets_are_sent_again(namespaces_network: Namespaces, tmp_path: Path) -> None:
    serve(namespaces_network, tmp_path)
    client: NamespaceHost = namespaces_network.clients[0]
    assert len(in_all(namespaces_network, tmp_path, 300_000, 1)) == 1
    before, sent = client.retransmitted(), client.link.traffic().sent_packets
    assert sent >= 300_000 / 1500
    assert len(in_all(namespaces_network, tmp_path, 300_000, 1, loss_percent=10, delay_ms=2, jitter_ms=1)) == 1
    # About 20 packets of 200 are lost; on a loaded machine one or two are sent again without need.
    assert client.retransmitted() - before >= 5


def test_hosts_have_addresses_of_their_own_and_reach_nothing_else(
    namespaces_network: Namespaces, tmp_path: Path
) -> None:
    serve(namespaces_network, tmp_path)
    assert "connected from 10.77.0.4 of client-2\n" in ask(namespaces_network, tmp_path, 2, 10, 1).finish(20)
    # An address of the block that documents use.
    away = [*TALK, "ask", "192.0.2.1", "80", "10", "1"]
    assert "Network is unreachable" in namespaces_network.clients[0].start(away, tmp_path / "away").finish(20, 1)
    assert "10.77.0" not in subprocess.run(["ip", "address"], capture_output=True, text=True, check=True).stdout


def test_the_kernel_is_asked_in_words_that_tc_knows() -> None:
    if reason := namespaces.missing():
        pytest.skip(reason)
    for conditions in (Conditions(), Conditions(1.5, 0.5, 10, 2.5)):
        command = ["unshare", "--net", *namespaces.netem("lo", conditions)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # 1 where tc itself does not understand, 2 where it is the kernel that has no netem.
        assert done.returncode == (0 if namespaces.has_netem() else 2), done.stderr
        assert namespaces.has_netem() or "kind is unknown" in done.stderr


HOLD = """
import sys, time
from pathlib import Path
from tests.network import hosts
folder = Path(sys.argv[1])
(folder / "network").mkdir()
with hosts.network(folder / "network", sys.argv[2], clients=1) as network:
    network.clients[0].link.shape(delay_ms=1)
    for host in (network.server, *network.clients):
        command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(300)", str(folder)]
        program = host.start(command, folder / host.name)
        program.wait_for("up")
        if host is network.server:
            program.hang()
    print("held", flush=True)
    time.sleep(300)
"""


def mentioning(text: str) -> list[int]:
    """Processes with `text` in their command line."""
    found: list[int] = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and text.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.parametrize("form", hosts.FORMS)
def test_nothing_is_left_of_a_killed_test(form: str, tmp_path: Path) -> None:
    if reason := hosts.missing(form):
        pytest.skip(reason)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path), form]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert len(mentioning(str(tmp_path))) >= 3
        process.kill()
    until(lambda: not mentioning(str(tmp_path)), "ended with the test", 20)
    mounts = Path("/proc/self/mounts").read_text()
    assert str(tmp_path) not in mounts


def test_a_line_keeps_order_and_never_hurries() -> None:
    line = Line(0)
    line.conditions = Conditions(delay_ms=20, jitter_ms=15, rate_mbit=8)
    due = [line.due(1000, number / 1e4) for number in range(1000)]
    came = [each for each in due if each is not None]
    assert len(came) == 1000
    assert came == sorted(came)
    # 1 ms for each 1000 bytes at 8 Mbit/s, and at least 5 ms on the way.
    assert all(each >= (number + 1) * 1e-3 + 5e-3 for number, each in enumerate(came))


def test_a_line_loses_its_share() -> None:
    line = Line(0)
    line.conditions = Conditions(loss_percent=30)
    lost = sum(line.due(1, 0.0) is None for _ in range(10_000))
    # Five standard deviations of the binomial distribution.
    assert abs(lost - 3000) < 5 * (10_000 * 0.3 * 0.7) ** 0.5
