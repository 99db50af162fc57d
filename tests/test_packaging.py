"""What holds the project's edges together: one list of dependencies, and files that are right on every machine."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.peers.places import PEERS
from cutlayer.runtime.launching.model_names import SOURCES
from cutlayer.runtime.records.loggers import LOGGERS
from tests.mutants import GROUPS
from tests.places import checkout

ROOT = checkout()
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PACKAGES = (
    *("algorithms", "attacks", "benchmarks", "datasets", "distributions", "evaluations", "hydra_plugins", "models"),
    *("plotting", "runtime", "tasks", "text_metrics", "cutlayer"),
)
PROGRAMS = (
    *("attack.py", "certificates.py", "generate.py", "main.py", "personalize.py", "plot_results.py", "probe.py"),
    *("status.py", "train_tokenizer.py"),
)
# Import names that are not the distribution's own.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "grpc": "grpcio",
    "hydra": "hydra-core",
    "mlflow": "mlflow-skinny",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# Imported by others for what hydra_config/ names: Hydra's launcher, torchvision's reader.
BY_NAME = {"hydra-joblib-launcher": "joblib", "scipy": "svhn"}


def names(requirements: list[str]) -> set[str]:
    """The names of requirements, such as torch of torch>=2.11."""
    return {re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


REQUIRED = names(PROJECT["dependencies"])
EXTRAS = {extra: names(requirements) for extra, requirements in PROJECT["optional-dependencies"].items()}


def third_party(path: Path) -> set[str]:
    """The distributions that a file imports, at its top or inside functions."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.add(node.module.partition(".")[0])
    foreign = modules - sys.stdlib_module_names - set(PACKAGES) - {Path(name).stem for name in PROGRAMS}
    return {DISTRIBUTIONS.get(module, module).lower().replace("_", "-") for module in foreign}


def sources() -> list[Path]:
    return [ROOT / name for name in PROGRAMS] + [
        path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))
    ]


# ---------------------------------------------------------------------- dependencies


def test_conda_takes_its_packages_from_the_project() -> None:
    content = yaml.safe_load((ROOT / "conda_env.yaml").read_text(encoding="utf-8"))
    assert content["name"] == PROJECT["name"]
    python, *others = content["dependencies"]
    assert others == ["pip", {"pip": ["-e ."]}], "packages are listed in pyproject.toml only"
    version = re.fullmatch(r"python=(\d+)\.(\d+)", python)
    assert version
    least = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert least
    assert (int(version[1]), int(version[2])) == (3, 12)
    assert (int(version[1]), int(version[2])) >= (int(least[1]), int(least[2]))


def test_make_takes_its_packages_from_the_project() -> None:
    installs = re.findall(r"pip install (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert sorted(installs) == ['--editable ".[dev]"', "--editable ."]


def test_torch_and_torchvision_are_left_to_match_each_other() -> None:
    for requirement in PROJECT["dependencies"]:
        assert re.fullmatch(r"[\w.-]+>=[\d.]+", requirement), f"{requirement}: a lower bound, and nothing else"
    assert {"torch", "torchvision"} <= REQUIRED


def test_every_import_is_declared_and_every_declaration_is_imported() -> None:
    trackers, network = set().union(*EXTRAS.values()), EXTRAS["grpc"]
    imported: set[str] = set()
    for path in sources():
        found = third_party(path)
        on_network = ROOT / "runtime" / "network" in path.parents or path == ROOT / "benchmarks" / "echo.py"
        optional = network if on_network else trackers if path.parent.name == "loggers" else set[str]()
        if (peer := path.stem.removeprefix("by_")) in PEERS:  # it runs where its peer is installed
            optional = {PEERS[peer].partition("[")[0]}
        undeclared = found - REQUIRED - optional
        assert not undeclared, f"{path.relative_to(ROOT)} imports {undeclared}"
        imported |= found
    assert REQUIRED - imported == set(BY_NAME)
    composed = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "hydra_config").rglob("*.yaml"))
    for distribution, used in BY_NAME.items():
        assert re.search(rf"\b{used}\b", composed), distribution


def test_the_tests_import_what_the_dev_extra_brings() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        found = third_party(path) - {"tests", "model-cases", "conftest"}
        if path.name == "mutants.py":  # no test: run by hand, with what docs/testing.md says to install
            found -= {"mutmut"}
        assert found <= REQUIRED | EXTRAS["dev"], f"{path.relative_to(ROOT)} imports {found - REQUIRED - EXTRAS['dev']}"


