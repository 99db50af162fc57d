"""A run in one process: what it imports, and how deep in the house a training step is."""

import json
import subprocess
import sys
from pathlib import Path

from tests.places import checkout

ROOT = checkout()

SETTING = ("dataset=digits", "model=mlp", "num_clients=2", "rounds=1", "device=cpu", "progress=none")

# Each in a fork of a process that has loaded what all of them load.
WITHOUT_NETWORK = """
import contextlib, json, os, runpy, sys
import cutlayer.runtime.launching.launch, cutlayer.runtime.settings
first, given = json.loads(sys.argv[1]), sys.argv[2:]
for arguments in first:
    child = os.fork()
    if not child:
        sys.argv = sys.orig_argv = ["main.py", *arguments, *given]
        with contextlib.suppress(SystemExit):
            runpy.run_path("main.py", run_name="__main__")
        loaded = [name for name in sys.modules if name == "grpc" or "runtime.network" in name]
        print(json.dumps([arguments, loaded]), file=sys.stderr, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
DEPTH = """
import pathlib, runpy, sys, traceback
from cutlayer.runtime.parties.optim import PartOptimizer

step, own, seen = PartOptimizer.update, {}, []
for path in pathlib.Path().glob("*/**/*.py"):
    if ".venv" not in path.parts:
        own[str(path.resolve())] = str(path)
own[str(pathlib.Path("main.py").resolve())] = "main.py"

def update(self, *given):
    frames = [(str(pathlib.Path(frame.filename).resolve()), frame.name) for frame in traceback.extract_stack()]
    seen.append([f"{own[file]} {name}" for file, name in frames if file in own])
    return step(self, *given)

PartOptimizer.update = update
runpy.run_path("main.py", run_name="__main__")
print(*seen[0][seen[0].index("main.py main"):], sep="\\n", file=sys.stderr)
"""


def ran(script: str, tmp_path: Path, *arguments: str) -> list[str]:
    """What a script that stands for `python main.py` writes to stderr; the run has to go well."""
    command = [sys.executable, "-c", script, *arguments, *SETTING, f"save_dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_nothing_of_the_network_is_imported(tmp_path: Path) -> None:
    commands = [["algorithm=fed_avg"], ["algorithm=sl", "--cuts"], ["algorithm=sl", "--costs"]]
    loaded = [json.loads(line) for line in ran(WITHOUT_NETWORK, tmp_path, json.dumps(commands))]
    assert loaded == [[arguments, []] for arguments in commands]
    assert len([*tmp_path.rglob("results.json")]) == 1  # that of the first


def test_a_training_step_is_ten_calls_below_main(tmp_path: Path) -> None:
    """Those of this project's own code, with ``main`` and the step itself."""
    calls = ran(DEPTH, tmp_path, "algorithm=fed_avg")
    assert calls[-1].startswith("algorithms/fed_avg.py"), calls
    assert len(calls) + 1 <= 10, calls
