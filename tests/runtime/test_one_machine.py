"""A run in one process: what it imports, and how deep in the house a training step is."""

from pathlib import Path

import pytest

from tests.forked import Forks
from tests.places import checkout

checkout()

SETTING = ("dataset=digits", "model=mlp", "num_clients=2", "rounds=1", "device=cpu", "progress=none")

WITHOUT_NETWORK = """
import contextlib, json, runpy, sys
with contextlib.suppress(SystemExit):
    runpy.run_path("main.py", run_name="__main__")
loaded = [name for name in sys.modules if name == "grpc" or "runtime.network" in name]
print(json.dumps(loaded), file=sys.stderr, flush=True)
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


def ran(forks: Forks, script: str, tmp_path: Path, *arguments: str) -> list[str]:
    """What a script that stands for `python main.py` writes to stderr; the run has to go well."""
    file = tmp_path / "script.py"
    file.write_text(script)
    done = forks([*arguments, *SETTING, f"save_dir={tmp_path}"], str(file))
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("words", ["algorithm=fed_avg", "algorithm=sl --cuts", "algorithm=sl --costs"])
def test_nothing_of_the_network_is_imported(forks: Forks, tmp_path: Path, words: str) -> None:
    """Neither by the process, nor by the one that it is forked from, which has loaded what runs a run."""
    assert ran(forks, WITHOUT_NETWORK, tmp_path, *words.split()) == ["[]"]
    assert len([*tmp_path.rglob("results.json")]) == (words == "algorithm=fed_avg")


def test_a_training_step_is_ten_calls_below_main(forks: Forks, tmp_path: Path) -> None:
    """Those of this project's own code, with ``main`` and the step itself."""
    calls = ran(forks, DEPTH, tmp_path, "algorithm=fed_avg")
    assert calls[-1].startswith("algorithms/fed_avg.py"), calls
    assert len(calls) + 1 <= 10, calls
