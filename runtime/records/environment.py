"""What a run ran on: versions, hardware, revision and command, for `env.json`."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from cutlayer import HOME

_PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "omegaconf", "safetensors", "scikit-learn")


def describe_environment() -> dict[str, Any]:
    """Everything about the surroundings that may matter when a result is to be understood or repeated.

    Reads only this machine; contacts nothing, and does not initialise CUDA. Memory is in bytes.
    """
    revision, dirty = git_revision(HOME)
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "git": {"revision": revision, "dirty": dirty},
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "os": platform.platform(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count(), "usable_cores": _usable_cores()},
        "memory_bytes": _memory_bytes(),
        "gpus": gpu_names(),
        "cuda": torch.version.cuda,
        "threads": {
            "torch": torch.get_num_threads(),
            "torch_interop": torch.get_num_interop_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
    }


def git_revision(folder: Path) -> tuple[str | None, bool | None]:
    """The commit that `folder` is at, and whether its tree differs from it; None and None where git tracks none of it.

    An environment with this package in it may well lie in somebody's repository, whose commit says nothing of it.
    """
    revision = _output("git", "-C", str(folder), "rev-parse", "--verify", "HEAD")
    if revision is None or not _output("git", "-C", str(folder), "ls-files", "--", "."):
        return None, None
    status = _output("git", "-C", str(folder), "status", "--porcelain")
    return revision, None if status is None else bool(status)


def cpu_model() -> str | None:
    """The processor's name, e.g. "AMD EPYC 7B13", or None when the system does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Hardware", "cpu model") and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def gpu_names() -> list[str]:
    """Names of the GPUs of this machine, visible to the run or not."""
    # Asked of the driver's tool first: torch would initialise CUDA, which costs memory and forbids forked workers.
    listed = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if listed is not None:
        return [line.strip() for line in listed.splitlines() if line.strip()]
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _output(*command: str) -> str | None:
    """What a command prints, stripped; None when it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
