"""Small bugs put in one at a time, to see which of them no test catches: by hand, with mutmut (docs/testing.md).

    python -m tests.mutants methods --sample 40

works on a copy of the checkout, so that nothing in it changes. Of each module of the group a sample of mutants is drawn
from the seed, and each is tried on those of the group's tests that reach it. The copy is kept: what survived is tried
again, with the tests as they are then, by `--again`.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.places import checkout

ROOT = checkout()
# What lies inside of `cutlayer/` in a wheel does in the copy: mutmut knows a module's name by its path.
_TOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
INSIDE: list[str] = _TOOLS["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["inside"]
REFERENCES = ("tests/algorithms/test_references.py", "tests/algorithms/test_personal_references.py")
METHODS = "base fed_avg scaffold splitfed cse_fsl fsl_sage alignment personal ditto per_fed_avg mhmd reference"
DATA = "partition normalize augment colour batching seeding source"
BYTES = ("cse_fsl", "fsl_sage", "scaffold", "sl_multi_server")
ONE_GRAPH = "test_all_parts_against_one_graph"
TRIED = "distributions apportion partition_files batches moco shape splitting whole laws"
LEARNING = "fsmkd moco_sfl fl_moco contrastive byte_saving ressfl"

# Modules, and the tests that are meant to catch what is wrong in them.
GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "methods": (
        tuple(f"algorithms/{name}.py" for name in METHODS.split()),
        (
            *(*REFERENCES, "tests/algorithms/test_methods.py", "tests/algorithms/test_mhmd.py"),
            *(f"tests/contract/test_contract.py::test_bytes_equal_the_closed_form[plain-{name}]" for name in BYTES),
            *(f"tests/contract/test_contract.py::test_resume_is_bitwise[average-{name}]" for name in BYTES),
            "tests/runtime/test_schedule.py::test_a_client_that_drops_out_leaves_no_trace",
            *(f"tests/algorithms/test_fsmkd.py::{name}" for name in ("test_when_an_arrow_crosses", ONE_GRAPH)),
        ),
    ),
    "distillation": (
        tuple(f"algorithms/{name}.py" for name in LEARNING.split()),
        (
            *("tests/algorithms/test_fsmkd.py", "tests/algorithms/test_moco.py", "tests/attacks/test_ressfl.py"),
            *("tests/algorithms/test_moco_clients.py", "tests/algorithms/test_fl_moco.py"),
            "tests/algorithms/test_learning_limits.py",
        ),
    ),
    "averages": (("runtime/parties/aggregate.py",), ("tests/runtime/test_aggregate.py",)),
    "rounds": (
        ("runtime/rounds/schedule.py",),
        (
            *("tests/runtime/test_schedule_order.py", "tests/runtime/test_schedule.py"),
            "tests/algorithms/test_moco.py::test_a_cohort_computed_as_one_is_its_clients",
        ),
    ),
    "evaluation": (
        ("runtime/scoring/scores.py", "runtime/rounds/evaluator.py"),
        (
            *("tests/runtime/test_evaluation.py", "tests/runtime/test_evaluator.py", "tests/runtime/test_cohorts.py"),
            *("tests/contract/test_reported.py", "tests/algorithms/test_fsmkd.py::test_both_paths_are_tested"),
        ),
    ),
    "data": (
        (
            *(f"datasets/{name}.py" for name in DATA.split()),
            *(path.relative_to(ROOT).as_posix() for path in (ROOT / "distributions").glob("[!_]*.py")),
        ),
        tuple(f"tests/datasets/test_datasets_{name}.py" for name in TRIED.split()),
    ),
}
# Left out: they take longer than all others together.
SLOW = (
    *("hundred_thousand", "classes_go_in_blocks", "distributed_as_torchvision", "drawn_as_torchvision"),
    *(
        "survive_an_interruption",
        "too_little_data",
        "order_of_the_test_set",
        "cannot_be_normalised",
        "finite_differences",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--sample", type=int, default=40, help="mutants of each module (40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="only what survived the last time")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "cutlayer-mutants")
    asked = parser.parse_args()
    work = asked.folder.resolve() / asked.group / "checkout"
    copied(work, asked.group)
    os.chdir(work)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    # What is imported from now on is the copy's, the tests too.
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    chosen = sampled(asked.sample, asked.seed, again=asked.again)
    quick_tests_first()
    from mutmut.__main__ import _run  # no other way in takes names and leaves results

    if chosen:
        _run(chosen, max_children=1)
    report()


def copied(work: Path, group: str) -> None:
    """Bring the copy up to date: tracked and new files, and mutmut's settings."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    modules, tests = GROUPS[group]
    settings = {
        "source_paths": ["cutlayer"],
        "only_mutate": [f"cutlayer/{name}" for name in modules],
        "also_copy": ["hydra_plugins"],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-p", "no:xdist"],
        "pytest_add_cli_args_test_selection": [*tests, "-k", " and ".join(f"not {name}" for name in SLOW)],
        "timeout_multiplier": 5.0,
        "timeout_constant": 5.0,
        "use_git_change_detection": False,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.split("\n")):
        content, target = (ROOT / name).read_bytes(), work / placed(name)
        if name == "pyproject.toml":
            content += "\n".join(["\n[tool.mutmut]", *lines, ""]).encode()
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    for beside in (work.parent, work):  # mutmut runs the tests one folder further down
        if not (beside / "shared").exists() and (ROOT.parent / "shared").exists():
            (beside / "shared").symlink_to(ROOT.parent / "shared")