def test_every_logger_has_an_extra_that_brings_its_packages() -> None:
    for name, logger in LOGGERS.items():
        needed = {DISTRIBUTIONS.get(package, package) for package in logger.packages}
        assert needed <= EXTRAS.get(name, set()), f"{name} needs {needed}"


def test_every_library_of_models_has_an_extra_of_its_sources_name() -> None:
    assert (EXTRAS["timm"], EXTRAS["huggingface"]) == ({"timm"}, {"peft", "transformers"})
    assert {"timm", "huggingface"} <= set(SOURCES)


def test_every_dependency_has_its_reason() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    for name in REQUIRED.union(*EXTRAS.values(), EXTRAS):
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), name


# ---------------------------------------------------------------------- files


def shipped() -> list[Path]:
    """The files of the project that hold text: those that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


def private_places() -> set[str]:
    """Folders whose name in a file would be right on this machine only."""
    shared = {Path("/"), Path("/home"), Path("/opt"), Path("/usr"), Path("/tmp"), Path(tempfile.gettempdir())}
    return {f"{folder}/" for folder in (ROOT, ROOT.parent) if folder not in shared}


def test_no_file_names_a_package_registry_or_a_place_of_this_machine() -> None:
    # In pieces, so that this file does not name them.
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("python" + "hosted", "org"), ("registry", "npmjs"))]
    hosts += [".".join(parts) for parts in (("conda", "anaconda", "org"), ("deb", "debian", "org"))]
    found = []
    for path in shipped():
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {each}" for each in (*hosts, *private_places()) if each in text]
    assert found == []


def test_no_tracked_file_is_large() -> None:
    assert [path for path in shipped() if path.stat().st_size > 300_000] == []
    assert [path for path in (ROOT / "docs" / "images").iterdir() if path.stat().st_size > 200_000] == []


def test_the_files_beside_the_sources_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert "\n## Unreleased\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_pre_commit_downloads_nothing() -> None:
    content = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in content["repos"]] == ["local"]
    hooks = content["repos"][0]["hooks"]
    assert {"ruff-check", "ruff-format", "pyright"} <= {hook["id"] for hook in hooks}
    assert {hook["language"] for hook in hooks} == {"system"}


# ---------------------------------------------------------------------- make and continuous integration


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # Of a test that make itself started, the flags for its own children are not ours.
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    command = ["make", "-n", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_continuous_integration_runs_the_readmes_test_command_and_ends_with_pytest() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"
    assert "```sh\nmake run\nmake test\n```" in (ROOT / "README.md").read_text(encoding="utf-8")
    planned = dry_run("test").stdout.splitlines()
    assert "-m pytest" in planned[-1], "pytest's summary has to come last"
    for tool in ("ruff check", "ruff format --check", "pyright"):
        assert any(f"-m {tool}" in line for line in planned), tool


def test_make_sets_up_once(tmp_path: Path) -> None:
    first = dry_run("run", f"VENV={tmp_path}/venv").stdout
    assert "-m venv" in first
    assert "pip install" in first
    (tmp_path / "venv").mkdir()
    for stamp in (".installed", ".installed-dev"):
        (tmp_path / "venv" / stamp).touch()
    for target in ("run", "test"):
        again = dry_run(target, f"VENV={tmp_path}/venv")
        assert again.returncode == 0
        assert "pip install" not in again.stdout
    os.utime(tmp_path / "venv" / ".installed", (0, 0))
    assert "pip install" in dry_run("run", f"VENV={tmp_path}/venv").stdout, "pyproject.toml is newer"


def test_make_lists_its_targets() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    text = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    for target in phony[1].split():
        assert f"make {target} " in text, target


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho False\n", encoding="utf-8")
    old.chmod(0o755)
    done = dry_run("run", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert "Python 3.11 or newer is needed" in line


def test_mutants_are_made_of_modules_that_there_are_and_tried_by_tests_that_there_are() -> None:
    for modules, tests in GROUPS.values():
        for name in (*modules, *tests):
            path, *inside = name.split("::")
            assert (ROOT / path).is_file(), name
            assert not inside or inside[0].partition("[")[0] in (ROOT / path).read_text(encoding="utf-8"), name
