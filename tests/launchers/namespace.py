"""A network of one's own with nothing but a loopback interface, and processes of one's own that all end with it.

Slurm and Ray listen on every address of their machine and run what they are told: a test lets neither out.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.places import ROOT, program
from tests.unshared import first_process

NODE = "cutlayer-node"
ADDRESS = "127.0.0.2"
_KINDS = ("--net", "--pid", "--uts", "--mount")
_LIFE_S = 540
# The second address: without one, a program that asks for the addresses of a machine with a network gets none.
# Ray keeps its sessions in /tmp/ray, and a socket's path has to be short.
_SET_UP = """
set -e
hostname {node}
ip link set lo up
ip address add {address}/8 dev lo
mount --bind {folder}/hosts /etc/hosts
mkdir -p /tmp/ray
mount --bind {folder}/ray /tmp/ray
echo ready
end=$((SECONDS + {life})) status=142
while [ $status -gt 128 ] && [ $SECONDS -lt $end ]; do
  status=0
  read -r -t 0.5 _ || status=$?
done
"""


def missing() -> str:
    """Why no such network can be had here; "" if one can."""
    absent = [tool for tool in ("unshare", "nsenter", "ip", "mount") if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: util-linux, iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    made = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, check=False)
    return "" if made.returncode == 0 else "the system grants no network namespace"


class Namespace:
    """Use as a context manager; `folder` is for what the servers in it keep, and goes with it."""

    def __enter__(self) -> "Namespace":
        self.folder = Path(tempfile.mkdtemp(prefix="cutlayer-"))
        (self.folder / "ray").mkdir()
        (self.folder / "home").mkdir()
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{ADDRESS} {NODE}\n")
        script = _SET_UP.format(node=NODE, address=ADDRESS, folder=self.folder, life=_LIFE_S)
        # Its first process waits for a line that never comes: it ends, and all others with it, when this one does. It
        # looks up now and then, as it has to bury the processes that others leave behind.
        self._process, self._target = first_process(_KINDS, script)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)

    def environment(self, **more: str) -> dict[str, str]:
        """For a program in there: nothing of the user's own Ray or Slurm, and threads as the launcher gives them."""
        foreign = ("RAY_", "SLURM_", "SBATCH_", "OMP_", "MKL_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        more = {"HYDRA_FULL_ERROR": "0", "RAY_USAGE_STATS_ENABLED": "0"} | more
        return kept | {"HOME": str(self.folder / "home")} | more

    def start(self, command: Sequence[str], cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
        """Start a program in there."""
        return subprocess.Popen(
            ["nsenter", f"--target={self._target}", *_KINDS, f"--wd={cwd}", *command],
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_servers(self, command: Sequence[str], seconds: float = 60, **environment: str) -> None:
        """Run a program that leaves servers behind, which would keep its pipes open."""
        into = [f"--target={self._target}", *_KINDS, f"--wd={self.folder}"]
        subprocess.run(
            ["nsenter", *into, *command],
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=True,
        )

    def run(self, *command: str, seconds: float = 30, **environment: str) -> str:
        """Run a program in there to its end; its output. It has to succeed."""
        process = self.start(command, **environment)
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == 0, f"{command}: {out}{err}"
        return out


def sweep_command(saves: Path | str, launcher: str, *arguments: str) -> list[str]:
    """A sweep of short jobs."""
    setting = ("dataset=digits", "model=mlp", "algorithm=fed_avg", "device=cpu", "batch_size=100")
    chosen = [f"hydra/launcher={launcher}", *setting, f"save_dir={saves}", *arguments]
    return [*program("main"), "-m", *chosen]


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str, str]:
    """Exit status and output of a program."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def describe(result: Any) -> str:
    """For the message of a failed test."""
    return "\n".join(str(part) for part in result)
