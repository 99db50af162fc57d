"""Where the peers run: an environment for each, and a network with nothing but a loopback interface."""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.measure import ROOT

PEERS = {"pfl": "pfl[pytorch]>=0.6", "flower": "flwr[simulation]>=1.42"}
"""What the package index is asked for, by side."""


class PeerError(Exception):
    """What a peer cannot do here, in one line."""


def cache_folder() -> Path:
    """Where environments are by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cutlayer" / "peers"


def environment(side: str, folder: Path) -> str:
    """The interpreter of a side's environment, which is made anew where it is not for this torch and this Python.

    It sees the packages of the environment that this runs in, torch above all; nothing is written there.

    Args:
        folder: of the environments.

    Raises:
        PeerError: its packages cannot be installed.
    """
    own, asked = folder / side, _asked(side)
    python, made = own / "bin" / "python", own / "made.json"
    if made.is_file() and json.loads(made.read_text()) == asked:
        return str(python)
    shutil.rmtree(own, ignore_errors=True)
    venv.create(own)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(own)}))
    (packages / "seen.pth").write_text("\n".join(dict.fromkeys(site.getsitepackages())) + "\n")
    constraints = own / "constraints.txt"
    constraints.write_text(f"torch=={asked['torch']}\n")
    # pip takes several: what the user's own configuration says holds too.
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--constraint", str(constraints), asked["package"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(own, ignore_errors=True)
        raise PeerError(f"{asked['package']} cannot be installed ({last_line(done.stderr)})")
    made.write_text(json.dumps(asked))
    return str(python)


def _asked(side: str) -> dict[str, str]:
    return {"package": PEERS[side], "torch": version("torch"), "python": sys.version, "from": sys.prefix}


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")


def variables(folder: Path, allocator: bool) -> dict[str, str]:
    """The environment of a side: one thread, no statistics sent to anyone, a token for Ray, and no setting of the user.

    Args:
        folder: of the run, which goes with it.
        allocator: let the C library keep freed memory for every side, as a run of Cutlayer lets it.
    """
    foreign = ("RAY_", "FLWR_", "PFL_", "OMP_", "MKL_", "MALLOC_", "PYTHON")
    token = folder / "token"
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    freed = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)} if allocator else {}
    return {
        **kept,
        **freed,
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PFL_PYTORCH_DEVICE": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }


@functools.cache
def alone() -> tuple[str, ...]:
    """What a command is begun with to run in a network of its own, where all ends with it, and it with this process.

    Raises:
        PeerError: the system grants none.
    """
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    kinds = ("--net", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child=KILL")
    # The shell stays, to bury the processes that others leave behind.
    script = 'ip link set lo up && "$@"; exit "$?"'
    command = ("setpriv", "--pdeathsig=KILL", "unshare", *user, *kinds, "bash", "-c", script, "bash")
    absent = [tool for tool in ("setpriv", "unshare", "ip", "bash") if shutil.which(tool) is None]
    if absent:
        raise PeerError(f"{', '.join(absent)} not installed (Debian: util-linux, iproute2)")
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        raise PeerError("the system grants no network of one's own")
    return command


def command(side: str, python: str, workers: int, arguments: Sequence[str]) -> list[str]:
    """The command that runs a side; see ``side.py``."""
    start = [python]
    if side == "pfl" and workers > 1:
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={workers}", "--master-addr=127.0.0.1"]
    return [*alone(), *start, "-m", "benchmarks.peers.side", side, *arguments]
