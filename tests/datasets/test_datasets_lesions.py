"""HAM10000 as people have it: other names and marks of the table, ISIC's own words, masks, rows that say nothing."""

import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cutlayer.datasets import Dataset, DatasetConfig, load
from cutlayer.datasets.ham10000 import CLASSES
from cutlayer.runtime.ground.config import ConfigError

CPU = torch.device("cpu")
# (code, the words that the ISIC archive's export has for it in diagnosis_2 and diagnosis_3)
ISIC = [
    ("nv", "Benign melanocytic proliferations", "Nevus"),
    ("mel", "Malignant melanocytic proliferations (Melanoma)", "Melanoma, NOS"),
    ("bkl", "Benign epidermal proliferations", "Pigmented benign keratosis"),
    ("bcc", "Malignant adnexal epithelial proliferations - Follicular", "Basal cell carcinoma"),
    ("akiec", "Malignant epidermal proliferations", "Squamous cell carcinoma, NOS"),
    ("akiec", "Indeterminate epidermal proliferations", "Solar or actinic keratosis"),
    ("df", "Benign soft tissue proliferations - Fibro-histiocytic", "Dermatofibroma"),
    ("vasc", "Benign soft tissue proliferations - Vascular", ""),
]


def loaded(root: Path, **values: Any) -> Dataset:
    config = DatasetConfig("ham10000", root=root, normalize="none", options={"size": 8}, **values)
    return load(config, seed=0, device=CPU, dtype=torch.float32)


def tone(at: int) -> int:
    return 4 * at


