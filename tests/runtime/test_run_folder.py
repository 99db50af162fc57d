"""Who owns a run folder, when it is continued, and what its name says."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.run_folder import (
    RunFolder,
    find_unfinished,
    is_owned,
    read_status,
    run_path,
    safe_component,
    unique_name,
    what_differs,
)
from tests.places import ROOT

# Claims a folder, says which, and holds it until told to end.
CLAIM = """
import sys; from pathlib import Path; from cutlayer.runtime.run_folder import RunFolder
sys.stdin.readline()
folder = RunFolder.claim(Path(sys.argv[1]), "abc")
print(folder.path, folder.resumed, flush=True)
sys.stdin.readline()
"""


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLAIM, str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def signal_end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> tuple[Path, bool]:
    assert process.stdout is not None
    path, _, resumed = process.stdout.readline().strip().rpartition(" ")
    return Path(path), resumed == "True"


def end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


def unfinished(path: Path, identity: str = "abc") -> Path:
    RunFolder.claim(path, identity).release()
    return path


def test_a_fresh_folder_is_taken_and_marked(tmp_path: Path) -> None:
    folder = RunFolder.claim(tmp_path / "a" / "run", "abc")
    assert folder.path == tmp_path / "a" / "run"
    assert not folder.resumed
    assert (folder.path / "identity").read_text() == "abc\n"
    assert json.loads((folder.path / "status.json").read_text()) == {"state": "running", "error": None}
    assert is_owned(folder.path)
    folder.release()
    assert not is_owned(folder.path)


@pytest.mark.parametrize("existing", ["empty", "unfinished"])
def test_processes_that_start_in_the_same_instant_never_share_a_folder(tmp_path: Path, existing: str) -> None:
    path = tmp_path / "run"
    if existing == "empty":
        path.mkdir()
    else:
        unfinished(path)
    processes = [start(path) for _ in range(3)]
    try:
        for process in processes:
            signal_end(process)
        answers = [answer(process) for process in processes]
    finally:
        end(processes)
    paths = [folder for folder, _ in answers]
    assert len(set(paths)) == 3
    assert path in paths
    assert {folder.parent for folder in paths} == {tmp_path}
    assert [resumed for folder, resumed in answers if folder == path] == [existing == "unfinished"]
    assert [resumed for folder, resumed in answers if folder != path] == [False, False]


def test_the_folder_of_a_killed_process_is_free_and_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "alg" / "set" / "run"
    process = start(path)
    signal_end(process)
    assert answer(process) == (path, False)
    assert find_unfinished(tmp_path / "alg", "abc") is None  # somebody owns it
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert find_unfinished(tmp_path / "alg", "abc") == path
    folder = RunFolder.claim(path, "abc")
    assert (folder.path, folder.resumed) == (path, True)
    folder.release()


def test_a_forked_child_does_not_keep_the_folder_locked(tmp_path: Path) -> None:
    code = CLAIM.replace("sys.stdin.readline()\n", "", 1) + "\n"
    code = code.replace("print(", "import os, time\nif os.fork() == 0: time.sleep(60); os._exit(0)\nprint(", 1)
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        answer(process)
        process.kill()
        process.wait()
        end_of_patience = time.monotonic() + 20  # the child sleeps for 60 s; it may not have run at all yet
        while is_owned(tmp_path / "run"):
            assert time.monotonic() < end_of_patience
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("state", ["finished", "other identity", "foreign files"])
def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path, state: str) -> None:
    path = tmp_path / "run"
    if state == "foreign files":
        path.mkdir()
        (path / "results.json").write_text("{}")
    elif state == "finished":
        with RunFolder.claim(path, "abc"):
            pass
    else:
        unfinished(path, "xyz")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    folder = RunFolder.claim(path, "abc")
    assert folder.path.parent == tmp_path
    assert folder.path != path
    assert not folder.resumed
    folder.release()
    after = {file.name: file.read_bytes() for file in path.iterdir() if file.name != ".lock"}
    assert after == {name: text for name, text in before.items() if name != ".lock"}


def test_finds_the_newest_unfinished_run_of_the_same_identity_under_any_spelling(tmp_path: Path) -> None:
    assert find_unfinished(tmp_path, "abc") is None
    unfinished(tmp_path / "lr=1" / "2026-01-01")
    newest = unfinished(tmp_path / "lr=1,rounds=5" / "2026-01-03")
    unfinished(tmp_path / "lr=1" / "2026-01-02")
    unfinished(tmp_path / "lr=1" / "2026-01-09", "xyz")
    with RunFolder.claim(tmp_path / "lr=1" / "2026-01-08", "abc"):
        pass
    assert find_unfinished(tmp_path, "abc") == newest
    owner = RunFolder.claim(newest, "abc")
    assert find_unfinished(tmp_path, "abc") == tmp_path / "lr=1" / "2026-01-02"
    owner.release()


def test_how_a_block_ends_decides_what_becomes_of_the_folder(tmp_path: Path) -> None:
    with RunFolder.claim(tmp_path / "good"):
        pass
    assert read_status(tmp_path / "good") == {"state": "finished", "error": None}
    with pytest.raises(RuntimeError), RunFolder.claim(tmp_path / "bug"):
        raise RuntimeError("two\nlines")
    assert read_status(tmp_path / "bug") == {"state": "failed", "error": "RuntimeError: two lines"}
    with pytest.raises(KeyboardInterrupt), RunFolder.claim(tmp_path / "interrupted"):
        raise KeyboardInterrupt
    assert read_status(tmp_path / "interrupted")["state"] == "running"
    assert not any(is_owned(folder) for folder in tmp_path.iterdir())


def test_a_mistake_leaves_nothing_behind_but_work_is_never_discarded(tmp_path: Path) -> None:
    save_dir = tmp_path / "saves"
    other = save_dir / "fed_avg" / "mlp" / "kept"
    other.mkdir(parents=True)
    path = save_dir / "fed_avg" / "resnet18" / "digits-iid" / "lr=1" / "run"
    folder = RunFolder.claim(path, save_dir=save_dir)
    (path / "config.yaml").write_text("a: 1")
    (path / "metrics.csv").write_text("round,test_acc\n")
    (path / "checkpoint" / "clients").mkdir(parents=True)
    with pytest.raises(ConfigError), folder:
        raise ConfigError("num_clients", 10, "fewer")
    assert sorted(path.name for path in (save_dir / "fed_avg").iterdir()) == ["mlp"]
    assert other.exists()


@pytest.mark.parametrize("work", ["metrics.csv", "checkpoint/manifest.json", "model.safetensors", "results.json"])
def test_work_is_never_discarded(tmp_path: Path, work: str) -> None:
    path = tmp_path / "saves" / "run"
    folder = RunFolder.claim(path)
    (path / work).parent.mkdir(exist_ok=True)
    (path / work).write_text("round\n1\n")
    with pytest.raises(ConfigError), folder:
        raise ConfigError("lr", 10, "less")
    assert (path / work).exists()
    assert read_status(path) == {"state": "failed", "error": "lr=10: expected less"}


def test_continue_at_takes_exactly_that_folder_or_says_why_not(tmp_path: Path) -> None:
    path = unfinished(tmp_path / "run")
    owner = RunFolder.continue_at(path, "abc")
    assert owner.resumed
    with pytest.raises(ConfigError, match=r"^resume=.*no other process"):
        RunFolder.continue_at(path, "abc")
    owner.release()
    with pytest.raises(ConfigError, match="same configuration"):
        RunFolder.continue_at(path, "xyz")
    with RunFolder.continue_at(path, "abc"):
        pass
    with pytest.raises(ConfigError, match="has finished"):
        RunFolder.continue_at(path, "abc")
    with pytest.raises(ConfigError, match="is no run folder"):
        RunFolder.continue_at(tmp_path / "nowhere", "abc")
    assert not (tmp_path / "nowhere").exists()


def test_the_name_tells_what_differs_and_nothing_that_stands_above() -> None:
    overrides = [
        "algorithm=fed_avg",
        "model=mlp",
        "dataset=mnist",
        "dataset.distribution=iid",
        "rounds=5",
        "++optimizer.momentum=0.9",
        "experiment=fsl_sage/cifar10_iid",
        "seed=7",
        "lr=0.5",
    ]
    expected = "lr=0.5,seed=7,experiment=fsl_sage-cifar10_iid,optimizer.momentum=0.9,rounds=5"
    assert what_differs(0.5, 7, overrides) == expected
    assert what_differs(0.5, 7, reversed(overrides)) == expected


def test_long_names_are_cut_and_stay_apart() -> None:
    long = [f"model.client.optimizer.key{index}=0.{index}" for index in range(20)]
    names = {
        what_differs(0.1, 0, long),
        what_differs(0.1, 0, [*long, "rounds=5"]),
        what_differs(0.1, 0, [*long, "z=5"]),
    }
    assert len(names) == 3
    assert all(len(name.encode()) <= 150 and name.startswith("lr=0.1,seed=0,model.client") for name in names)


@given(st.text())
def test_any_text_becomes_one_safe_path_component(text: str) -> None:
    name = safe_component(text)
    assert name not in ("", ".", "..")
    assert "/" not in name
    assert "\0" not in name
    assert 0 < len(name.encode()) <= 150
    assert Path("/root", name).parent == Path("/root")


def test_run_path_cannot_leave_save_dir(tmp_path: Path) -> None:
    path = run_path(tmp_path, ("../..", "a/b", ""), "unique")
    assert tmp_path in path.parents
    assert len(path.relative_to(tmp_path).parts) == 4


def test_unique_names_differ_and_sort_by_time() -> None:
    names = [unique_name() for _ in range(1000)]
    assert len(set(names)) == 1000
    assert [name[:26] for name in names] == sorted(name[:26] for name in names)
