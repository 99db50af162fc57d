"""Everything of ours is imported under one name, and the names of others are left to them."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cutlayer.names import TAKEN
from tests.places import checkout

ROOT = checkout()
OURS = (
    "algorithms",
    "attacks",
    "datasets",
    "distributions",
    "evaluations",
    "models",
    "plotting",
    "runtime",
    "tasks",
    "text_metrics",
)
# Hugging Face's, as far as it matters here, with a module below it.
STAND_IN = {"__init__.py": "from datasets.features import ours\n__version__ = '1'\n", "features.py": "ours = False\n"}
THEIRS = "import datasets, datasets.features; assert not hasattr(datasets, 'own_partition'), datasets.__file__"
BOTH = {
    "after ours": f"from cutlayer import datasets as ours; {THEIRS}; assert 'digits' in ours.names()",
    "before and after": f"{THEIRS}; from cutlayer import datasets as ours; {THEIRS}; assert 'digits' in ours.names()",
}


def python(*arguments: str, cwd: Path = ROOT, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python with all warnings as errors, and with a folder more on its path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path or "")}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def theirs(tmp_path: Path) -> Path | None:
    """A folder with another package `datasets`; None where Hugging Face's is installed."""
    if importlib.util.find_spec("datasets") is not None:
        return None
    folder = tmp_path / "theirs" / "datasets"
    folder.mkdir(parents=True)
    for name, content in STAND_IN.items():
        (folder / name).write_text(content)
    return folder.parent


def test_both_packages_are_there_for_code_in_the_root(theirs: Path | None) -> None:
    done = python("-c", BOTH["after ours"], path=theirs)
    assert done.returncode == 0, done.stderr


def test_both_packages_are_there_for_a_program_of_the_root(theirs: Path | None, tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "cutlayer", copy / "cutlayer")
    for name in OURS:
        (copy / name).symlink_to(ROOT / name)
    (copy / "own.py").write_text(f"{BOTH['before and after']}\nimport cutlayer; print(cutlayer.HOME)\n")
    done = python(str(copy / "own.py"), cwd=tmp_path, path=theirs)
    assert (done.returncode, done.stdout) == (0, f"{copy}\n"), done.stderr


def test_both_packages_are_there_for_a_test(theirs: Path | None, tmp_path: Path) -> None:
    test = tmp_path / "test_both.py"
    test.write_text("\n".join(f"def test_{number}():\n    {code}\n" for number, code in enumerate(BOTH.values())))
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"))
    done = python("-m", "pytest", *options, str(test), path=theirs)
    assert f"{len(BOTH)} passed" in done.stdout, done.stdout


def test_ours_are_refused_under_any_other_name() -> None:
    """Of each package, and of a module of each: neither may run."""
    modules = [next(path for path in sorted((ROOT / name).glob("*.py")) if path.stem != "__init__") for name in OURS]
    for name in (*OURS, *(f"{path.parent.name}.{path.stem}" for path in modules)):
        package = name.partition(".")[0]
        done = python("-S", "-c", f"import {name}")  # without what is installed, such as Hugging Face's
        last = done.stderr.splitlines()[-1]
        assert last == f"ImportError: import cutlayer.{package}, not {package}, which would be there a second time"


def test_what_others_look_for_is_not_found_in_the_root() -> None:
    """Else transformers, which looks whether there is `datasets`, would take ours for Hugging Face's."""
    found = "[importlib.util.find_spec(name) for name in cutlayer.names.TAKEN]"
    done = python("-S", "-c", f"import importlib.util, cutlayer.names; print({found})")
    assert done.stdout.strip() == str([None] * len(TAKEN)), done.stderr
    assert set(TAKEN) <= set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_every_package_asks_for_its_name_before_anything_else(name: str) -> None:
    body = ast.parse((ROOT / name / "__init__.py").read_text()).body[1:]
    first = next(node for node in body if not (isinstance(node, ast.ImportFrom) and node.module == "__future__"))
    assert isinstance(first, ast.If)
    assert ast.unparse(first.test) == f"__name__ != 'cutlayer.{name}'"


def test_no_package_of_ours_is_left_out() -> None:
    """Only what runs nothing of its own, Hydra's plugins, and what is for a checkout has a bare name."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"benchmarks", "cutlayer", "tests"} == set(OURS)


def test_transformers_and_peft_are_whole_beside_ours() -> None:
    for package in ("transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    code = "import cutlayer.datasets, transformers, peft; from transformers import GPT2LMHeadModel, Trainer"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
