"""GPUs for the jobs of sweeps: each process of a job holds a locked slot of a GPU for as long as the job lives.

The locks lie in one folder of the machine, so that jobs of any sweep, of any user, keep out of each other's way.
Numbers given out by counting jobs cannot do that: two sweeps count apart, and a job that ends early leaves its GPU
idle.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cutlayer.runtime.ground.locks import FileLock

VISIBLE = "CUDA_VISIBLE_DEVICES"
_POLL_S = 0.5
_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader")


@dataclass(frozen=True)
class Gpu:
    """A GPU as CUDA_VISIBLE_DEVICES may name it (`uuid`, or its index where there is none), and for people.

    Those of a job with several workers are one of these too, separated by commas.
    """

    uuid: str
    name: str


def slots_folder() -> Path:
    """The folder of the locks, one for all users of the machine."""
    folder = Path(tempfile.gettempdir()) / "cutlayer-gpu-slots"
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(OSError):  # another user's: open already
        folder.chmod(0o1777)
    return folder


def visible_gpus() -> list[Gpu]:
    """The GPUs that this process may use, in CUDA's order; empty where there is none. Does not start CUDA."""
    installed = _installed()
    asked = os.environ.get(VISIBLE)
    if asked is None:
        return [gpu for _, gpu in installed]
    known = dict(installed) | {gpu.uuid: gpu for _, gpu in installed}
    found: list[Gpu] = []
    for entry in (part.strip() for part in asked.split(",")):
        gpu = known.get(entry) or next((gpu for _, gpu in installed if entry and gpu.uuid.startswith(entry)), None)
        if gpu is None and entry.startswith("MIG-") and installed:
            gpu = Gpu(entry, "part of a GPU")
        if gpu is None:
            break  # as CUDA does: what follows an unknown entry is not visible
        found.append(gpu)
    return found


def _installed() -> list[tuple[str, Gpu]]:
    try:
        listed = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return _counted() if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() else []
    rows = [[cell.strip() for cell in line.split(",", 2)] for line in listed.splitlines() if line.strip()]
    return [(index, Gpu(uuid or index, name)) for index, uuid, name in (row for row in rows if len(row) == 3)]


def _counted() -> list[tuple[str, Gpu]]:
    """GPUs without a tool that lists them: by number, as torch counts them."""
    import torch  # takes seconds, and most machines without the tool have no GPU either

    return [(str(index), Gpu(str(index), "GPU")) for index in range(torch.cuda.device_count())]


@contextlib.contextmanager
def gpu_slot(
    device: str,
    jobs_per_gpu: int = 1,
    waiting: Callable[[str], None] = print,
    gpus: Sequence[Gpu] | None = None,
    workers: int = 1,
) -> Generator[Gpu | None]:
    """Hold a slot of a GPU for each worker for the length of the block; this process sees no other GPU.

    Waits until as many are free, or all where there are fewer. Gives None, and holds nothing, for `device=cpu` and
    where there is no GPU. With `device=cuda:1` only that GPU will do, and all stay visible.

    Args:
        device: as in the configuration. jobs_per_gpu: slots of each GPU.
        waiting: called once, with what is waited for, if no slot is free at once.
        gpus: what there is, by default `visible_gpus()`. workers: processes of the job.
    """
    gpus = visible_gpus() if gpus is None and device != "cpu" else gpus or []
    index = re.fullmatch(r"cuda:(\d+)", device)
    wanted = [gpus[int(index[1])]] if index and int(index[1]) < len(gpus) else list(gpus)
    if device == "cpu" or not wanted or (index and len(wanted) > 1):  # a GPU that is not there: the job will say so
        yield None
        return
    held = _wait(wanted, jobs_per_gpu, workers, waiting)
    try:
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # numbers mean what the listing means by them
        mine = list(dict.fromkeys(gpu for _, gpu in held))
        gpu = Gpu(",".join(each.uuid for each in mine), ", ".join(each.name for each in mine))
        if not index:
            os.environ[VISIBLE] = gpu.uuid
        yield gpu
    finally:
        for lock, _ in held:
            lock.release()


def _wait(
    gpus: Sequence[Gpu], jobs_per_gpu: int, workers: int, waiting: Callable[[str], None]
) -> list[tuple[FileLock, Gpu]]:
    folder, needed, reported = slots_folder(), min(workers, len(gpus) * jobs_per_gpu), False
    # First slots of all GPUs before second ones: jobs spread before they share.
    slots = [(gpu, folder / f"{gpu.uuid.replace('/', '_')}-{slot}") for slot in range(jobs_per_gpu) for gpu in gpus]
    while True:
        held: list[tuple[FileLock, Gpu]] = []
        for gpu, path in slots:
            if (lock := FileLock.take(path)) is not None:
                held.append((lock, gpu))
            if len(held) == needed:
                return held
        for lock, _ in held:  # all or none: two jobs that kept some would wait for each other
            lock.release()
        if not reported:
            reported = True
            names = ", ".join(gpu.uuid for gpu in gpus)
            what = "a free GPU" if needed == 1 else f"{needed} free places on GPUs"
            waiting(f"{what} of {len(gpus)} ({names}); other jobs hold them")
        time.sleep(_POLL_S * random.uniform(0.5, 1))
