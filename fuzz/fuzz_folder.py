"""Fuzz what reads a run's folder, by atheris (libFuzzer): resuming, measuring, sweeps, figures.

    pip install atheris
    python -m fuzz.fuzz_folder -max_total_time=600

An input is one file of a small unfinished run, by its number, with other content; half of a manifest's get the sum that
goes with what they say. Whatever it is, each reader works or ends in one line, and nothing outside the run's folder is
opened to write, moved or removed. A finding ends the run and leaves its input in ``crash-...``.
"""

import atexit
import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import atheris
import torch

from fuzz.harness import join, json_of, mutate_json, pairs_of, run, split

with atheris.instrument_imports(
    include=[
        "cutlayer.runtime.rounds.checkpoint",
        "cutlayer.runtime.rounds.first_format",
        "cutlayer.runtime.ground.segments",
    ]
):
    from cutlayer.runtime.after import generate, personalize, probe
    from cutlayer.runtime.after.saved import read_config
    from cutlayer.runtime.launching.hydra_errors import explain
    from cutlayer.runtime.launching.hydra_support import load_config
    from cutlayer.runtime.launching.sweeps.sweep import read_progress
    from cutlayer.runtime.records import data_record
    from cutlayer.runtime.records import results as results_module
    from cutlayer.runtime.records.results import Results
    from cutlayer.runtime.rounds import checkpoint
    from cutlayer.runtime.rounds.federation import Federation
    from cutlayer.runtime.run_folder import find_finished, find_unfinished, read_status

from cutlayer.plotting.runs import find_runs
from cutlayer.runtime.network.server.status import read_status_of

SETTING = (
    *("algorithm=scaffold", "dataset=synthetic", "dataset.options.n_train=40", "dataset.options.n_test=20"),
    *("dataset.options.height=2", "dataset.options.width=2", "model=mlp", "num_clients=2", "rounds=4", "lr=0.01"),
    *("batch_size=20", "device=cpu", "progress=none", "threads=1"),
)
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}

config = load_config(list(SETTING))
home = Path(tempfile.mkdtemp(prefix="fuzz-folder-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
saves = home / "saves"
folder = saves / "a" / "b"
original = home / "original"
federation = Federation(config, folder)
watching = False


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    """End the process where something outside the run's folder would be written."""
    if not watching:
        return
    writes = event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes and not isinstance(arguments[0], int) and not f"{os.fsdecode(arguments[0])}/".startswith(f"{folder}/"):
        sys.stderr.write(f"{event} {arguments}\n")
        os.abort()


def make() -> list[Path]:
    """A run of two rounds, each with a checkpoint; its files, relative to its folder."""
    from cutlayer.runtime.experiment import _save_partition

    results = Results(folder)
    results.start(config.to_mapping())
    data_record.record_data(folder, federation.setup.dataset.facts)
    _save_partition(federation, folder)
    for _ in range(2):
        results.record(*federation.step())
        federation.checkpoint(results.state())
    (folder / "identity").write_text(config.identity() + "\n")
    (folder / "status.json").write_text('{"state": "running", "error": null}\n')
    (folder / "network.json").write_text('{"state": "running", "round": 1, "clients": [{"state": "idle"}]}\n')
    for name, content in (("personalized", '{"finished": true, "part": "full", "lr": 0.1, "round": 2, "clients": 2}'),):
        (folder / name / "setting").mkdir(parents=True)
        (folder / name / "setting" / "summary.json").write_text(content)
    shutil.copytree(folder, original)
    return sorted(
        path.relative_to(original) for path in original.rglob("*") if path.is_file() and path.suffix != ".png"
    )


def target(data: bytes) -> None:
    """Put one file in place, and have everything read the folder."""
    global watching
    pieces = split(data)
    if len(pieces) < 2 or not pieces[0]:
        return
    name = FILES[pieces[0][0] % len(FILES)]
    shutil.rmtree(folder)
    shutil.copytree(original, folder)
    (folder / name).write_bytes(pieces[1])
    watching = True
    try:
        for read in READERS:
            attempt(read)
    finally:
        watching = False


def attempt(read: Callable[[], object]) -> None:
    """Call a reader; an error has to be one line."""
    try:
        read()
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        assert "\n" not in line
        assert len(line) < 2000


def resume() -> None:
    """Resume from what is there, up to the next checkpoint."""
    results = Results(folder)
    if federation.resume(results.restore) is not None:
        results.start(config.to_mapping())
        federation.checkpoint(results.state())


READERS: list[Callable[[], object]] = [
    lambda: read_config(folder, {}),
    lambda: find_unfinished(saves.parent, config.identity()),
    lambda: find_finished(saves.parent, config.identity()),
    lambda: read_status(folder),
    lambda: read_progress(folder),
    lambda: read_status_of(folder),
    lambda: find_runs(saves),
    lambda: [each.personalized for each in find_runs(saves).runs],
    lambda: personalize.earlier_personalization(folder, config.personalize),
    lambda: probe.earlier_probe(folder, config.probe),
    lambda: generate.earlier_generation(folder, config.generate.settled("bytes")),
    lambda: federation.resume(),
    resume,
]


def mutate(data: bytes, random: Random) -> bytes:
    """One input changed by what its file is."""
    pieces = split(data)
    if len(pieces) < 2 or not pieces[0] or random.random() < 0.1:
        at = random.randrange(len(FILES))
        return join([bytes([at]), (original / FILES[at]).read_bytes()])
    name, content = FILES[pieces[0][0] % len(FILES)], pieces[1]
    parsed = pairs_of(content)
    if parsed is not None and random.random() < 0.8:
        content = json_of(mutate_json(parsed, random))
        if name.name in (checkpoint.MANIFEST, checkpoint.PREVIOUS) and random.random() < 0.7:
            content = signed(content)
    elif content:
        at = random.randrange(len(content))
        kind = random.randrange(4)
        if kind == 0:
            content = content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content += random.choice([b"\n", b"}", b"\xff", b"- a: {b: [" * 50, content[at:]])
        else:
            line = content.splitlines(keepends=True)
            random.shuffle(line)
            content = b"".join(line)
    return join([pieces[0], content])


def signed(content: bytes) -> bytes:
    """A manifest with the sum of its body, where it still is one."""
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        values = json.loads(content)
        values["sha256"] = hashlib.sha256(json.dumps(values["body"], sort_keys=True).encode()).hexdigest()
        return json.dumps(values).encode()
    return content


if __name__ == "__main__":
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    results_module.describe_environment = lambda: {"packages": {}}  # it asks git and the driver, each time anew
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    FILES = make()
    sys.addaudithook(guard)
    seeds = [join([bytes([at]), (original / name).read_bytes()]) for at, name in enumerate(FILES)]
    run(target, mutate, seeds, max_bytes=2**17)
