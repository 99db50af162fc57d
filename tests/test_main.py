"""The program itself, as a user runs it: what a mistake prints, what is left of it, who gets which folder."""

import copy
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutlayer import HOME
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.job import choose_folder
from cutlayer.runtime.launching.hydra_errors import check_flags, explain
from cutlayer.runtime.launching.hydra_support import load_config, preprocess
from cutlayer.runtime.run_folder import RunFolder, is_owned, read_status
from cutlayer.runtime.trust import to_take
from tests.forked import Forks
from tests.places import ROOT, program

SMALL = ["dataset=digits", "model=mlp", "progress=none"]
ALONE = "hydra.launcher.n_jobs=1"
QUICK = ["algorithm=fed_avg", "num_clients=3", "rounds=1", "device=cpu"]


def command(save_dir: Path, *arguments: str) -> list[str]:
    """The command line; a setting of QUICK is left out where `arguments` has its own."""
    given = {argument.partition("=")[0] for argument in arguments}
    quick = [setting for setting in QUICK if setting.partition("=")[0] not in given]
    return [*program("main"), *SMALL, *quick, f"save_dir={save_dir}", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0", **more}


def call(save_dir: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(save_dir, *arguments), cwd=ROOT, env=environment(**more), capture_output=True, text=True, check=False
    )


Forked = Callable[..., subprocess.CompletedProcess[str]]


def given(save_dir: Path, *arguments: str) -> list[str]:
    """What `command` gives to `main.py`."""
    return command(save_dir, *arguments)[len(program("main")) :]


@pytest.fixture
def forked(forks: Forks) -> Forked:
    """What `call` does."""
    return lambda save_dir, *arguments, **more: forks(given(save_dir, *arguments), **more)


def left_in(save_dir: Path) -> list[Path]:
    return list(save_dir.rglob("*"))


def run_folders(save_dir: Path) -> list[Path]:
    return sorted(mark.parent for mark in save_dir.rglob("identity"))


# ---------------------------------------------------------------------- mistakes, in processes


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["dataset.alpa=0.1"], "dataset.alpa: no such key; did you mean dataset.alpha? (choices: "),
        (["model=resnt18"], "model=resnt18: expected one of the choices; did you mean resnet18? (choices: "),
        (["model=torchvision/resnt18"], "model.name=torchvision/resnt18: expected one of the "),
        (["model=torchvision/alexnet"], "dataset.resize: torchvision/alexnet takes images of 64x64 and not of 8x8"),
        (["model=import/nobody.Net"], "model.name=import/nobody.Net: expected a module that can be imported"),
        (["rounds=ten"], "rounds=ten: expected an integer"),
        (["num_clients=100000"], "num_clients=100000: "),
        (["algorithm=sl_single_server", "model.cut=nowhere"], "model.cut=nowhere: "),
        (["device=cuda:99"], "device=cuda:99: expected a device of this machine"),
        (["workers=9"], "workers=9: expected at most 3, the clients of a round"),
        (["model.init=nowhere"], "model.init=nowhere: "),
        (["dataset=image_folder", "dataset.root=nowhere"], "dataset.root=nowhere: "),
        (["algorithm=moco_sfl", "personalize.part=head"], "personalize.part=head: expected null after a method that "),
        (["algorithm=local_only", "probe.after=true"], "algorithm.name=local_only: expected a method with "),
        (["--rounds=3"], "--rounds: no such option; did you mean rounds=3?"),
    ],
)
def test_a_mistake_gives_one_line_and_leaves_nothing(
    forked: Forked, tmp_path: Path, arguments: list[str], line: str
) -> None:
    result = forked(tmp_path / "saves", *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith(line), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stdout
    assert left_in(tmp_path) == []


def test_tracebacks_are_there_for_who_asks(forked: Forked, tmp_path: Path) -> None:
    result = forked(tmp_path / "saves", "rounds=ten", HYDRA_FULL_ERROR="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "rounds=ten: expected an integer" in result.stderr


def test_a_failing_job_does_not_stop_the_others_of_a_sweep(tmp_path: Path) -> None:
    saves = tmp_path / "saves"
    result = call(saves, "-m", ALONE, "optimizer=sgd", "num_clients=2,100000", "optimizer.momentum=0,0.9")
    assert result.returncode == 1
    assert result.stderr == "2 of 4 jobs failed; the same command tries them again\n"
    assert result.stdout.count("num_clients=100000: expected at most ") == 2
    assert "Traceback" not in result.stdout
    folders = run_folders(saves)
    assert [read_status(folder)["state"] for folder in folders] == ["finished", "finished"]
    assert {folder.parent.name.split("optimizer.momentum=")[1].split(",")[0] for folder in folders} == {"0", "0.9"}
    (jobs,) = saves.glob("multirun/*/jobs.csv")
    lines = [line.split(",") for line in jobs.read_text().splitlines()[1:]]
    assert sorted(line[1] for line in lines) == ["failed"] * 2 + ["finished"] * 2


def test_a_sweep_in_which_every_job_is_a_mistake_leaves_nothing(tmp_path: Path) -> None:
    result = call(tmp_path / "saves", "-m", ALONE, "num_clients=100000,200000")
    assert result.returncode == 1
    assert result.stderr == "2 of 2 jobs failed; the same command tries them again\n"
    assert left_in(tmp_path) == []


def test_a_mistake_in_a_sweep_that_cannot_start_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    result = call(tmp_path / "saves", "-m", "dataset.alpa=0.1,1")
    assert result.returncode == 1
    assert result.stderr.startswith("dataset.alpa: no such key; did you mean dataset.alpha?")
    assert (result.stderr.count("\n"), result.stdout) == (1, "")
    assert left_in(tmp_path) == []


# ---------------------------------------------------------------------- folders, in real processes


def test_two_processes_of_the_same_instant_get_folders_of_their_own_and_finish(forks: Forks, tmp_path: Path) -> None:
    runs = [forks.start(given(tmp_path)) for _ in range(2)]
    assert [run.wait().returncode for run in runs] == [0, 0]
    folders = run_folders(tmp_path)
    assert len(folders) == 2
    assert [read_status(folder)["state"] for folder in folders] == ["finished"] * 2


def wait_for(found: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_a_killed_run_is_continued_and_an_interrupted_one_says_so(forks: Forks, tmp_path: Path) -> None:
    endless = given(tmp_path, "rounds=100000", "eval_interval=1000", "checkpoint_interval=1")
    first = forks.start(endless)
    try:
        wait_for(lambda: any(tmp_path.rglob("checkpoint/manifest.json")))
    finally:
        first.send(signal.SIGKILL)
    assert first.wait().returncode == -signal.SIGKILL
    (folder,) = run_folders(tmp_path)
    assert read_status(folder)["state"] == "running"
    second = forks.start(endless)
    try:
        wait_for(lambda: "resumed after round" in (folder / "run.log").read_text())
        assert is_owned(folder)
        second.send(signal.SIGINT)
        wait_for(lambda: second.err.read_text(), 60)
        wait_for(lambda: not is_owned(folder), 60)
    except BaseException:
        second.send(signal.SIGKILL)
        raise
    finally:
        ended = second.wait()
    assert ended.returncode == 130
    assert ended.stderr.startswith("interrupted; the same command resumes from the last checkpoint")
    assert ended.stderr.count("\n") == 1
    assert run_folders(tmp_path) == [folder]
    assert read_status(folder)["state"] == "running"


# ---------------------------------------------------------------------- the same without a process


def folder_of(*overrides: str) -> Path:
    """The folder that `python main.py algorithm=fed_avg <overrides>` would claim."""
    overrides = ("algorithm=fed_avg", *overrides)
    return choose_folder(load_config(overrides), overrides)


def test_the_run_folder_says_what_runs(tmp_path: Path) -> None:
    overrides = ["model=simple_conv", "dataset=mnist", "dataset.distribution=shards", "rounds=5", "lr=0.1", "seed=3"]
    folder = folder_of(f"save_dir={tmp_path}", *overrides, "optimizer.weight_decay=0.5")
    assert folder.parent == (
        tmp_path / "fed_avg" / "simple_conv" / "mnist-shards" / "lr=0.1,seed=3,optimizer.weight_decay=0.5,rounds=5"
    )
    assert left_in(tmp_path) == []


def test_a_run_in_progress_is_left_alone_and_a_dead_one_is_continued(tmp_path: Path) -> None:
    path = folder_of(f"save_dir={tmp_path}")
    claimed = RunFolder.claim(path, load_config(["algorithm=fed_avg"]).identity())
    assert folder_of(f"save_dir={tmp_path}").parent == path.parent
    assert folder_of(f"save_dir={tmp_path}") != path
    claimed.release()
    assert folder_of(f"save_dir={tmp_path}") == path


def test_an_unfinished_run_is_found_under_another_spelling_and_left_alone_on_request(tmp_path: Path) -> None:
    path = folder_of(f"save_dir={tmp_path}")
    RunFolder.claim(path, load_config(["algorithm=fed_avg"]).identity()).release()
    assert folder_of(f"save_dir={tmp_path}", "num_clients=10") == path
    assert folder_of(f"save_dir={tmp_path}", "checkpoint_interval=3", "logger=tensorboard", "jobs_per_gpu=2") == path
    assert folder_of(f"save_dir={tmp_path}", "num_clients=11") != path
    assert folder_of(f"save_dir={tmp_path}", "resume=never") != path


def test_names_from_the_configuration_cannot_leave_save_dir(tmp_path: Path) -> None:
    hostile = copy.copy(load_config(["algorithm=fed_avg", f"save_dir={tmp_path}"]))
    object.__setattr__(hostile, "algorithm_name", "../..")  # where it is made, the name is looked up
    assert tmp_path in choose_folder(hostile, ["rounds=../../../../y"]).parents


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("optimizer.momentum=0,0.9", "++optimizer.momentum=0,0.9"),
        ("scheduler.T_max=5", "++scheduler.T_max=5"),
        ("model.client.optimizer.lr=0.1", "++model.client.optimizer.lr=0.1"),
        ("model.server.scheduler.gamma=0.1", "++model.server.scheduler.gamma=0.1"),
        ("model.options.width=2", "++model.options.width=2"),
        ("model.options={width:2}", "++model.options={width:2}"),
        ("dataset.options.n_train=5", "++dataset.options.n_train=5"),
        ("model.auxiliary=linear,half", "model.auxiliary.size=linear,half"),
        ("model.client.optimizer=sgd", "++model.client.optimizer.name=sgd"),
        ("model.client.optimizer={lr:0.1}", "++model.client.optimizer={lr:0.1}"),
        ("model.auxiliary.optimizer.lr=1", "++model.auxiliary.optimizer.lr=1"),
        ("+optimizer.momentum=0.9", "+optimizer.momentum=0.9"),
        ("optimizer=sgd", "optimizer=sgd"),
        ("dataset.alpha=0.1", "dataset.alpha=0.1"),
        ("server=[fd00::1]:50505", "server='[fd00::1]:50505'"),
        ("server=10.0.0.1:50505", "server=10.0.0.1:50505"),
        ("--multirun", "--multirun"),
    ],
)
def test_keys_below_open_mappings_need_no_plus(given: str, wanted: str) -> None:
    assert preprocess([given]) == [wanted]


def test_a_server_may_be_named_by_an_address_of_ipv6() -> None:
    composed = load_config(["transport=grpc", "role=client", "client_id=0", "server=[fd00::1]:50505"])
    assert composed.server == "[fd00::1]:50505"


def test_the_folder_of_a_run_may_be_pasted_as_it_is(tmp_path: Path) -> None:
    """Its name has = and , in it, which are signs of Hydra's own."""
    folder = tmp_path / "lr=0.001,seed=0"
    folder.mkdir()
    composed = load_config(["algorithm=fed_avg", f"save_dir={folder}"])
    assert composed.save_dir == folder
    assert preprocess([f"model.init={folder}-absent"]) == [f"model.init={folder}-absent"]


def test_the_multirun_flag_may_stand_between_settings() -> None:
    assert preprocess(["lr=1,2", "-m", "seed=1"]) == ["-m", "lr=1,2", "seed=1"]


def test_only_unknown_options_are_refused() -> None:
    check_flags(["--cfg", "job", "-m", "--multi", "lr=--x"], ["--cfg", "--multirun"])
    with pytest.raises(ConfigError, match=r"^--seed: no such option"):
        check_flags(["--seed", "3"], ["--cfg"])


def test_what_is_no_mistake_in_the_configuration_is_not_explained_away() -> None:
    assert explain(RuntimeError("a bug")) is None
    assert explain(ValueError("a bug")) is None
    assert explain(FileNotFoundError(2, "No such file", "a bug")) is None


def test_a_save_dir_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        (tmp_path / "file" / "run").mkdir(parents=True)
    assert explain(caught.value) == f"{tmp_path / 'file' / 'run'}: cannot be written: Not a directory"


def test_the_folder_to_resume_is_never_removed(forked: Forked, tmp_path: Path) -> None:
    """It is the user's own, empty or not."""
    (tmp_path / "mine").mkdir()
    result = forked(tmp_path / "saves", f"resume={tmp_path / 'mine'}")
    assert result.returncode == 1
    assert result.stderr.startswith(f"resume={tmp_path / 'mine'}: expected auto, never or the folder")
    assert result.stderr.count("\n") == 1
    assert left_in(tmp_path) == [tmp_path / "mine"]


def test_main_is_short() -> None:
    assert len((HOME / "main.py").read_text().splitlines()) < 60


def test_status_of_a_failed_run_names_the_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder.claim(tmp_path / "run"):
        raise ZeroDivisionError("by zero")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["error"] == "ZeroDivisionError: by zero"


def test_an_experiment_may_ask_for_a_key() -> None:
    """What it cannot know, as the folder of weights: not left out without a word, which would be fresh ones."""
    with pytest.raises(ConfigError) as caught:
        load_config(["experiment=lm/e2e_small"])
    assert str(caught.value) == "model.base=null: expected the folder of a run of lm/e2e_base"
    assert load_config(["experiment=lm/e2e_small", "model.base=somewhere"]).model.base == Path("somewhere")
    cut = load_config(["experiment=lm/e2e_small", "model.base=somewhere", "algorithm=sl_u_shape"]).model.cut
    assert cut == ("transformer.h.0", "transformer.h.2")


@pytest.mark.parametrize("entries", [1, 9, 60])
def test_what_a_command_is_told_to_add_is_the_whole_value(entries: int) -> None:
    value = [f"name {number}" for number in range(entries)]
    told = shlex.split(to_take([("dataset.options.restaurants", value)]).partition("add: ")[2])
    assert load_config(["dataset=e2e", *told]).dataset.options["restaurants"] == value
