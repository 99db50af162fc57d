"""Groups of anyone's own images: three ways to say what belongs together, and what follows from them."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cutlayer.datasets import Dataset, DatasetConfig, load, partition
from cutlayer.runtime.ground.config import ConfigError, build


def folder(root: Path, part: str = "train", patients: int = 12, each: int = 3) -> dict[str, str]:
    """Class folders, in each a folder for each site; returns each file's patient. A patient is of one site."""
    patient: dict[str, str] = {}
    for p in range(patients):
        for i in range(each):
            path = Path(part) / ("ant", "bee")[(p + i) % 2] / f"site{p % 4}" / f"p{p:02}_{i}.png"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 5 * p + i).save(root / path)
            patient[path.as_posix()] = f"p{p:02}"
    return patient


def loaded(root: Path, **values: Any) -> Dataset:
    options = {"channels": 1, "test": None, "test_fraction": 0.3} | values.pop("options", {})
    config = DatasetConfig("image_folder", root=root, normalize="none", options=options, **values)
    return load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)


def tones(source: Any) -> list[int]:
    x = torch.cat([x for x, _ in source.batches(torch.arange(len(source)), batch_size=9)])
    return (x[:, 0, 0, 0] * 255).round().int().tolist()


def by_group(data: Dataset) -> dict[int, set[int]]:
    """What is in each group, by the tone that says which picture it is."""
    found: dict[int, set[int]] = {}
    for source in (data.train, data.test):
        assert source.groups is not None
        for tone, group in zip(tones(source), source.groups.tolist(), strict=True):
            found.setdefault(group, set()).add(tone)
    return found


PATIENTS = {frozenset({5 * p, 5 * p + 1, 5 * p + 2}) for p in range(12)}
SITES = {frozenset(5 * p + i for p in range(site, 12, 4) for i in range(3)) for site in range(4)}


def test_a_pattern_in_the_name(tmp_path: Path) -> None:
    folder(tmp_path)
    assert {frozenset(g) for g in by_group(loaded(tmp_path, options={"group": "(p[0-9]+)_"})).values()} == PATIENTS


def test_a_level_of_folders(tmp_path: Path) -> None:
    folder(tmp_path)
    assert {frozenset(g) for g in by_group(loaded(tmp_path, options={"group": 1})).values()} == SITES


@pytest.mark.parametrize("called", ["path", "name", "stem"])
@pytest.mark.parametrize(("file", "mark"), [("of.csv", ","), ("tables/of.tab", "\t")])
def test_a_column_of_a_table(tmp_path: Path, called: str, file: str, mark: str) -> None:
    patient = folder(tmp_path)
    lines = [mark.join(("number", "image", "patient"))]
    for number, (path, name) in enumerate(patient.items()):
        image = {"path": path, "name": Path(path).name, "stem": Path(path).stem}[called]
        lines.append(mark.join((str(number), image, name)))
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("\n".join(lines))
    assert {frozenset(g) for g in by_group(loaded(tmp_path, options={"group": f"{file}:patient"})).values()} == PATIENTS


def test_in_a_zip_too(tmp_path: Path) -> None:
    folder(tmp_path / "data")
    folder(tmp_path / "data", "other", patients=1)
    shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "data")
    found = by_group(loaded(tmp_path / "data.zip", options={"group": "(p[0-9]+)_"}))
    assert {frozenset(g) for g in found.values()} == PATIENTS


def test_what_is_held_out_is_whole_groups(tmp_path: Path) -> None:
    folder(tmp_path)
    data = loaded(tmp_path, validation=0.25, options={"group": "(p[0-9]+)_"})
    assert data.validation is not None
    sides = [{tone // 5 for tone in tones(source)} for source in (data.train, data.validation, data.test)]
    assert all(sides)
    assert sum(map(len, sides)) == len(set.union(*sides)) == 12
    # 12 patients of 3 pictures, 0.3 of 36 pictures: between 3 and 4 patients.
    assert len(sides[2]) in (3, 4)


def test_natural_clients_are_the_sites_each_with_a_test_of_its_own(tmp_path: Path) -> None:
    folder(tmp_path, patients=20)
    data = loaded(tmp_path, options={"group": 1, "test_by": "sample"})
    assert data.groups is not None
    config = DatasetConfig("image_folder", distribution="natural")
    parts = partition(data.train.labels, 4, config, seed=0, groups=data.groups)
    sites = [{tone // 5 % 4 for tone in np.array(tones(data.train))[parts.indices(c).numpy()]} for c in range(4)]
    assert sorted(map(sorted, sites)) == [[0], [1], [2], [3]]
    assert data.test.groups is not None
    assert np.bincount(data.test.groups).tolist() == [4] * 4, "0.3 of each site's 15 pictures"


def test_groups_of_two_folders_have_one_numbering(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path, "train", patients=8)
    folder(tmp_path, "test", patients=12)
    with caplog.at_level(logging.WARNING):
        data = loaded(tmp_path, options={"group": "(p[0-9]+)_", "test": "test"})
    assert {frozenset(g) for g in by_group(data).values()} == PATIENTS
    assert "8 groups have pictures both in train and in test" in caplog.text


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("(p1[0-9])_", r"a match in the path of each image; 30 of 36 .* the first is train/ant/site0/p00_0\.png"),
        (2, "a folder at level 2 below the class; 36 of 36"),
        ("none.csv:patient", r"group=none\.csv: expected a table in dataset\.root; did you mean some\.csv\?"),
        ("some.csv:patients", r"group=patients: expected a column of some\.csv; did you mean patient\?"),
        ("some.csv:patient", "a value in column patient; 35 of 36"),
        ("some.csv:other", r"one group for each image; .*p00_0\.png has 2"),
    ],
)  # fmt: skip
def test_images_without_a_group_are_one_line(tmp_path: Path, group: str | int, message: str) -> None:
    folder(tmp_path)
    (tmp_path / "some.csv").write_text("image,patient,other\np00_0,p,1\np00_0,p,2\n")
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, options={"group": group})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("group", [0, -1, "p[0-9]+", "(a)(b)", "(p[0-9]+"])
def test_what_says_no_group_is_refused_before_anything_is_read(group: str | int) -> None:
    with pytest.raises(ConfigError, match=r"^dataset\.options\.group=.*regular expression with one group"):
        build(DatasetConfig, {"name": "image_folder", "options": {"group": group}}, "dataset")
