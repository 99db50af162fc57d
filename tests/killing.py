"""Runs a small experiment again and again, killed with SIGKILL at each kind of moment, and compares what is left.

Started by test_kill.py in a process that has computed nothing: it forks before torch has computed anything.
"""

import csv
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from cutlayer.datasets import partition_files
from cutlayer.plotting import saving
from cutlayer.runtime.experiment import run
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.run_folder import RunFolder
from tests.contract.adapting import text_keys, write

SETTING = (
    *("num_clients=3", "rounds=5", "device=cpu", "progress=none"),
    *("frac=0.6", "checkpoint_interval=2", "eval_interval=2", "threads=1"),
)
DIGITS = ("dataset=digits", "model=mlp", "batch_size=200")
OWN = {
    "fsl_sage": ("algorithm.align_interval=2", "algorithm.align_epochs=2"),
    "scaffold": ("lr=0.05",),
    "flora": ("algorithm.ranks=[4,2]",),
}
TEXT = ("flora",)
"""Methods that are killed as they train low-rank adapters of a language model."""
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir")


def in_child(task: Callable[[], None]) -> int:
    """Run in a forked process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            task()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def play(folder: Path, config, die_at: int | None = None, count_to: Path | None = None) -> None:
    """The run; before the ``die_at``-th file operation inside its folder the process kills itself."""
    seen = 0
    armed = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if armed and event in EVENTS and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with RunFolder.claim(folder, config.identity(), save_dir=folder.parent) as claimed:
        assert claimed.path == folder
        run(config, claimed)
    armed = False
    if count_to is not None:
        count_to.write_text(str(seen))


def left(folder: Path) -> dict[str, object]:
    """What a run leaves, without its times."""
    results = json.loads((folder / "results.json").read_text())
    with (folder / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("time_")} for row in csv.DictReader(file)]
    clients = folder / "client_accuracy.csv"
    return {
        "clients": clients.read_text() if clients.exists() else "",
        "results": {key: value for key, value in results.items() if not key.startswith("time_")},
        "metrics": rows,
        "extras": (folder / "extras.csv").read_text(),
        "communication": (folder / "communication.csv").read_text(),
        "partition": (folder / "partition.csv").read_text(),
        "model": (folder / "model.safetensors").read_bytes() if (folder / "model.safetensors").exists() else b"",
        "journal": [
            {**json.loads(line), "series": None} for line in (folder / "history.jsonl").read_text().splitlines()
        ],
        "checkpoint": sorted(path.name for path in (folder / "checkpoint").iterdir()),
        "state": json.loads((folder / "status.json").read_text())["state"],
    }


def write_pictures_without_drawing() -> None:
    """The same operations on files, at a third of a run's time."""

    def write(path: Path) -> None:
        path.write_bytes(b"a picture")

    partition_files.draw = lambda file, *_: write(file)
    for ending in saving._SAVERS:
        saving._SAVERS[ending] = lambda _, path: write(path)


def load_libraries() -> None:
    """Here, so that not each process has to."""
    import peft.tuners.lora
    import transformers

    assert transformers.AutoModelForCausalLM
    assert transformers.GPT2LMHeadModel
    assert peft.tuners.lora.LoraLayer


def main(algorithm: str, home: Path, kills: int) -> None:
    write_pictures_without_drawing()
    if algorithm in TEXT:
        load_libraries()
        assert in_child(lambda: write(home)) == 0
    data = text_keys(home) if algorithm in TEXT else DIGITS
    config = load_config([f"algorithm={algorithm}", *data, *SETTING, *OWN[algorithm]])
    assert in_child(lambda: play(home / "whole", config, count_to=home / "count")) == 0
    expected, moments = left(home / "whole"), int((home / "count").read_text())
    killed = 0
    for moment in random.Random(0).sample(range(1, moments + 1), moments):
        folder = home / f"killed-{moment}"
        status = in_child(lambda f=folder, m=moment: play(f, config, die_at=m))
        assert status in (0, signal.SIGKILL)
        # The number of file operations differs a little from run to run, as results.json is written now and then.
        if not status:
            continue
        # Killed a second time on the way back, then left to finish.
        if in_child(lambda f=folder, m=moment: play(f, config, die_at=max(1, m // 2))):
            assert in_child(lambda f=folder: play(f, config)) == 0
        found = left(folder)
        wrong = [key for key in expected if expected[key] != found[key]]
        shown = {key: (expected[key], found[key]) for key in wrong if key != "model"}
        assert not wrong, f"killed before file operation {moment} of {moments}: {wrong} differ: {shown}"
        killed += 1
        if killed == kills:
            break
    print(f"{algorithm}: killed at {killed} moments of about {moments}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
