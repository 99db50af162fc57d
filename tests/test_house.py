"""The rules of the house that a program can check."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from cutlayer import algorithms, datasets, distributions, models
from tests.places import checkout

ROOT = checkout()
ELSEWHERE = ("fuzz", "tests", "typings")  # which the rules for what is used do not hold for
SOURCES = sorted(
    [
        *ROOT.glob("*.py"),
        *(
            path
            for folder in ROOT.iterdir()
            if folder.name not in ELSEWHERE and next(folder.glob("*.py"), None) and not folder.name.startswith(".")
            for path in folder.rglob("*.py")
        ),
    ]
)
# Also choices of dataset.normalize and of model.client_norm, where branching on them is right.
REGISTERED = {*algorithms.names(), *models.names(), *datasets.names(), *distributions.names()} - {"imagenet", "own"}


def branches_on(tree: ast.AST, names: set[str]) -> list[tuple[int, str]]:
    """Comparisons with, and matches of, a constant among ``names``: line and name."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        inside: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            inside = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            inside = [node.value]
        for part in inside:
            found += [
                (leaf.lineno, leaf.value)
                for leaf in ast.walk(part)
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str) and leaf.value in names
            ]
    return found


def test_the_check_itself_finds_a_branch() -> None:
    assert branches_on(ast.parse('if config.name == "fsl_sage": pass'), REGISTERED) == [(1, "fsl_sage")]
    assert branches_on(ast.parse('x = 1 if name in ("mnist", "other") else 2'), REGISTERED) == [(1, "mnist")]
    assert branches_on(ast.parse('match name:\n    case "mlp":\n        pass'), REGISTERED) == [(2, "mlp")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_branch_on_a_registered_name(path: Path) -> None:
    assert branches_on(ast.parse(path.read_text()), REGISTERED) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


LONGEST_FUNCTION = 40  # lines without the docstring
LONGEST_PARTY = 150  # of a class of a method, with both parties


def length_of(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Lines without those of the docstring."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node, clean=False) is None:
        return lines
    (docstring, *_) = node.body
    assert docstring.end_lineno is not None
    return lines - (docstring.end_lineno - docstring.lineno + 1)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert length_of(node) <= LONGEST_FUNCTION, f"{node.name} in line {node.lineno}"
        elif isinstance(node, ast.ClassDef) and "algorithms" in path.parts:
            assert length_of(node) <= LONGEST_PARTY, f"{node.name} in line {node.lineno}"


def test_every_program_of_the_root_is_checked() -> None:
    programs = {path.name for path in SOURCES if path.parent == ROOT}
    assert {"main.py", "plot_results.py", "status.py", "attack.py"} <= programs
    assert {path.parent.name for path in SOURCES} >= {"cutlayer", "algorithms", "ground", "sweeps", "figures"}


def test_algorithms_import_the_boundary_and_never_the_loop() -> None:
    allowed = {"ground.config", "ground.devices", "ground.registry", "messages.boundary", "messages.crossing"}
    allowed |= {f"parties.{name}" for name in ("aggregate", "blueprint", "cohort", "contexts", "optim")}
    found: set[str] = set()
    for path in (ROOT / "algorithms").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cutlayer.runtime."):
                found.add(node.module.removeprefix("cutlayer.runtime."))
                assert node.module.removeprefix("cutlayer.runtime.") in allowed, f"{path.name} imports {node.module}"
    assert {"messages.boundary", "parties.contexts"} <= found


def test_nothing_unpickles() -> None:
    """What a stranger may have written is never given to code that can run what is in it.

    Workers read only what the process that started them writes into their pipes and memory.
    """
    for path in SOURCES:
        if path.parent.name == "workers":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), path.name
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                assert called != "torch.load" or safe, path.name


def test_autocast_keeps_no_casts_of_weights() -> None:
    """A party's turn holds many steps, and a cast kept over a step is of weights that are no longer there."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.autocast",
                "autocast",
                "torch.amp.autocast",
            ):
                keys = {key.arg: ast.unparse(key.value) for key in node.keywords}
                assert "False" in (keys.get("cache_enabled"), keys.get("enabled")) or "benchmarks" in path.parts, (
                    path.name
                )


def test_no_large_file_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert [path.name for path in files if path.is_file() and path.stat().st_size > 1_000_000] == []


def test_every_test_learns_from_one_place_whether_there_is_a_checkout() -> None:
    """So that what it starts and reads is there, or it is skipped, where only a wheel is installed."""
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name != "places.py":
            found = re.findall(r'Path\(__file__\)|sys\.executable, "\w+\.py"', path.read_text(encoding="utf-8"))
            assert path.name == "test_house.py" or not found, f"{path.relative_to(ROOT)}: see tests/places.py"


# What each module of a kind has: a program its keys, a registry the same functions.
SHARED_NAMES = {"log", "main", "KEYS", "register", "get", "names", "check_options"}


def public_names(source: str) -> set[str]:
    """The classes, functions and constants that a module defines; not its type variables."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "TypeVar":
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {
                leaf.id
                for target in targets
                for leaf in ast.walk(target)
                if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)
            }
    return {name for name in found if not name.startswith("_")} - SHARED_NAMES


def test_public_names_of_a_module_are_found() -> None:
    source = "A, (B, _C) = 1, (2, 3)\nD: int = 4\nT = TypeVar('T')\nlog = 5\nx.y = 7\n"
    source += "class E: ...\ndef f(): g = 6\nasync def h(): ..."
    assert public_names(source) == {"A", "B", "D", "E", "f", "h"}


def test_a_public_name_has_one_meaning() -> None:
    """The benchmarks are left out: each is a program of its own that nothing imports."""
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] != "benchmarks":
            for name in public_names(path.read_text()):
                places.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def acting_participles(source: str) -> list[str]:
    """Functions that return nothing, and so act, though named by a past participle as those that only compute are."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and isinstance(node.returns, ast.Constant)
        and node.returns.value is None
        and (first := node.name.strip("_").split("_")[0]).endswith("ed")
        and first not in {"feed", "need", "seed"}
    ]


def test_participles_that_act_are_found() -> None:
    source = "def sorted_rows() -> list: ...\ndef feed() -> None: ...\n"
    source += "def _restored() -> None: ...\nasync def closed() -> None: ..."
    assert acting_participles(source) == ["_restored", "closed"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_past_participle_names_no_action(path: Path) -> None:
    assert acting_participles(path.read_text()) == []
