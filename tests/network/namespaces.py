"""Hosts with addresses of their own, each a network namespace, on one switch; none reaches any network but this one.

Nothing has a name outside: the namespaces belong to the processes of a process namespace whose first process ends when
its input does, that is with the test, however the test ends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.network.programs import Program, Traffic, bound_to_test
from tests.network.shaping import Conditions, encode
from tests.places import ROOT
from tests.unshared import first_process

_KINDS = ("--net", "--pid", "--mount")
_LIFE_S = 900
# Packets cross one by one, as on a wire, so that a share of them can be lost.
# The first process waits for a line that never comes, and looks up now and then, as it has to bury the processes that
# others leave behind.
_SET_UP = """
set -e
mount -t tmpfs none {folder}
printf '127.0.0.1 localhost\\n' > {folder}/hosts
ip link set lo up
ip link add switch type bridge mcast_snooping 0
ip link set switch up
last=0
for host in {hosts}; do
  last=$((last + 1))
  echo "10.77.0.$last $host" >> {folder}/hosts
  touch {folder}/$host.net {folder}/$host.uts
  unshare --net={folder}/$host.net --uts={folder}/$host.uts hostname $host
  ip link add $host type veth peer name eth0 netns {folder}/$host.net
  nsenter --net={folder}/$host.net bash -ec "
    echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 || true
    ip link set lo up
    ip address add 10.77.0.$last/24 dev eth0
    ip link set eth0 up gso_max_segs 1
  " 2> {folder}/errors
  ip link set $host up master switch
done
mount --bind {folder}/hosts /etc/hosts
echo ready
end=$((SECONDS + {life})) status=142
while [ $status -gt 128 ] && [ $SECONDS -lt $end ]; do
  status=0
  read -r -t 0.5 _ || status=$?
