"""The direction of imports: from a higher floor of the house to a lower one, and nowhere in a circle."""

import ast
import re
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.test_house import ROOT, SOURCES

# From the bottom. Rooms of one floor do not know each other. docs/architecture.md shows the same picture.
FLOORS = (
    ("runtime.ground",),
    ("distributions",),
    ("datasets",),
    ("tasks",),
    ("evaluations", "text_metrics"),
    ("models",),
    ("runtime.messages",),
    ("runtime.parties",),
    ("algorithms",),
    ("runtime.keys",),
    ("runtime.records",),
    ("runtime.scoring", "runtime.transport"),
    ("runtime.settings",),
    ("runtime.run_folder", "runtime.trust"),
    ("runtime.rounds",),
    ("runtime.costs", "plotting"),
    ("runtime.after",),
    ("runtime.network", "runtime.workers"),
    ("runtime.experiment", "runtime.job"),
    ("attacks", "runtime.launching"),
    ("hydra_plugins", "the programs of the root", "benchmarks"),
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path: Path) -> str:
    """The dotted name below `cutlayer`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES if path.parts[len(ROOT.parts)] != "cutlayer"}


def room_of(module: str) -> str:
    """Rooms are packages; those of `runtime`, and the modules at its top, are rooms of their own."""
    first, *others = module.split(".")
    if first == "runtime":
        return ".".join([first, *others[:1]])
    return "the programs of the root" if MODULES[module].parent == ROOT else first


def imported(tree: ast.AST, known: Mapping[str, object]) -> set[str]:
    """The modules of the house that a module imports, wherever in it: late, or for the checker of types only."""
    found: set[str] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            # What is imported may be a module itself, or a name in one.
            each = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("cutlayer.") in known else node.module for name in each]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.removeprefix("cutlayer.") for name in names}
    return found & known.keys()


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    return {
        module: imported(ast.parse(path.read_text()), MODULES) - {module} for module, path in sorted(MODULES.items())
    }


def test_the_check_itself_finds_an_import() -> None:
    text = """
from cutlayer.runtime.ground import config, nothing
if TYPE_CHECKING:
    from cutlayer.models import split
def late():
    import cutlayer.datasets.facts
    from torch import nn
"""
    known = {"runtime.ground", "runtime.ground.config", "models", "datasets.facts"}
    assert imported(ast.parse(text), dict.fromkeys(known)) == known


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_to_a_lower_floor(module: str) -> None:
    if module == "runtime":
        return
    room = room_of(module)
    others = {each for each in imports()[module] if room_of(each) != room}
    assert {each for each in others if FLOOR[room_of(each)] >= FLOOR[room]} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_picture_in_the_docs_shows_the_floors() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (picture,) = [block for block in text.split("```") if block.startswith("text\n") and "runtime.ground" in block]
    shown = [line.split("  ")[0].strip() for line in picture.splitlines()[1:] if line.strip() and line[0] != " "]
    assert shown == [", ".join(rooms) for rooms in reversed(FLOORS)]


PACKAGES = (
    "algorithms",
    "attacks",
    "benchmarks",
    "datasets",
    "deploy",
    "distributions",
    "evaluations",
    "fuzz",
    "hydra_config",
    "hydra_plugins",
)
PACKAGES += ("models", "plotting", "runtime", "tasks", "tests", "text_metrics")


def places(text: str) -> set[str]:
    """Files and folders of the house that a text names between backticks."""
    return {place for place in re.findall(r"`([\w./-]+/[\w.-]*)`", text) if place.split("/")[0] in PACKAGES}


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_place_that_is_named_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    made = set(re.findall(r"^`([\w./]+)`:$", text, re.MULTILINE))  # an example's own file, shown below such a line
    assert {place for place in places(text) - made if not next(ROOT.glob(f"{place.rstrip('/')}*"), None)} == set()


def test_the_check_itself_finds_a_place() -> None:
    assert places("see `runtime/store.py`, `models/` and `a/b`, runtime/x.py") == {"runtime/store.py", "models/"}
