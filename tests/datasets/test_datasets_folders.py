"""Folders and zip files as people have them: nothing in them vanishes or doubles unseen."""

import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cutlayer.datasets import Dataset, DatasetConfig, load
from cutlayer.datasets.trees import FolderTree, ZipTree
from cutlayer.runtime.ground.config import ConfigError

TWO = ("train/ant/1.png", "train/ant/2.png", "train/bee/1.png", "test/ant/8.png", "test/bee/9.png")


def write(root: Path, paths: Mapping[str, int] | tuple[str, ...] | list[str]) -> Path:
    """A file at each path: an image of one grey level where the name is that of one, else some text."""
    levels = paths if isinstance(paths, Mapping) else dict.fromkeys(paths, 7)
    for path, level in levels.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".png" and not file.name.startswith("._"):
            Image.new("RGB", (4, 4), (level,) * 3).save(file)
        else:
            file.write_text("no picture")
    return root


def zipped(folder: Path, file: Path, above: str = "") -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, above + path.relative_to(folder).as_posix())
    return file


def loaded(root: Path, **options: Any) -> Dataset:
    config = DatasetConfig("image_folder", root=root, normalize="none", options=options)
    return load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)


def contents(data: Dataset) -> tuple[tuple[str, ...], list[tuple[int, int]], list[tuple[int, int]]]:
    """Class names, and the grey level and label of each training and each test image."""
    parts = []
    for source in (data.train, data.test):
        x = torch.cat([x for x, _ in source.batches(torch.arange(len(source)), batch_size=50)])
        levels = (x[:, 0, 0, 0] * 255).round().int().tolist()
        parts.append(list(zip(levels, source.labels.tolist(), strict=True)))
    return data.info.class_names, parts[0], parts[1]