def placed(name: str) -> str:
    """Where a file of the checkout lies in the copy."""
    return f"cutlayer/{name}" if name.split("/")[0] in INSIDE else name


def sampled(count: int, seed: int, *, again: bool) -> list[str]:
    """The names of the mutants to try: as many of each module, but for those that have been; or those that survived."""
    from mutmut.__main__ import copy_also_copy_files, copy_src_dir, create_mutants, setup_source_paths

    Path("mutants").mkdir(exist_ok=True)
    copy_src_dir()
    copy_also_copy_files()
    setup_source_paths()
    create_mutants(1)
    chosen: list[str] = []
    for module, found in results():
        names = sorted(found)
        drawn = random.Random(f"{seed}/{module}").sample(names, min(count, len(names)))
        chosen += [name for name in (names if again else drawn) if found[name] in ((0, 33) if again else (None,))]
    return chosen


def results() -> Iterator[tuple[str, dict[str, int | None]]]:
    """By module the exit status of the tests for each mutant: 0 where it survived, None where it was not tried."""
    for path in sorted(Path("mutants").rglob("*.py.meta")):
        found = json.loads(path.read_text())["exit_code_by_key"]
        if found:
            yield path.relative_to("mutants").as_posix().removesuffix(".meta"), found


def quick_tests_first() -> None:
    """Most mutants are caught by any test: an order by duration costs a fraction of mutmut's, which is none."""
    from mutmut.runners.harness import PytestRunner
    from mutmut.state import state

    arguments = PytestRunner._pytest_args_regular_run

    def sorted_arguments(self: PytestRunner, tests: Iterable[str]) -> list[str]:
        # Those of whole runs have fixtures whose time is in no test's.
        return arguments(self, sorted(tests, key=lambda name: ("contract" in name, state().duration_by_test[name])))

    PytestRunner._pytest_args_regular_run = sorted_arguments


def report() -> None:
    """A line for each module, and what survived."""
    every: list[int] = []
    survived: list[str] = []
    for module, found in results():
        tried = {name: status for name, status in found.items() if status is not None}
        caught = [int(status not in (0, 33)) for status in tried.values()]  # 33: no test reaches it
        every += caught
        survived += [name for name, status in tried.items() if status in (0, 33)]
        if caught:
            print(f"{module:32} {len(found):5} mutants, {len(caught):4} tried, {sum(caught):4} caught")
    low, high = interval(sum(every), len(every))
    print(f"{sum(every)} of {len(every)} caught, {100 * sum(every) / len(every):.1f}% ({low:.1%} to {high:.1%})")
    for name in survived:
        print(subprocess.run([sys.executable, "-m", "mutmut", "show", name], capture_output=True, text=True).stdout)


def interval(caught: int, tried: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    share, weight = caught / tried, z * z / tried
    middle, half = share + weight / 2, z * math.sqrt(share * (1 - share) / tried + weight / 4 / tried)
    return (middle - half) / (1 + weight), min(1.0, (middle + half) / (1 + weight))


if __name__ == "__main__":
    main()
