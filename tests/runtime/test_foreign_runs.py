"""A run's folder is anyone's: what is in it is read as data, by every program, and runs nothing."""

import copy
import importlib
import json
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cutlayer import attack, generate, personalize, plot_results, probe, status
from cutlayer.runtime.after.saved import read_config, restore
from cutlayer.runtime.experiment import run
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.job import claim
from cutlayer.runtime.run_folder import RunFolder
from tests.audited import HOSTILE, MARK, watched

NETWORK = {"title": f"\x1b[2J{MARK}", "state": f"\x1b]0;{MARK}\x07", "clients": [{"state": "idle", "error": MARK}]}
PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "personalize": lambda said: personalize.main([*said, "personalize.part=full", "personalize.epochs=1"]),
    "probe": lambda said: probe.main([*said, "probe.train_samples=20", "probe.test_samples=20"]),
    "generate": lambda said: generate.main([*said, "generate.beams=1", "generate.prompts=1"]),
    "attack": lambda said: attack.main([*said, "attack.epochs=1", "attack.samples=10", "attack.width=4"]),
}
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
OWN_MODEL = f"""
from pathlib import Path
from torch import nn

Path("{MARK}.txt").touch()


def net(classes, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, classes))
"""


@pytest.fixture(scope="module")
def saved(configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    config = configure("algorithm=sl_single_server", "rounds=1", "progress=none", "threads=1", "logger=[csv]")
    with RunFolder.claim(tmp_path_factory.mktemp("saved") / "run", config.identity()) as folder:
        run(config, folder)
    return folder.path


@pytest.fixture
def foreign(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to put something into; the current folder is another one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def changed(values: dict[str, Any], key: str, value: object) -> bytes:
    """A configuration's file, with one key set."""
    made = copy.deepcopy(values)
    *above, last = key.split(".")
    section = made
    for name in above:
        section = section[name]
    section[last] = copy.deepcopy(value)
    return yaml.dump(made, Dumper=DUMPER, encoding="utf-8")


def change(folder: Path, key: str, value: object) -> None:
    """Set one key in a run's configuration."""
    values = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_bytes(changed(values, key, value))


def leaves(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield from leaves(value, f"{above}{key}.") if isinstance(value, dict) and value else [f"{above}{key}"]


def test_each_hostile_value_in_a_runs_configuration_is_refused_or_harmless(foreign: Path) -> None:
    """Every key meets a sixth of the hostile values, and every value a sixth of the keys."""
    original = yaml.safe_load((foreign / "config.yaml").read_text())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with watched(foreign, Path("data")):
        for at, key in enumerate(leaves(original)):
            for value in HOSTILE[at % 6 :: 6]:
                (foreign / "config.yaml").write_bytes(changed(original, key, value))
                try:
                    read_config(foreign, {})
                except ConfigError as error:
                    line = str(error)
                else:
                    continue
                assert line.isprintable(), key
                assert len(line) < 5000, key
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KB"


def test_all_text_in_a_runs_folder_is_hostile_at_once(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every program, with every text in the configuration and in the other files replaced."""

    def spoiled(value: object, with_: str) -> object:
        if isinstance(value, dict):
            return {key: spoiled(inner, with_) for key, inner in value.items()}
        if isinstance(value, list):
            return [spoiled(inner, with_) for inner in value]
        return with_ if isinstance(value, str) else value

    original = {name: (foreign / name).read_text() for name in ("config.yaml", "results.json", "status.json")}
    for hostile in [value for value in HOSTILE if isinstance(value, str)]:
        for name, text in original.items():
            made = spoiled(yaml.safe_load(text), hostile)
            (foreign / name).write_text(yaml.safe_dump(made) if name == "config.yaml" else json.dumps(made))
        (foreign / "network.json").write_text(json.dumps(spoiled(NETWORK, hostile)))
        (foreign / "personalized" / "x").mkdir(parents=True, exist_ok=True)
        (foreign / "personalized" / "x" / "summary.json").write_text(json.dumps({"finished": True, "part": hostile}))
        with watched(foreign.parent):
            for program in PROGRAMS.values():
                assert program([str(foreign)]) == 1
                assert len(capsys.readouterr().err.splitlines()) == 1
            status.main([str(foreign), "once=true"])
        said = capsys.readouterr()
        assert "\x1b" not in said.out + said.err
        assert "\x07" not in said.out + said.err


def test_nothing_hostile_is_drawn_or_run_when_runs_are_plotted(foreign: Path, tmp_path: Path, capsys) -> None:
    """Drawn are names that are text, whatever they say; nothing is done with them."""
    for needed in ("plotly.graph_objects", "jinja2"):  # of the page
        importlib.import_module(needed)
    change(foreign, "model.name", "import/subprocess.getoutput")
    change(foreign, "model.init", f"/{MARK}/secret")
    change(foreign, "save_dir", f"/{MARK}")
    with watched(Path(tempfile.gettempdir())):  # fonts are kept there
        plot_results.main(["--saves", str(tmp_path / "run"), "--out", str(tmp_path / "figures")])
    assert MARK not in capsys.readouterr().out


# ---------------------------------------------------------------------- what a command line may name


def test_a_model_by_import_path_is_run_only_if_the_command_line_names_it(foreign: Path, capsys, monkeypatch) -> None:
    """With each of its options, and as the run has it."""
    (Path("own_nets.py")).write_text(OWN_MODEL)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    change(foreign, "model.name", "import/own_nets.net")
    change(foreign, "model.options", {"width": 5})
    said = "model.name=import/own_nets.net: expected a model of this project, as only the run's folder says so; "
    for name, program in PROGRAMS.items():
        assert program([str(foreign)]) == 1, name
        line = capsys.readouterr().err
        assert line == f"{foreign}: {said}if you trust it, add: model=import/own_nets.net model.options.width=5\n"
        assert program([str(foreign), "model=import/other.net", "model.options.width=5"]) == 1, name
        assert "model=import/other.net: expected import/own_nets.net, as in the run" in capsys.readouterr().err
        assert program([str(foreign), "model=import/own_nets.net"]) == 1, name
        assert "model.options.width=5: expected no option of import/own_nets.net" in capsys.readouterr().err
        assert program([str(foreign), "model=import/own_nets.net", "model.options.width=4"]) == 1, name
        assert "model.options.width=4: expected 5, as in the run" in capsys.readouterr().err
        assert not Path(f"{MARK}.txt").exists(), name
    # Named in full it is run, and then found not to be what this checkpoint is of.
    assert probe.main([str(foreign), "model=import/own_nets.net", "model.options.width=5"]) == 1
    assert Path(f"{MARK}.txt").exists()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_of_several_runs_each_may_have_a_model_that_is_named(foreign: Path, tmp_path: Path, capsys) -> None:
    assert PROGRAMS["probe"]([str(foreign), "model=[import/my.Net,mlp]"]) == 0
    assert PROGRAMS["probe"]([str(foreign), "model=[import/my.Net,cnn2]"]) == 1
    assert "model=[import/my.Net,cnn2]: expected mlp, as in the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("model.init", "/h0stile/model.safetensors", "null"),
        ("num_clients", 10**9, "a number up to 100,000"),
        ("model.options.hidden", [10**6], "a number up to 4,096"),
        ("threads", 10**6, "a number up to 1,024"),
        ("dataset.root", "/dev/zero", "a folder"),
    ],
)
def test_a_line_says_what_to_add(foreign: Path, key: str, value: object, wanted: str) -> None:
    change(foreign, key, value)
    shown = f"[{value[0]}]" if isinstance(value, list) else value
    with watched(foreign), pytest.raises(ConfigError) as caught:
        read_config(foreign, {})
    line = f"{key}={shown}: expected {wanted}, as only the run's folder says so; if you trust it, add: "
    assert str(caught.value).startswith(line)
    assert f"{key}={shown}" in str(caught.value).partition("add: ")[2]
    assert read_config(foreign, {key: value}).config is not None


def test_data_are_read_from_the_folder_that_a_run_names_and_never_downloaded_there(
    foreign: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    change(foreign, "dataset.root", str(root))
    change(foreign, "dataset.name", "mnist")
    before = sorted(tmp_path.rglob("*"))
    with (
        watched(tmp_path),
        pytest.raises(ConfigError, match=r"the files of mnist in .*; to download them there, add: d"),
    ):
        restore(foreign, read_config(foreign, {}))
    assert sorted(tmp_path.rglob("*")) == before
    assert read_config(foreign, {"dataset.root": str(root)}).download
    (tmp_path / "link").symlink_to("/dev")
    change(foreign, "dataset.root", str(tmp_path / "link" / "zero"))
    with pytest.raises(ConfigError, match=r"expected a folder, as only the run's folder says so"):
        read_config(foreign, {})


# ---------------------------------------------------------------------- what lies in the folder


@pytest.mark.parametrize(
    "name", [".lock", "identity", "probed", "personalized", "run.log", ".status.json.new", "deep/x"]
)
def test_a_link_out_of_a_runs_folder_is_refused_before_anything_is_written(
    configure, foreign: Path, tmp_path: Path, capsys, name: str
) -> None:
    """By the programs that measure runs and by what goes on with one."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("as it was")
    link = foreign / name
    shutil.rmtree(link, ignore_errors=True)
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(secret if "ed" in name else secret / "file")
    (foreign / "status.json").write_text('{"state": "running", "error": null}')
    for program in PROGRAMS.values():
        assert program([str(foreign)]) == 1
        assert f"readable {name} (it leads out of the folder)" in capsys.readouterr().err
    config = configure("algorithm=sl_single_server", "rounds=1", f"resume={foreign}", f"save_dir={tmp_path}")
    with pytest.raises(ConfigError, match="it leads out of the folder"), claim(config, []):
        pass
    assert (secret / "file").read_text() == "as it was"
    assert sorted(secret.iterdir()) == [secret / "file"]


@pytest.mark.parametrize("text", ["{}", '{"round": 1}', "[", '{"identity": [[[]]]}', '{"rows": null, "x": 1}'])
def test_a_damaged_checkpoint_is_one_line(foreign: Path, capsys, text: str) -> None:
    (foreign / "checkpoint" / "manifest.json").write_text(text)
    assert PROGRAMS["probe"]([str(foreign)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