JUNK = [
    *(
        "train/.ipynb_checkpoints/ant-checkpoint.png",
        "train/ant/@eaDir/1.png",
        "train/ant/._1.png",
        "train/ant/Thumbs.db",
    ),
    *("train/.DS_Store", "__MACOSX/train/ant/1.png", "train/bee/.ipynb_checkpoints/1.png", "train/@eaDir/x.png"),
    *("$RECYCLE.BIN/train/ant/x.png", "test/bee/desktop.ini", "test/.cache/ant/5.png", "train/__pycache__/a.png"),
]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_hidden_and_system_files_are_left_out_and_counted(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def at(name: str, paths: Any) -> Path:
        folder = write(tmp_path / name, paths)
        return folder if kind == "folder" else zipped(folder, tmp_path / f"{name}.zip")

    clean = contents(loaded(at("clean", TWO)))
    assert caplog.records == []
    with caplog.at_level(logging.INFO):
        assert contents(loaded(at("full", [*TWO, *JUNK]))) == clean
    assert [record.getMessage().partition("left out ")[2] for record in caplog.records] == [
        f"hidden or system files and folders: {len(JUNK)} ($RECYCLE.BIN, ...)"
    ]


def test_what_is_left_out_is_said_with_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = ["train/ant/a.gif", "train/ant/b.GIF", "train/bee/notes.txt", "train/stray.png", "readme.md"]
    extra += ["val/ant/1.png", "val/bee/2.png"]
    write(tmp_path, [*TWO, *extra])
    (tmp_path / "train" / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "train" / "ant" / "self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "train" / "ant" / "pipe.png")
    with caplog.at_level(logging.INFO):
        assert len(loaded(tmp_path).train) == 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"dataset.root={tmp_path}: left out links that lead nowhere: 2 (train/ant/gone.png, ...); "
        "things that are no file: 1 (train/ant/pipe.png); "
        "files of other kinds in train (.gif 2, .txt 1): 3 (train/ant/a.gif, ...); "
        "pictures in no class folder: 1 (train/stray.png); "
        "pictures outside of train/ and test/: 2 (val/ant/1.png, ...)"
    )


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["train/ant/masks/1.png"], "pictures of the same class and name as another: 1 (train/ant/masks/1.png)"),
        (["train/ant/1_mask.png"], "pictures that by their name are made from another: 1 (train/ant/1_mask.png)"),
        (["train/ant/1-thumb.png"], "pictures that by their name are made from another: 1 (train/ant/1-thumb.png)"),
        (["train/Ant/1.png"], "names of classes that differ only by case or Unicode form from another: 1 (ant)"),
        (["train/\u00fc/1.png", "train/u\u0308/1.png"], "differ only by case or Unicode form from another: 1"),
        (["train/wasp/1.png"], "classes without a picture in test: 1 (wasp)"),
        (["train/wasp/1.png", "test/wasp/1.gif"], "class folders without a picture in test: 1 (wasp)"),
    ],
)
def test_what_is_hardly_meant_is_said(
    tmp_path: Path, extra: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    loaded(write(tmp_path, [*TWO, *extra]))
    assert said in caplog.text


@pytest.mark.parametrize(
    ("extra", "options", "said"),
    [
        (["train/wasp/1.gif", "train/wasp/2.gif"], {}, "folder of train/; wasp has only files of other kinds: .gif 2"),
        (["train/wasp/"], {}, "every class folder of train/; wasp has none"),
        (["train/wasp/", "train/moth/"], {}, "moth and 1 more has none"),
        ([], {"train": ".", "test": None}, r"train=\.: expected the folder of the classes; found test, train"),
        ([], {"test": "./train/"}, r"dataset\.options\.test=\./train/: expected another folder"),
        (["test/wasp/1.png"], {}, "found wasp"),
        (["one/ant/1.png"], {"train": "one", "test": None}, "two classes or more in one/; found the folder ant only"),
        (["none/ant/1.gif"], {"train": "none"}, r"none/<class>/ of it; found files of other kinds \(\.gif 1\)"),
        (["none/1.png"], {"train": "none"}, "none/<class>/ of it; found some in no class folder: 1"),
        ([], {"train": "Train"}, r"Train/<class>/ of it; found some in test, train"),
        ([], {"background": 256}, "background=256"),
        ([], {"white": 0.0}, "white=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(tmp_path: Path, extra: list[str], options: dict[str, Any], said: str) -> None:
    write(tmp_path, [*TWO, *(path for path in extra if not path.endswith("/"))])
    for path in extra:
        (tmp_path / path).parent.joinpath(Path(path).name if path.endswith("/") else "").mkdir(exist_ok=True)
    for root in (tmp_path, zipped(tmp_path, tmp_path.parent / f"{tmp_path.name}.zip")):
        with pytest.raises(ConfigError, match=said) as caught:
            loaded(root, **options)
        assert str(caught.value).isprintable()


def test_named_classes_may_lack_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, ["train/bee/1.png", "test/bee/2.png", "train/wasp/1.gif"])
    assert contents(loaded(tmp_path, classes=["ant", "bee", "wasp"])) == (("ant", "bee", "wasp"), [(7, 1)], [(7, 1)])
    assert "class folders without a picture in train: 1 (wasp)" in caplog.text


@pytest.mark.parametrize("train", ["train", "."])
@pytest.mark.parametrize(
    "stray", [[], ["data/readme.txt"], ["readme.txt"], ["data/cover.png"], ["cover.png"], [".x/y.png"]]
)
def test_a_single_folder_in_a_zip_is_looked_through(tmp_path: Path, train: str, stray: list[str]) -> None:
    """Whatever lies beside it or in it: what is trained on is what the folder alone gives."""
    below = "" if train == "." else "train/"
    write(tmp_path / "made/data", {f"{below}{name}/deep/{i}.png": 10 * i + (name == "bee") for name in ("ant", "bee")
                                   for i in range(5)})  # fmt: skip
    expected = contents(loaded(tmp_path / "made/data", train=train, test=None))
    assert expected[0] == ("ant", "bee")
    file = zipped(write(tmp_path / "made", stray), tmp_path / "data.zip")
    assert contents(loaded(file, train=train, test=None)) == expected


def test_a_part_at_the_top_of_a_zip_is_not_looked_through(tmp_path: Path) -> None:
    write(tmp_path / "made", [f"train/{name}/{i}.png" for name in ("ant", "bee") for i in range(5)])
    file = zipped(tmp_path / "made", tmp_path / "data.zip")
    assert loaded(file, test=None).info.class_names == ("ant", "bee")
    assert loaded(file, train=".", test=None, classes=["train"]).info.class_names == ("train",)


def test_a_class_may_have_the_name_of_a_part(tmp_path: Path) -> None:
    write(tmp_path / "made", [f"train/{name}/{i}.png" for name in ("ant", "train") for i in range(5)])
    for root in (tmp_path / "made", zipped(tmp_path / "made", tmp_path / "data.zip")):
        assert loaded(root, test=None).info.class_names == ("ant", "train")


def test_backslashes_of_an_archive_made_on_windows_are_slashes(tmp_path: Path) -> None:
    write(tmp_path, ["x.png"])
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in TWO:
            info = zipfile.ZipInfo(path.replace("/", "\\"))
            info.create_system = 0
            archive.writestr(info, (tmp_path / "x.png").read_bytes())
    assert len(loaded(tmp_path / "data.zip").train) == 3


def test_the_test_folder_is_no_class(tmp_path: Path) -> None:
    write(tmp_path, {"ant/1.png": 1, "bee/2.png": 2, "held/ant/3.png": 3, "held/bee/4.png": 4})
    assert contents(loaded(tmp_path, train=".", test="held")) == (("ant", "bee"), [(1, 0), (2, 1)], [(3, 0), (4, 1)])


def test_the_published_tinyimagenet_zip_is_read(tmp_path: Path) -> None:
    root = write(
        tmp_path / "made/tiny-imagenet-200",
        ["train/n1/images/n1_0.png", "train/n2/images/n2_0.png", "val/images/v.png"],
    )
    (root / "wnids.txt").write_text("n2\nn1\n")
    (root / "words.txt").write_text("n1\tcat\nn2\tdog\n")
    (root / "val/val_annotations.txt").write_text("v.png\tn1\t0\t0\t62\t62\n")
    file = zipped(tmp_path / "made", tmp_path / "tiny.zip")
    config = DatasetConfig("tinyimagenet", root=file)
    data = load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    assert (data.info.class_names, data.train.labels.tolist()) == (("dog", "cat"), [1, 0])
    (root / "val/val_annotations.txt").write_text("v.png\n")
    with pytest.raises(ConfigError, match="a name and a class in each line"):
        load(DatasetConfig("tinyimagenet", root=root), seed=0, device=torch.device("cpu"), dtype=torch.float32)
    (root / "val/val_annotations.txt").write_text("v.png\tn3\n")
    with pytest.raises(ConfigError, match=r"val/images/v\.png is of n3"):
        load(DatasetConfig("tinyimagenet", root=root), seed=0, device=torch.device("cpu"), dtype=torch.float32)


def test_links_are_followed_but_to_what_they_are_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "elsewhere", ["pool/5.png", "6.png"])
    root = write(tmp_path / "root", TWO)
    (root / "train/ant/more").symlink_to(tmp_path / "elsewhere/pool")
    (root / "train/bee/6.png").symlink_to(tmp_path / "elsewhere/6.png")
    assert len(loaded(root).train) == 5
    assert caplog.records == []
    for name, target in (("up", ".."), ("top", "../.."), ("above", "../../.."), ("own", ".")):
        (root / "train/ant" / name).symlink_to(target)
    with caplog.at_level(logging.INFO):
        assert len(loaded(root).train) == 5
    assert "left out links to a folder that they are in: 4 (train/ant/above, ...)" in caplog.text
    (root / "train/bee/again").symlink_to(tmp_path / "elsewhere/pool")
    (root / "test/ant/3.png").symlink_to("../../train/ant/2.png")
    loaded(root)
    assert "pictures that are the same file as another, over a link: 2 (test/ant/3.png, ...)" in caplog.text


@pytest.mark.parametrize("seed", range(20))
def test_any_tangle_of_links_ends_with_each_file_once_by_its_own_path(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    folders = ["."]
    for i in range(5):
        folders.append(f"{random.choice(folders)}/d{i}")
        (tmp_path / folders[-1]).mkdir()
        (tmp_path / folders[-1] / "x.png").write_bytes(b"")
    for i in range(3):
        (tmp_path / random.choice(folders) / f"l{i}").symlink_to(tmp_path / random.choice(folders))
    for one, other in (("m", "n"), ("n", "m")):  # two that link to each other
        (tmp_path / one).mkdir()
        (tmp_path / one / "l").symlink_to(tmp_path / other)
    tree = FolderTree(tmp_path)
    assert [path for path in tree.paths() if "l" not in path] == sorted(
        Path(each, "x.png").as_posix() for each in folders[1:]
    )
    for path in tree.folders():
        # Nowhere on its way does a path come back to a folder that it has been in.
        way = [os.path.realpath(tmp_path / above) for above in (path, *Path(path).parents)]
        assert len({*way}) == len(way), path
    once = {os.path.realpath(tmp_path / path) for path in tree.paths()}
    assert len(tree.paths()) - len(tree.repeated(tree.paths())) == len(once)


def test_a_folder_that_cannot_be_read_is_refused_where_it_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, TWO)
    scan = os.scandir

    def forbid(path: Any) -> Any:
        if os.fspath(path).endswith("bee"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbid)
    with pytest.raises(ConfigError, match="folders that can be read; train/bee cannot"):
        loaded(tmp_path)
    with pytest.raises(ConfigError, match="folders that can be read; it cannot"):
        loaded(write(tmp_path / "bee", TWO))
    write(tmp_path / "good", TWO)
    write(tmp_path / "good/more/bee", ["1.png"])
    with monkeypatch.context() as patched, caplog.at_level(logging.INFO):
        patched.setattr(os, "scandir", lambda path: forbid(path) if "more" in os.fspath(path) else scan(path))
        loaded(tmp_path / "good")
    assert "folders that cannot be read: 1 (more/bee)" in caplog.text


def test_a_name_that_is_in_an_archive_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = zipped(write(tmp_path / "made", TWO), tmp_path / "data.zip")
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.write(write(tmp_path, {"new.png": 99}) / "new.png", "train/ant/1.png")
    with caplog.at_level(logging.INFO):
        assert contents(loaded(file))[1] == [(99, 0), (7, 0), (7, 1)]
    assert "left out names that are in the archive again, of which the last is read: 1 (train/ant/1.png)" in caplog.text


def test_a_root_without_a_picture_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no file"):
        loaded(tmp_path)
    with pytest.raises(ConfigError, match=r"found files of other kinds \(\.zip 2, no suffix 1\)"):
        loaded(write(tmp_path, ["a.zip", "more/b.zip", "LICENSE"]))


@pytest.mark.parametrize("content", [b"PK\x05\x06" + b"\xff" * 18, b"PK\x05\x06" + bytes(18) + b"x", b"no zip", b""])
def test_a_broken_archive_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(ConfigError, match=r"dataset\.root=.*data\.zip: expected"):
        loaded(tmp_path / "data.zip")


def raw_zip(file: Path, members: dict[bytes, int]) -> Path:
    """An archive whose names are bytes without the mark for UTF-8, as macOS, Windows and old programs write them."""
    with zipfile.ZipFile(file, "w") as archive:
        for at, level in enumerate(members.values()):
            Image.new("RGB", (4, 4), (level,) * 3).save(file.with_suffix(".png"))
            archive.write(file.with_suffix(".png"), f"{at:0{len([*members][at])}d}")
    content = file.read_bytes()
    for at, name in enumerate(members):
        content = content.replace(f"{at:0{len(name)}d}".encode(), name)
    file.write_bytes(content)
    return file


def test_names_in_an_archive_need_not_be_marked_as_utf8(tmp_path: Path) -> None:
    classes = ["H\u00fcnd".encode(), "\u732b".encode(), b"M\x81nze", b"ant"]
    members = {b"train/" + name + b"/picture" + bytes([65 + i]) + b".png": i for name in classes for i in range(2)}
    data = loaded(raw_zip(tmp_path / "data.zip", members), test=None, test_fraction=0.5)
    assert set(data.info.class_names) == {"H\u00fcnd", "\u732b", "M\u00fcnze", "ant"}  # cp437 has its u umlaut at 0x81


def test_names_that_are_no_text_work_and_are_written_escaped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = os.fsdecode(b"n\xff\n\x1b[31m")
    root = write(
        tmp_path / odd,
        [f"train/{odd}/1.png", "train/ant/2.png", f"test/ant/{odd}.png", f"train/ant/.{odd}", f"{odd}.txt"],
    )
    with caplog.at_level(logging.INFO):
        names, train, _ = contents(loaded(root))
    assert (names, len(train)) == (("ant", r"n\xff\n\x1b[31m"), 2)
    caplog.text.encode()
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert len(caplog.records) == 2
    (root / f"test/ant/{odd}.png").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"test/ant/n\\xff \\x1b\[31m\.png: expected a readable image") as caught:
        loaded(root)
    str(caught.value).encode()
    # A class is named on the command line as it is shown.
    (root / f"test/ant/{odd}.png").unlink()
    write(root, ["test/ant/1.png"])
    assert loaded(root, classes=["ant", r"n\xff\n\x1b[31m"]).train.labels.tolist() == [0, 1]
    write(root, [r"train/n\xff\n\x1b[31m/1.png"])
    with pytest.raises(ConfigError, match="whose names differ when shown"):
        loaded(root)


def test_a_path_that_is_too_long_to_show_ends_with_the_name(tmp_path: Path) -> None:
    path = "/".join(["train", "ant", *["deep" * 10] * 5, "name.png"])
    write(tmp_path, [*TWO, path])
    (tmp_path / path).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"deep/name\.png: expected a readable image"):
        loaded(tmp_path)


def test_ham10000_pictures_that_are_there_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"lesion_id": f"L{i}", "image_id": f"I{i}", "dx": "nv"} for i in range(5)]
    pd.DataFrame(rows).to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    write(tmp_path, {f"{part}/I{i}.png": 10 * i for part in ("part_1", "PART_1") for i in range(5)})
    config = DatasetConfig("ham10000", root=tmp_path, options={"size": 4})
    data = load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    assert len(data.train) + len(data.test) == 5
    assert "left out pictures that are there twice: 5 (part_1/I0.png, ...)" in caplog.text
    Image.fromarray(np.zeros((50, 50), np.uint8)).save(tmp_path / "part_1/I3.png")
    with pytest.raises(ConfigError, match=r"one picture of each name; PART_1/I3\.png and part_1/I3\.png differ"):
        load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)


def test_a_link_in_an_archive_is_named(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("train/ant/1.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr(info, "../bee/1.png")
    with pytest.raises(OSError, match="a link, which is not followed"):
        ZipTree(tmp_path / "data.zip", ["train"]).read("train/ant/1.png")
