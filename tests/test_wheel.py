"""What `pip install .` brings works outside of any checkout, and so do the tests that need none."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cutlayer.runtime.network.agreement import version
from tests.places import checkout

ROOT = checkout()
if importlib.util.find_spec("hatchling") is None:
    pytest.skip("hatchling is not installed (make env)", allow_module_level=True)
OURS = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests"}
SETTING = ("dataset=digits", "algorithm=fed_avg", "num_clients=2", "rounds=1", "device=cpu", "progress=none")
# Tests of each package, of what starts processes, and of files that come with the package: about 20 s.
QUICK = (
    *("tests/runtime/test_aggregate.py", "tests/runtime/test_codec.py", "tests/runtime/test_forking.py"),
    *("tests/plotting/test_style.py", "tests/models/test_model_init.py", "tests/datasets/test_datasets_apportion.py"),
    *("tests/attacks/test_decoder.py", "tests/network/test_agreement.py", "tests/test_security.py"),
    "tests/test_main.py::test_main_is_short",
)
NET = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
"""


class Environment:
    """A Python with the libraries of this one, but nothing of the checkout, and a folder to work in.

    The folder is a git repository of somebody's own, whose commit is not ours.
    """

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        (self.site,) = (folder / "venv").glob("lib/python*/site-packages")
        libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.site / "libraries.pth").write_text("\n".join(libraries))  # whose own .pth files are not read this way
        self.python = folder / "venv" / "bin" / "python"
        self.work = folder / "work"
        self.work.mkdir()
        (folder / "theirs").touch()
        for words in ("init -q", "add theirs", "-c user.name=a -c user.email=a commit -qm a"):
            subprocess.run(["git", *words.split()], cwd=folder, check=True)

    def run(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments in the folder; fails where it ends with another status."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HYDRA", "COVERAGE"))}
        environment = {**kept, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [str(self.python), *arguments]
        done = subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done


def build(kind: str, folder: Path, source: Path = ROOT) -> Path:
    """What the build backend makes of the checkout: "wheel", "editable" or "sdist"."""
    code = f"import hatchling.build; print(hatchling.build.build_{kind}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("installed"))
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-compile", "-q")
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", made.site, wheel], check=True)
    return made


def content(path: Path) -> dict[str, bytes]:
    """The files of a wheel, without what describes it."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def sources() -> Iterator[Path]:
    """The files that a wheel has to have."""
    for name in (*OURS, "hydra_config", "hydra_plugins"):
        yield from (path for path in (ROOT / name).rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    yield from (path for path in ROOT.glob("*.py") if path.name != "hatch_build.py")
    yield ROOT / "exp_configs.yaml"


def test_a_wheel_has_every_file_once_and_nothing_but_the_package_at_its_top(wheel: Path) -> None:
    beside = ("cutlayer", "hydra_plugins")
    wanted = {}
    for path in sources():
        name = path.relative_to(ROOT)
        wanted[(name if name.parts[0] in beside else "cutlayer" / name).as_posix()] = path.read_bytes()
    assert content(wheel) == wanted
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_a_source_distribution_makes_the_same_wheel_and_holds_the_tests(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(tmp_path)
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    names = {path.name for path in unpacked.iterdir()}
    assert {"tests", "docs", "benchmarks", "LICENSE", "Makefile", "hatch_build.py"} <= names
    assert not names & {"typings", ".venv", ".git"}  # a link to the checkout itself, and what is nobody else's
    assert content(build("wheel", tmp_path, unpacked)) == content(wheel)


def test_an_editable_install_is_the_path_of_the_checkout(tmp_path: Path) -> None:
    made = Environment(tmp_path)
    files = content(build("editable", tmp_path))
    assert files == {"_cutlayer.pth": str(ROOT).encode()}
    (made.site / "_cutlayer.pth").write_bytes(files["_cutlayer.pth"])
    code = "import cutlayer, hydra_plugins.cutlayer_launchers; print(cutlayer.HOME, cutlayer.IN_CHECKOUT)"
    assert made.run("-c", code).stdout == f"{ROOT} True\n"
    assert "algorithm:" in made.run("-m", "cutlayer.main", "--cfg", "job").stdout


def test_server_and_client_agree_from_a_checkout_and_from_a_wheel(installed: Environment) -> None:
    code = "from cutlayer.runtime.network.agreement import version; print(version())"
    assert installed.run("-c", code).stdout.strip() == version()


def test_a_run_a_sweep_a_figure_and_a_measurement(installed: Environment) -> None:
    installed.run("-m", "cutlayer.main", *SETTING)
    (installed.work / "my_package").mkdir()
    (installed.work / "my_package" / "net.py").write_text(NET)
    own = (
        "model=import/my_package.net.Net",
        "lr=0.1,0.01",
        "hydra.launcher.n_jobs=1",
    )  # found in the folder it is run in
    installed.run("-m", "cutlayer.main", "-m", *SETTING, *own)
    runs = sorted(mark.parent for mark in (installed.work / "saves").rglob("identity"))
    assert [json.loads((run / "status.json").read_text())["state"] for run in runs] == ["finished"] * 3
    for run in runs:
        environment = json.loads((run / "env.json").read_text())
        assert environment["git"] == {"revision": None, "dirty": None}
        assert "-m cutlayer.main " in environment["command"]
    drawn = installed.run("-m", "cutlayer.plot_results").stdout
    assert list((installed.work / "figures").rglob("*.html")), drawn
    installed.run("-m", "cutlayer.personalize", str(runs[0]), "personalize.part=head", "personalize.epochs=1")
    assert list(runs[0].glob("personalized/*"))


def test_a_script_runs_has_the_model_and_sweeps(installed: Environment) -> None:
    setting = f"*{SETTING!r}, 'model=mlp', save_dir='by script'"
    lines = ["import cutlayer", f"result = cutlayer.run({setting})", "print(type(result.model()).__name__)"]
    lines.append(f"found = cutlayer.sweep('seed=0,1', 'hydra.launcher.n_jobs=1', {setting})")
    lines.append("print([each.folder == result.folder for each in found], len(cutlayer.runs('by script')))")
    assert installed.run("-c", "\n".join(lines)).stdout.splitlines() == ["Sequential", "[True, False] 2"]


def test_a_mistake_is_reported_without_a_checkout(installed: Environment) -> None:
    code = "from cutlayer.runtime.ground.extras import install; print(install('grpc'))"
    assert installed.run("-c", code).stdout == 'pip install "cutlayer[grpc]"\n'
    wrong = installed.run("-m", "cutlayer.main", "algorithm=fed_avgg", status=1).stderr
    assert (wrong.count("\n"), "did you mean fed_avg?" in wrong) == (1, True)


def test_ours_have_no_bare_names_there(installed: Environment) -> None:
    names = [path.stem for path in ROOT.glob("*.py")] + [*OURS - {"cutlayer"}]
    assert {"main", "status", "algorithms"} <= set(names)
    code = "import sys, cutlayer; from importlib.util import find_spec\n"
    code += "print(*(spec.origin for spec in map(find_spec, sys.argv[1:]) if spec), sep='\\n')"
    found = {Path(line) for line in installed.run("-c", code, *names).stdout.splitlines() if line not in ("", "None")}
    files = [*names, *(f"{name}.py" for name in names)]
    ours = {root / name for root in (ROOT, installed.site, installed.site / "cutlayer") for name in files}
    assert not ours & {place for each in found for place in (each, each.parent)}


def test_the_tests_run_there_but_for_those_that_need_a_checkout(installed: Environment) -> None:
    shutil.copytree(ROOT / "tests", installed.work / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", installed.work)
    asked = os.environ.get("WHEEL_TESTS", "").split() or QUICK
    done = installed.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *asked)
    print(done.stdout)
    assert re.search(r"\d{3,} passed", done.stdout), done.stdout
    assert "needs a checkout" in done.stdout