done
"""


@cache
def missing() -> str:
    """Why no such network can be had here; "" if one can."""
    absent = [tool for tool in ("unshare", "nsenter", "ip", "tc", "mount", "hostname") if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: util-linux, iproute2, hostname)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    made = ["unshare", *_KINDS, "--uts", "--fork", "ip", "link", "add", "switch", "type", "bridge"]
    if subprocess.run(made, capture_output=True, check=False).returncode:
        return "the system grants no network namespace with a bridge"
    return "" if has_netem() or os.access("/dev/net/tun", os.R_OK | os.W_OK) else "neither netem nor /dev/net/tun"


@cache
def has_netem() -> bool:
    """Whether the kernel itself can shape a link."""
    command = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Namespaces:
    """Use as a context manager; ``folder`` has to exist and to be empty."""

    form = "namespaces"
    listen, port = "10.77.0.1", 50505

    def __init__(self, folder: Path, clients: int = 3, netem: bool | None = None, seed: int = 0) -> None:
        """``netem``: whether the kernel shapes links, or a program does; by default the kernel if it can.

        ``seed`` of the packets that are lost, where a program shapes links.
        """
        self.netem = has_netem() if netem is None else netem
        self.folder, self.seed = folder, seed
        self.programs: list[Program] = []
        self._forwarders: list[subprocess.Popen[str]] = []
        self.server = NamespaceHost(self, "server", 1)
        self.clients = [NamespaceHost(self, f"client-{client}", 2 + client) for client in range(clients)]

    def dial(self, client: int) -> tuple[str, int]:
        return self.listen, self.port

    def __enter__(self) -> Namespaces:
        hosts = " ".join(host.name for host in (self.server, *self.clients))
        script = _SET_UP.format(folder=self.folder, hosts=hosts, life=_LIFE_S)
        self._process, self.first = first_process(_KINDS, script)
        return self

    def __exit__(self, *_: object) -> None:
        # The kernel ends everything in the namespace with its first process.
        self._process.kill()
        self._process.communicate()
        for forwarder in self._forwarders:
            forwarder.communicate(timeout=20)
        for program in self.programs:
            program.end()

    def enter(self, host: str | None = None) -> list[str]:
        """What a command is to begin with, to be run at the switch or on a host."""
        into = ["nsenter", f"--target={self.first}", "--mount"]
        if host is None:
            return [*into, "--net"]
        return [*into, "--pid", "nsenter", f"--net={self.folder}/{host}.net", f"--uts={self.folder}/{host}.uts"]

    def do(self, *command: str, host: str | None = None) -> str:
        """Run a command at the switch or on a host; its output. It has to succeed."""
        done = subprocess.run([*self.enter(host), *command], capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def forwarder(self, one: str, other: str, seed: int) -> subprocess.Popen[str]:
        """A program that carries frames between two new devices at the switch."""
        process = subprocess.Popen(
            [*self.enter(), f"--wd={ROOT}", sys.executable, "-m", "tests.network.shaping", one, other, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._forwarders.append(process)
        return process


class NamespaceHost:
    """A host with one interface, eth0."""

    def __init__(self, network: Namespaces, name: str, number: int) -> None:
        self.name, self._network = name, network
        self.address = f"10.77.0.{number}"
        self.link = NamespaceLink(network, name, network.seed + number)

    def start(self, command: Sequence[str], log: Path, **environment: str) -> Program:
        # What stands between test and program is outside, and if it is stopped it ends by nothing else.
        inside = [*bound_to_test(), *self._network.enter(self.name), f"--wd={ROOT}", *command]
        program = Program(inside, log, self.name, nested=True, **environment)
        self._network.programs.append(program)
        return program

    def retransmitted(self) -> int:
        """TCP segments that programs on this host had to send again."""
        rows = [
            line.split()
            for line in self._network.do("cat", "/proc/self/net/snmp", host=self.name).splitlines()
            if line.startswith("Tcp:")
        ]
        return int(rows[1][rows[0].index("RetransSegs")])


class NamespaceLink:
    """From a host's eth0 to the switch."""

    def __init__(self, network: Namespaces, host: str, seed: int) -> None:
        self._network, self._host, self._seed = network, host, seed
        self._port = host
        """The interface of the switch that the link ends in."""
        self._forwarder: subprocess.Popen[str] | None = None

    def cut(self) -> None:
        # The interfaces stay up: as with a cable pulled somewhere beyond the next switch, nothing says what happened.
        self._network.do("ip", "link", "set", self._port, "nomaster")

    def heal(self) -> None:
        self._network.do("ip", "link", "set", self._port, "master", "switch")

    def shape(self, **conditions: float) -> None:
        wanted = Conditions(**conditions)
        if self._network.netem:
            for device, host in (("eth0", self._host), (self._host, None)):
                self._network.do(*netem(device, wanted), host=host)
            return
        if self._forwarder is None:
            self._detour()
        self._send(encode(wanted))

    def _send(self, line: str) -> None:
        assert self._forwarder is not None
        assert self._forwarder.stdin is not None
        assert self._forwarder.stdout is not None
        self._forwarder.stdin.write(line)
        self._forwarder.stdin.flush()
        assert self._forwarder.stdout.readline() == "ready\n"

    def _detour(self) -> None:
        """The program comes between the host and the switch: host - bridge - device - program - device - switch."""
        network, near, far, between = self._network, f"{self._host}-n", f"{self._host}-f", f"{self._host}-b"
        self._forwarder = network.forwarder(near, far, self._seed)
        self._send("")
        was_cut = "master" not in json.loads(network.do("ip", "-j", "link", "show", self._port))[0]
        network.do("ip", "link", "add", between, "type", "bridge", "mcast_snooping", "0")
        network.do("ip", "link", "set", near, "up", "master", between)
        network.do("ip", "link", "set", far, "up")
        network.do("ip", "link", "set", between, "up")
        network.do("ip", "link", "set", self._host, "nomaster")
        network.do("ip", "link", "set", self._host, "master", between)
        self._port = far
        if not was_cut:
            self.heal()

    def traffic(self) -> Traffic:
        # Of the switch's end of the cable, as the first process sees it; received, then sent, eight figures each.
        devices = Path(f"/proc/{self._network.first}/net/dev").read_text().splitlines()
        [counted] = [line.split()[1:] for line in devices if line.split()[0] == f"{self._host}:"]
        sent, packets, received, received_packets = (int(counted[column]) for column in (0, 1, 8, 9))
        return Traffic(sent, received, packets, received_packets)


def netem(device: str, conditions: Conditions) -> list[str]:
    """The command that lets the kernel hold back, lose and slow down what leaves by a device."""
    command = ["tc", "qdisc", "replace", "dev", device, "root", "netem", "limit", "1000"]
    command += ["delay", f"{conditions.delay_ms}ms", f"{conditions.jitter_ms}ms"]
    # A rate of 0 is none; left out, the one before would stay.
    return [*command, "loss", "random", f"{conditions.loss_percent}%", "rate", f"{conditions.rate_mbit}mbit"]
