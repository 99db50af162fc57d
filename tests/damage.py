"""Damages every file of a checkpointed, unfinished run in six ways, resumes it, and compares what is left at the end.

    python -m tests.damage [positions [damages [method]]]

A resumed run ends as the undisturbed one did, to the bit but for times, or it is refused in one line; everything else
is a finding. Small files are changed at every byte, large ones at a seeded sample of so many positions (default 100).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cutlayer.runtime import experiment
from cutlayer.runtime.job import claim
from cutlayer.runtime.launching.hydra_errors import explain
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.records.results import Results, RoundRecord, TrafficRow
from cutlayer.runtime.settings import RunConfig
from tests.killing import left, write_pictures_without_drawing

SETTING = (
    *("dataset=digits", "model=mlp", "num_clients=3", "rounds=6", "batch_size=200", "device=cpu", "progress=none"),
    *("checkpoint_interval=2", "eval_interval=2", "threads=1"),
)
# What the clients keep, what the server keeps for each, and both.
METHODS = {
    "scaffold": ("lr=0.05",),
    "fsl_sage": ("algorithm.align_interval=2", "algorithm.align_epochs=1"),
    "fsmkd": (),
}
SMALL_BYTES = 4096
Change = Callable[[Path], None]


@contextlib.contextmanager
def interrupted(after: int) -> Generator[None]:
    """Interrupt the run in the block once a round is recorded."""
    original = Results.record

    def record(self: Results, record: RoundRecord, traffic: Iterable[TrafficRow] = ()) -> None:
        original(self, record, traffic)
        if record.round == after:
            raise KeyboardInterrupt

    Results.record = record
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        Results.record = original


def play(config: RunConfig, save_dir: Path) -> Path:
    """Run as the command line does: go on from what is there if there is something."""
    with claim(dataclasses.replace(config, save_dir=save_dir), ()) as folder:
        experiment.run(config, folder)
    return folder.path


def outcome(config: RunConfig, save_dir: Path, expected: dict[str, Any]) -> str:
    """ "same" or "refused"; anything else says what is wrong."""
    try:
        path = play(config, save_dir)
    except Exception as error:
        line = explain(error)
        return "refused" if line and "\n" not in line else f"a traceback: {type(error).__name__}: {error}"
    found = left(path)
    wrong = [key for key in expected if expected[key] != found[key]]
    return f"differs in {wrong}" if wrong else "same"


def damages(file: Path, other: Path, positions: int, draw: random.Random) -> Iterator[tuple[str, Change]]:
    """Every damage to one file, as what it is and a function that does it."""
    content = file.read_bytes()
    places = range(len(content))
    if len(content) > SMALL_BYTES or len(content) > positions:
        places = sorted(draw.sample(places, min(positions, len(content))))
    for at in places:
        bit = 1 << draw.randrange(8)
        changed = bytes([*content[:at], content[at] ^ bit, *content[at + 1 :]])
        yield f"bit {bit} of byte {at} flipped", lambda path, new=changed: replace(path, new)
    for at in places:
        yield f"cut to {at} bytes", lambda path, new=content[:at]: replace(path, new)
    yield "emptied", lambda path: replace(path, b"")
    yield "removed", lambda path: path.unlink()
    for text in (b"\n", b"\0" * 10, b'{"round": 99}\n', bytes(draw.randrange(256) for _ in range(5000))):
        yield f"{len(text)} bytes appended", lambda path, new=content + text: replace(path, new)
    if other.is_file():
        yield "replaced by another run's", lambda path: replace(path, other.read_bytes())


def replace(path: Path, content: bytes) -> None:
    """A file of new content, not the one that a copy of the run shares its blocks with."""
    path.unlink()
    path.write_bytes(content)


def prepare(home: Path, method: str) -> tuple[RunConfig, Path, Path, Path, dict[str, Any]]:
    """The configuration, an unfinished run's folder with its `saves`, another run's folder, and what is to come out."""
    config = load_config([f"algorithm={method}", *SETTING, *METHODS[method]])
    whole = play(config, home / "whole")
    for name, seed in (("unfinished", 0), ("other", 1)):
        with interrupted(after=5):
            play(dataclasses.replace(config, seed=seed), home / name)
    unfinished, other = (next((home / name).rglob("checkpoint")).parent for name in ("unfinished", "other"))
    return config, home / "unfinished", unfinished, other, left(whole)


def try_all(home: Path, method: str, positions: int, limit: int | None = None) -> Counter[str]:
    """Damage every file of a run of a method, or a sample of the damages; counts of the outcomes."""
    config, saves, unfinished, other, expected = prepare(home, method)
    counts: Counter[str] = Counter()
    draw = random.Random(0)
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    each = [
        (file, *damage)
        for file in files
        for damage in damages(file, other / file.relative_to(unfinished), positions, draw)
    ]
    for file, what, change in each if limit is None else draw.sample(each, limit):
        copy = home / "damaged"
        shutil.copytree(saves, copy)
        change(copy / file.relative_to(saves))
        result = outcome(config, copy, expected)
        if result not in ("same", "refused"):
            print(f"{method}: {file.relative_to(unfinished)}: {what}: {result}", flush=True)
        counts[result if result in ("same", "refused") else "wrong"] += 1
        shutil.rmtree(copy)
    return counts


def main(positions: int, limit: int | None, methods: Sequence[str]) -> int:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    write_pictures_without_drawing()
    total: Counter[str] = Counter()
    for method in methods:
        with tempfile.TemporaryDirectory() as home:
            counts = try_all(Path(home), method, positions, limit)
        total += counts
        print(f"{method}: {counts['same']} the same, {counts['refused']} refused, {counts['wrong']} wrong", flush=True)
    print(f"{total.total()} damages: {total['wrong']} wrong")
    return 1 if total["wrong"] else 0


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:3]]
    sys.exit(main(given[0] if given else 100, given[1] if len(given) > 1 else None, sys.argv[3:] or [*METHODS]))
