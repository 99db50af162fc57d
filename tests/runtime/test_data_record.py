"""Data that changed under a run are told by how they differ, wherever they lie and however they are listed."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cutlayer.datasets.config import DatasetConfig
from cutlayer.datasets.facts import changed, read_facts
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.job import choose_folder, has_data_of, runs_like
from cutlayer.runtime.records.data_record import check_data, record_data
from cutlayer.runtime.records.results import Results
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.run_folder import RunFolder, find_finished


def add(root: Path, split: str, name: str, first: int, count: int) -> None:
    folder = root / split / name
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for split in ("train", "test"):
        add(root, split, "cat", 0, 6)
        add(root, split, "dog", 10, 4)
    return root


def facts(root: Path):
    return read_facts(DatasetConfig("image_folder", root), seed=0)


def test_place_times_and_order_of_listing_do_not_count(images: Path, tmp_path: Path, monkeypatch) -> None:
    before = facts(images)
    copy = tmp_path / "elsewhere" / "again"
    for path in sorted(images.rglob("*.png"), reverse=True):  # made in another order
        (copy / path.relative_to(images)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / path.relative_to(images))
        os.utime(copy / path.relative_to(images), (0, time.time() - 1e6))
    assert facts(copy) == before
    assert facts(Path(shutil.make_archive(str(tmp_path / "packed"), "zip", images))) == before


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "moved", "content", "test"])
def test_whatever_changes_the_data_is_reported(images: Path, change: str) -> None:
    before = facts(images)
    path = images / "train" / "cat" / "000.png"
    if change == "added":
        add(images, "train", "cat", 6, 1)
    elif change == "removed":
        path.unlink()
    elif change == "renamed":
        path.rename(path.with_name("900.png"))
    elif change == "moved":
        path.rename(images / "train" / "dog" / "000.png")
    elif change == "content":
        path.write_bytes(path.with_name("001.png").read_bytes())
    else:
        add(images, "test", "dog", 20, 2)
    reported = changed(before, facts(images))
    assert reported is not None
    expected = {
        "added": "10 training samples before, 11 now (cat 6 before, 7 now)",
        "removed": "10 training samples before, 9 now (cat 6 before, 5 now)",
        "renamed": "the training images are others (10 before, 10 now)",
        "moved": "10 training samples before, 10 now (cat 6 before, 5 now; dog 4 before, 5 now)",
        "content": "the training images are others (10 before, 10 now)",
        "test": "10 test samples before, 12 now (dog 4 before, 6 now)",
    }
    assert reported == expected[change]


def test_a_run_does_not_go_on_with_other_data_unless_told_to(configure, images: Path, tmp_path: Path, caplog) -> None:
    setting = ("dataset=image_folder", f"dataset.root={images}", "dataset.validation=0.2", "num_clients=2")
    config = configure(*setting, "batch_size=2")
    folder = tmp_path / "run"
    federation, results = Federation(config, folder), Results(folder)
    record_data(folder, federation.setup.dataset.facts)
    results.record(*federation.step())
    federation.checkpoint(results.state())
    add(images, "train", "dog", 30, 3)
    for restore in (Results(folder).restore, None):  # the run itself, and a program that measures it
        with pytest.raises(ConfigError) as caught:
            Federation(config, folder).resume(restore)
        assert "10 training samples before, 13 now (dog 4 before, 7 now)" in str(caught.value)
        assert "data_changed=accept" in str(caught.value)
    accepting = configure(*setting, "batch_size=2", "data_changed=accept")
    assert accepting.identity() == config.identity()
    resumed = Federation(accepting, folder)
    assert resumed.resume(Results(folder).restore) is not None
    assert "accepted" in caplog.text


def test_a_damaged_record_is_reported_and_a_missing_one_is_of_an_earlier_version(tmp_path: Path) -> None:
    def never() -> dict[str, object]:
        raise AssertionError("the data are read for nothing")

    check_data(tmp_path, never, "refuse")
    record_data(tmp_path, {"name": "x", "training samples": 7})
    path = tmp_path / "data.json"
    path.write_text(path.read_text().replace("7", "8", 1))
    with pytest.raises(ConfigError, match="has other content than was written"):
        check_data(tmp_path, never, "refuse")
    check_data(tmp_path, never, "accept")


@pytest.mark.parametrize(
    ("case", "found"), [("same", True), ("changed", True), ("copy", True), ("other", False), ("unknown", False)]
)
def test_a_run_is_found_by_its_data_where_they_were_moved(
    configure, images: Path, tmp_path: Path, case: str, found: bool
) -> None:
    """Another folder of images is another run's, also where one configuration differs from another in nothing else."""
    setting = ("dataset=image_folder", "num_clients=2", "batch_size=2", f"save_dir={tmp_path / 'saves'}")
    config = configure(*setting, f"dataset.root={images}")
    folder = RunFolder.claim(choose_folder(config, []), config.identity())
    Results(folder.path).start(config.to_mapping())
    record_data(folder.path, read_facts(config.dataset, config.seed))
    folder.release()
    root = images if case in ("same", "changed") else shutil.copytree(images, tmp_path / "elsewhere")
    if case in ("changed", "other"):  # in its place it is the run's, which refuses to go on
        add(root, "train", "dog", 30, 3)
    if case == "unknown":
        (folder.path / "data.json").unlink()
    now = configure(*setting, f"dataset.root={root}")
    assert now.identity() == config.identity()
    assert (choose_folder(now, []) == folder.path) == found
    folder.mark("finished")
    assert (find_finished(runs_like(now), now.identity(), has_data_of(now)) == folder.path) == found
