"""Damages every file of a checkpointed, unfinished run in six ways, resumes it, and compares what is left at the end.

    python -m tests.damage [positions]

A resumed run ends as the undisturbed one did, to the bit but for times, or it is refused in one line; everything else
is a finding. Small files are changed at every byte, large ones at a seeded sample of so many positions (default 100).
"""

from __future__ import annotations

import dataclasses
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from runtime import experiment
from runtime.hydra_errors import explain
from runtime.hydra_support import load_config
from runtime.job import claim
from runtime.results import Results
from runtime.settings import RunConfig
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


def stop(after: int) -> Callable[[], None]:
    """Have runs interrupted after a round is recorded, until the function that is given is called."""
    original = Results.record

    def record(self: Results, *arguments: Any) -> None:
        original(self, *arguments)
        if arguments[0].round == after:
            raise KeyboardInterrupt

    Results.record = record
    return lambda: setattr(Results, "record", original)


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
    found: list[Path] = []
    for name, seed in (("unfinished", 0), ("other", 1)):
        back = stop(after=5)
        try:
            play(dataclasses.replace(config, seed=seed), home / name)
        except KeyboardInterrupt:
            pass
        finally:
            back()
        found.append(next((home / name).rglob("checkpoint")).parent)
    return config, home / "unfinished", *found, left(whole)


def try_all(
    home: Path, method: str, positions: int, only: Callable[[str], bool] = lambda name: True
) -> tuple[Counter[str], list[str]]:
    """Damage every file of a run of a method; counts of the outcomes, and the findings."""
    config, saves, unfinished, other, expected = prepare(home, method)
    counts: Counter[str] = Counter()
    findings: list[str] = []
    draw = random.Random(0)
    for file in sorted(path for path in unfinished.rglob("*") if path.is_file()):
        name = file.relative_to(unfinished)
        if not only(name.as_posix()):
            continue
        for what, change in damages(file, other / name, positions, draw):
            copy = home / "damaged"
            shutil.copytree(saves, copy)
            change(copy / file.relative_to(saves))
            result = outcome(config, copy, expected)
            if result not in ("same", "refused"):
                findings.append(f"{method}: {name}: {what}: {result}")
                print(findings[-1], flush=True)
            counts[result if result in ("same", "refused") else "wrong"] += 1
            shutil.rmtree(copy)
    return counts, findings


def main(positions: int) -> int:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    write_pictures_without_drawing()
    total: Counter[str] = Counter()
    for method in METHODS:
        with tempfile.TemporaryDirectory() as home:
            counts, _ = try_all(Path(home), method, positions)
        total += counts
        print(f"{method}: {counts['same']} the same, {counts['refused']} refused, {counts['wrong']} wrong", flush=True)
    print(f"{total.total()} damages: {total['wrong']} wrong")
    return 1 if total["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
