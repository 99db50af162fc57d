"""Seconds of a checkpoint of a run whose clients all keep rows, against rows in one file each.

Every client of the population gets a row, as after a round in which all took part; then a checkpoint is written. It is
compared with the same rows in a safetensors file each, synced, as checkpoints once were. A second figure is of a
checkpoint after a round of a small cohort: what most checkpoints of a large population are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cutlayer.runtime.ground.files import sync_file, sync_folder
from cutlayer.runtime.ground.serial import encode_tensors
from cutlayer.runtime.parties.store import Row, Store


def rows(clients: int, values: int) -> list[Row]:
    """A row of random numbers for each client."""
    generator = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(values, generator=generator)} for _ in range(clients)]


def store_seconds(folder: Path, made: Sequence[Row], cohort: int) -> tuple[float, float, int]:
    """Seconds of a checkpoint of all rows, and of one after a cohort changed theirs; and the files that there are."""
    store = Store(folder)
    for client, row in enumerate(made):
        store.put(client, "state", row)
    store.commit()
    began = time.perf_counter()
    store.checkpoint()
    sync_folder(folder)
    full = time.perf_counter() - began
    for client in range(cohort):
        store.put(client, "state", made[client])
    store.commit()
    began = time.perf_counter()
    segments = store.checkpoint()
    sync_folder(folder)
    return full, time.perf_counter() - began, len(segments)


def file_seconds(folder: Path, made: Sequence[Row]) -> float:
    """Seconds of the same rows in a file each."""
    began = time.perf_counter()
    for client, row in enumerate(made):
        path = folder / f"state-{client}.safetensors"
        path.write_bytes(encode_tensors(row))
        sync_file(path)
    return time.perf_counter() - began


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--values", type=int, default=1_000, help="float32 values of a row (default: 1000)")
    parser.add_argument("--cohort", type=int, default=100, help="clients of the second checkpoint (default: 100)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's folder for such)")
    return parser


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure both."""
    options = _parser().parse_args(arguments)
    made = rows(options.clients, options.values)
    show(f"{options.clients} clients, a row of {4 * options.values / 1000:.1f} kB each")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        full, small, segments = store_seconds(Path(name), made, options.cohort)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        each = file_seconds(Path(name), made)
    show(f"  all rows: {full:.2f} s in one file, {each:.2f} s in a file each, {each / full:.0f} times as long")
    show(f"  {options.cohort} rows more: {small:.3f} s, {segments} files in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