def pictures(folder: Path, count: int) -> None:
    """ISIC_0 to ISIC_<count - 1>, each of one grey tone that tells which it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for at in range(count):
        Image.new("RGB", (12, 9), (tone(at),) * 3).save(folder / f"ISIC_{at}.jpg", quality=95)


def found(data: Dataset) -> dict[int, tuple[int, str]]:
    """By picture: the group that it is in and its diagnosis."""
    read: dict[int, tuple[int, str]] = {}
    for source in (data.train, data.test):
        assert source.groups is not None
        x = torch.cat([x for x, _ in source.batches(torch.arange(len(source)), batch_size=9)])
        at = (x.mean((1, 2, 3)) * 255 / tone(1)).round().int().tolist()
        read |= {
            i: (int(group), CLASSES[label])
            for i, group, label in zip(at, source.groups, source.labels.tolist(), strict=True)
        }
    return read


def rows(count: int = 40) -> pd.DataFrame:
    lines = [
        {
            "lesion_id": f"HAM_{at // 2}",
            "image_id": f"ISIC_{at}",
            "dx": ISIC[at // 2 % 8][0],
            "age": 40.0,
            "sex": "male",
        }
        for at in range(count)
    ]
    return pd.DataFrame(lines)


@pytest.mark.parametrize(
    ("name", "mark", "quoting"),
    [
        ("HAM10000_metadata.csv", ",", 0), ("HAM10000_metadata.tab", "\t", 2), ("HAM10000_metadata", ",", 0),
        ("HAM10000_metadata", "\t", 2), ("ham10000_metadata_2025-05-11.csv", ",", 0), ("HAM10000_metadata.csv", ";", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inside", ["ham10000", "."])
def test_the_table_by_any_name_with_any_mark(tmp_path: Path, name: str, mark: str, quoting: int, inside: str) -> None:
    pictures(tmp_path / inside / "HAM10000_images_part_1", 40)
    rows().to_csv(tmp_path / inside / name, sep=mark, index=False, quoting=quoting)  # type: ignore[arg-type]
    read = found(loaded(tmp_path))
    assert {at: code for at, (_, code) in read.items()} == dict(enumerate(rows()["dx"]))
    assert all(read[at][0] == read[at + 1][0] for at in range(0, 40, 2))


def test_the_archive_s_own_export(tmp_path: Path) -> None:
    """isic_id and levels of diagnoses, of which vascular lesions have two and the others three; in a zip."""
    pictures(tmp_path / "images", 40)
    lines = [
        {"isic_id": f"ISIC_{at}", "attribution": "ViDIR Group", "diagnosis_1": "Benign", "lesion_id": f"IL_{at // 2}"}
        | dict(zip(("diagnosis_2", "diagnosis_3"), ISIC[at // 2 % 8][1:], strict=True))
        for at in range(40)
    ]
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as file:
        file.writestr("metadata.csv", pd.DataFrame(lines).to_csv(index=False))
        for at in range(40):
            file.write(tmp_path / "images" / f"ISIC_{at}.jpg", f"ISIC_{at}.jpg")
    read = found(loaded(tmp_path / "export.zip"))
    assert {at: code for at, (_, code) in read.items()} == {at: ISIC[at // 2 % 8][0] for at in range(40)}


@pytest.mark.parametrize(
    ("code", "spellings"),
    [
        ("mel", ["Melanoma", "MEL", " melanoma "]),
        ("nv", ["Melanocytic nevi", "Nevus", "melanocytic nevus"]),
        ("bkl", ["Benign keratosis-like lesions ", "pigmented benign keratosis", "solar lentigo"]),
        ("akiec", ["Actinic keratoses", "Actinic keratoses and intraepithelial carcinoma / Bowen's disease"]),
        ("vasc", ["Vascular lesions", "vascular lesion", "pyogenic granuloma"]),
        ("df", ["Dermatofibroma"]),
        ("bcc", ["basal cell carcinoma"]),
    ],
)  # fmt: skip
def test_diagnoses_in_words(tmp_path: Path, code: str, spellings: list[str]) -> None:
    pictures(tmp_path, 40)
    table = rows().rename(columns={"dx": "diagnosis"})
    table["diagnosis"] = [spellings[at % len(spellings)] for at in range(40)]
    table.to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    assert {diagnosis for _, diagnosis in found(loaded(tmp_path)).values()} == {code}


def test_a_diagnosis_that_is_none_is_one_line(tmp_path: Path) -> None:
    pictures(tmp_path, 40)
    table = rows()
    table.loc[3:5, "dx"] = "melanomma"
    table.loc[7, "dx"] = "scar"
    table.to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path)
    text = str(caught.value)
    assert text.startswith("dx in ")
    assert "=melanomma: expected a diagnosis of HAM10000; 3 rows have this and 1 rows have others" in text
    assert "did you mean Melanoma?" in text or "did you mean melanoma?" in text
    assert "akiec, bcc, bkl, df, mel, nv, vasc" in text
    assert "\n" not in text


def test_what_is_left_out_is_said_once_with_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Masks, with names of their own or the images', never take an image's place."""
    pictures(tmp_path / "HAM10000_images_part_1", 40)
    pictures(tmp_path / "ham10000_images_part_1", 3)
    for at in range(40):
        for folder, name in (("HAM10000_segmentations_lesion_tschandl", f"ISIC_{at}_segmentation.png"),
                             ("masks", f"ISIC_{at}.png")):  # fmt: skip
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("L", (12, 9), 255).save(tmp_path / folder / name)
    table = rows()
    table.loc[38, "dx"] = ""
    table = pd.concat([table.drop(index=39), table.iloc[:2]])
    table.to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    with caplog.at_level(logging.WARNING):
        read = found(loaded(tmp_path))
    assert {at: code for at, (_, code) in read.items()} == dict(enumerate(rows(38)["dx"]))
    (said,) = [record.getMessage() for record in caplog.records]
    for part in (
        "segmentation masks: 80 (HAM10000_segmentations_lesion_tschandl/ISIC_0_segmentation.png, ...)",
        "rows of HAM10000_metadata.csv without an image or a diagnosis: 1 (ISIC_38)",
        "rows of HAM10000_metadata.csv that are there again: 2 (ISIC_0, ...)",
        "pictures that are there twice: 3",
        "pictures without a row in the table: 2 (HAM10000_images_part_1/ISIC_38.jpg, ...)",
    ):
        assert part in said


def test_validation_takes_whole_lesions_too(tmp_path: Path) -> None:
    pictures(tmp_path, 60)
    rows(60).to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    data = loaded(tmp_path, validation=0.3)
    assert data.validation is not None
    sides = [{*np.asarray(source.groups).tolist()} for source in (data.train, data.validation, data.test)]
    assert all(sides)
    assert len(set.union(*sides)) == sum(map(len, sides)) == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="dx"), "a column .* and one dx or diagnosis.*found lesion_id, image_id"),
        (lambda table: table.drop(columns="image_id"), "a column image_id or isic_id"),
        (lambda table: pd.concat([table, table.iloc[:1].assign(dx="bcc")]), "ISIC_0 has 2 rows that differ"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used(tmp_path: Path, change: Any, message: str) -> None:
    pictures(tmp_path, 40)
    change(rows()).to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path)


def test_pictures_of_no_known_lesion_are_each_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path, 40)
    rows().drop(columns="lesion_id").to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    with caplog.at_level(logging.WARNING):
        read = found(loaded(tmp_path))
    assert len({group for group, _ in read.values()}) == 40
    assert "40 pictures are of no known lesion" in caplog.text
