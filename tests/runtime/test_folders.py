"""Folders that were made in vain go again, and no others."""

import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.folders import make_folders, nothing_left, remove_empty, standing
from cutlayer.runtime.run_folder import RunFolder, read_status

# Folders three levels deep at most, of few names, so that they often have one in common.
PLACES = st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map(lambda names: Path(*names))


def content(root: Path) -> set[Path]:
    return {path.relative_to(root) for path in root.rglob("*")}


def made_before(root: Path, folders: list[Path], files: list[Path]) -> set[Path]:
    for folder in (*folders, *files):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for folder in files:
        (root / folder / "file").touch()
    return content(root)


def make_in_vain(folder: Path) -> None:
    make_folders(folder)
    raise KeyboardInterrupt


@given(folders=st.lists(PLACES, max_size=3), files=st.lists(PLACES, max_size=3), wanted=PLACES)
def test_a_block_that_fails_leaves_what_was_there_and_nothing_else(
    folders: list[Path], files: list[Path], wanted: Path
) -> None:
    with TemporaryDirectory() as place:
        root = Path(place)
        before = made_before(root, folders, files)
        with pytest.raises(KeyboardInterrupt), nothing_left(root / wanted):
            make_in_vain(root / wanted)
        assert content(root) == before


@given(folders=st.lists(PLACES, max_size=3), files=st.lists(PLACES, max_size=3), save_dir=PLACES)
def test_a_run_that_is_a_mistake_leaves_every_file_and_none_of_its_folders(
    folders: list[Path], files: list[Path], save_dir: Path
) -> None:
    with TemporaryDirectory() as place:
        root = Path(place)
        before = made_before(root, folders, files)
        stood = (root / save_dir).is_dir()
        folder = RunFolder.claim(root / save_dir / "fed_avg" / "mlp" / "run", save_dir=root / save_dir)
        (folder.path / "run.log").touch()
        with pytest.raises(ConfigError), folder:
            raise ConfigError("workers", 9, "fewer")
        assert content(root) == before
        assert (root / save_dir).is_dir() == stood


def test_a_run_that_is_continued_is_never_removed(tmp_path: Path) -> None:
    """Although it holds nothing that cost more than a start, there may be something of the user's in it."""
    path = tmp_path / "saves" / "run"
    RunFolder.claim(path, "abc").release()
    (path / "notes.txt").write_text("why")
    for again in (RunFolder.claim, RunFolder.continue_at):
        with pytest.raises(ConfigError), again(path, "abc"):
            raise ConfigError("lr", 10, "less")
        assert (path / "notes.txt").read_text() == "why"
        assert read_status(path) == {"state": "failed", "error": "lr=10: expected less"}


def test_remove_empty_stops_at_the_root_and_at_what_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    remove_empty(tmp_path / "a" / "b" / "c", tmp_path / "a")
    assert content(tmp_path) == {Path("a")}
    (tmp_path / "a" / "x" / "y").mkdir(parents=True)
    (tmp_path / "a" / "x" / "file").touch()
    remove_empty(tmp_path / "a" / "x" / "y", tmp_path)
    assert content(tmp_path) == {Path("a"), Path("a/x"), Path("a/x/file")}
    (tmp_path / "b").mkdir()
    for root in (tmp_path / "b", tmp_path / "elsewhere"):
        remove_empty(tmp_path / "b", root)
    assert (tmp_path / "b").is_dir()


def test_folders_are_made_while_others_remove_empty_ones(tmp_path: Path) -> None:
    over = threading.Event()

    def remove() -> None:
        while not over.is_set():
            remove_empty(tmp_path / "a" / "b", tmp_path)

    removing = threading.Thread(target=remove)
    removing.start()
    try:
        for number in range(1000):
            path = tmp_path / "a" / "b" / "c" / str(number)
            make_folders(path)
            path.rmdir()
            path.parent.rmdir()
    finally:
        over.set()
        removing.join()


def test_standing_is_the_nearest_that_is_there(tmp_path: Path) -> None:
    assert standing(tmp_path) == tmp_path
    assert standing(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "file").touch()
    assert standing(tmp_path / "file" / "b") == tmp_path
