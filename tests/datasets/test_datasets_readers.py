"""Each reader on small files in the layout that users have."""

import io
import json
import pickle
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.transforms.v2 import functional as reference

from cutlayer.datasets import Dataset, DatasetConfig, load, names
from cutlayer.datasets.images import EncodedImages, Shape, decode_image
from cutlayer.datasets.trees import FolderTree
from cutlayer.runtime.ground.config import ConfigError
from tests.places import SHARED

CPU = torch.device("cpu")


def loaded(name: str, root: Path, **values: Any) -> Dataset:
    return load(DatasetConfig(name, root=root, normalize="none", **values), seed=0, device=CPU, dtype=torch.float32)


def images_of(data: Dataset, part: str = "train") -> np.ndarray:
    """All images of a part as uint8 [n, channels, height, width]."""
    source = getattr(data, part)
    x = torch.cat([x for x, _ in source.batches(torch.arange(len(source)), batch_size=7)])
    return (x * 255).round().to(torch.uint8).numpy()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def picture(path: Path, height: int = 8, width: int = 8, mode: str = "RGB", seed: int = 0) -> np.ndarray:
    """Write an image of noise; returns the pixels written (before a lossy format)."""
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return values


def test_all_datasets_are_registered() -> None:
    assert set(names()) == {
        "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "femnist", "ham10000", "tinyimagenet",
        "imagenet", "image_folder", "synthetic", "shakespeare", "e2e", "jsonl",
        "digit_facts",
    }  # fmt: skip


def write_idx(folder: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    head = np.array([2051, *images.shape], dtype=">i4").tobytes()
    (folder / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(
        np.array([2049, len(labels)], dtype=">i4").tobytes() + labels.astype(np.uint8).tobytes()
    )


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_layout(tmp_path: Path, name: str, folder: str) -> None:
    images = noise(12, 28, 28)
    for split, part in (("train", slice(0, 9)), ("t10k", slice(9, 12))):
        write_idx(tmp_path / folder / "raw", split, images[part], np.arange(12)[part] % 10)
    data = loaded(name, tmp_path)
    assert data.info.shape == (1, 28, 28)
    assert data.info.classes == 10
    assert np.array_equal(images_of(data)[:, 0], images[:9])
    assert np.array_equal(images_of(data, "test")[:, 0], images[9:])
    assert data.test.labels.tolist() == [9, 0, 1]


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (IMAGES, b""),
        (IMAGES, b"<html>not found</html>"),
        (IMAGES, np.array([2051, 9, 28, 28], dtype=">i4").tobytes() + bytes(100)),
        (IMAGES, np.array([2051, 9, 14, 28], dtype=">i4").tobytes() + bytes(9 * 14 * 28)),
        (IMAGES, np.array([2049, 9], dtype=">i4").tobytes() + bytes(9)),
        (LABELS, np.array([2049, 5], dtype=">i4").tobytes() + bytes(5)),
        (LABELS, np.array([2049, 9], dtype=">i4").tobytes() + bytes(8) + b"\x0a"),
    ],
    ids=["empty", "page", "cut", "size", "kind", "count", "class"],
)
def test_broken_mnist_files_are_one_line(tmp_path: Path, file: str, content: bytes) -> None:
    folder = tmp_path / "MNIST" / "raw"
    for split in ("train", "t10k"):
        write_idx(folder, split, noise(9, 28, 28), np.arange(9))
    (folder / file).write_bytes(content)
    with pytest.raises(ConfigError, match="expected files of mnist that can be read in .*raw") as caught:
        loaded("mnist", tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_layout(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The small files cannot have the checksums of the published ones.
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, *_: Path(path).exists())
    images = noise(14, 3, 32, 32)
    fine = name == "cifar100"
    folder = tmp_path / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir()
    key = "fine_labels" if fine else "labels"
    parts = {"train": slice(0, 10)} if fine else {f"data_batch_{i + 1}": slice(2 * i, 2 * i + 2) for i in range(5)}
    parts["test" if fine else "test_batch"] = slice(10, 14)
    for file, part in parts.items():
        content = {"data": images[part].reshape(-1, 3072), key: list(range(14))[part]}
        (folder / file).write_bytes(pickle.dumps(content))
    classes = [f"class {i}" for i in range(100 if fine else 10)]
    meta = {"fine_label_names" if fine else "label_names": classes}
    (folder / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(meta))
    data = loaded(name, tmp_path)
    assert data.info.class_names == tuple(classes)
    assert np.array_equal(images_of(data), images[:10])
    assert np.array_equal(images_of(data, "test"), images[10:])
    assert data.train.labels.tolist() == list(range(10))


@pytest.mark.parametrize("inside", ["svhn", "."])
def test_svhn_layout(tmp_path: Path, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda path, *_: Path(path).exists())
    images = noise(5, 3, 32, 32)
    (tmp_path / inside).mkdir(exist_ok=True)
    for split in ("train", "test"):
        content = {"X": images.transpose(2, 3, 1, 0), "y": np.array([[1], [2], [10], [9], [10]])}
        scipy.io.savemat(tmp_path / inside / f"{split}_32x32.mat", content)
    data = loaded("svhn", tmp_path)
    assert np.array_equal(images_of(data), images)
    assert data.train.labels.tolist() == [1, 2, 0, 9, 0]  # the file's 10 is the digit 0


@pytest.mark.parametrize(
    ("name", "url", "folder"),
    [
        ("mnist", "train-images-idx3-ubyte.gz", "MNIST/raw"),
        ("cifar10", "cifar-10-python.tar.gz", "cifar-10-batches-py"),
        ("svhn", "train_32x32.mat", "svhn"),
    ],
)
def test_failed_download_says_what_and_where_and_leaves_nothing(
    tmp_path: Path, name: str, url: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(ConfigError) as caught:
        loaded(name, tmp_path / "data")
    text = str(caught.value)
    assert text.startswith("dataset.root=")
    assert url in text
    assert str(tmp_path / "data" / folder) in text
    assert list(tmp_path.iterdir()) == []
    assert "\n" not in text


def test_digits_are_scikit_learn_s() -> None:
    data = loaded("digits", Path("unused"))
    assert data.info.shape == (1, 8, 8)
    assert (len(data.train), len(data.test)) == (1437, 360)
    expected = load_digits()
    parts = train_test_split(np.arange(1797), test_size=0.2, random_state=0, stratify=expected.target)
    for name, part in zip(("train", "test"), map(np.sort, parts), strict=True):
        assert np.array_equal(np.round(images_of(data, name)[:, 0] / 255 * 16), expected.images[part])
        assert np.array_equal(getattr(data, name).labels, expected.target[part])
    share = torch.bincount(data.test.labels) / torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    assert share == pytest.approx(np.full(10, 0.2), abs=0.01)


def test_synthetic_follows_seed_and_sizes() -> None:
    options = {"n_train": 50, "n_test": 20, "channels": 2, "height": 5, "width": 9, "classes": 7, "groups": 3}
    config = DatasetConfig("synthetic", options=options)
    first, again, other = (load(config, seed=s, device=CPU, dtype=torch.float32) for s in (0, 0, 1))
    assert (first.info.shape, first.info.classes, len(first.train), len(first.test)) == ((2, 5, 9), 7, 50, 20)
    assert first.groups is not None
    assert set(first.groups) == {0, 1, 2}
    assert np.array_equal(images_of(first), images_of(again))
    assert not np.array_equal(images_of(first), images_of(other))
    assert np.ptp(np.bincount(first.train.labels)) <= 1


def leaf(file: Path, users: dict[str, tuple[np.ndarray, list[int]]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {user: {"x": (x.reshape(len(x), 784) / 255).tolist(), "y": y} for user, (x, y) in users.items()}
    content = {"users": list(users), "num_samples": [len(y) for _, y in users.values()], "user_data": data}
    file.write_text(json.dumps(content))


def test_femnist_leaf_split_files(tmp_path: Path) -> None:
    x = noise(6, 28, 28)
    folder = tmp_path / "femnist" / "data"
    leaf(folder / "train" / "all_data_0_train.json", {"f1": (x[:2], [0, 61]), "f2": (x[2:3], [5])})
    leaf(folder / "train" / "all_data_1_train.json", {"f3": (x[3:5], [7, 7])})
    leaf(folder / "test" / "all_data_0_test.json", {"f1": (x[5:], [3])})
    data = loaded("femnist", tmp_path)
    assert data.info.classes == 62
    assert data.info.class_names[61] == "z"
    assert np.array_equal(images_of(data)[:, 0], x[:5])
    assert data.train.labels.tolist() == [0, 61, 5, 7, 7]
    assert data.groups is not None
    assert data.groups.tolist() == [0, 0, 1, 2, 2]
    assert data.test.labels.tolist() == [3]


def test_femnist_leaf_before_its_split(tmp_path: Path) -> None:
    x = noise(30, 28, 28)
    users = {"a": (x[:20], list(range(20))), "b": (x[20:], list(range(30, 40)))}
    leaf(tmp_path / "all_data" / "all_data_0.json", users)
    data = loaded("femnist", tmp_path, options={"test_fraction": 0.2})
    assert data.test.labels.tolist() == [16, 17, 18, 19, 38, 39]
    assert data.groups is not None
    assert np.bincount(data.groups).tolist() == [16, 8]


@pytest.mark.parametrize("floats", [True, False])
def test_femnist_tensors(tmp_path: Path, floats: bool) -> None:
    x = torch.from_numpy(noise(5, 28, 28))
    folder = tmp_path / "FEMNIST" / "processed"
    folder.mkdir(parents=True)
    for part in ("training", "test"):
        torch.save((x / 255 if floats else x, torch.tensor([1, 2, 3, 4, 60]), [3, 2]), folder / f"{part}.pt")
    data = loaded("femnist", tmp_path)
    assert np.array_equal(images_of(data)[:, 0], x.numpy())
    assert data.groups is not None
    assert data.groups.tolist() == [0, 0, 0, 1, 1]


def test_ham10000(tmp_path: Path) -> None:
    rows = []
    for i in range(60):
        part = tmp_path / "ham10000" / f"HAM10000_images_part_{1 + i % 2}"
        picture(part / f"ISIC_{i:07}.jpg", 30, 40, seed=i)
        rows.append({"lesion_id": f"HAM_{i // 2}", "image_id": f"ISIC_{i:07}", "dx": "nv" if i < 40 else "mel"})
    pd.DataFrame(rows).to_csv(tmp_path / "ham10000" / "HAM10000_metadata.csv", index=False)
    data = loaded("ham10000", tmp_path, options={"size": 16})
    assert data.info.shape == (3, 16, 16)
    assert data.info.class_names == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    assert torch.bincount(data.train.labels, minlength=7).tolist() == [0, 0, 0, 0, 16, 32, 0]
    assert torch.bincount(data.test.labels, minlength=7).tolist() == [0, 0, 0, 0, 4, 8, 0]
    # Both pictures of a lesion are on one side: each training image's twin, its neighbour in the list, is there too.
    train = {images.tobytes() for images in images_of(data)}
    folder = tmp_path / "ham10000"
    for lesion in range(30):
        files = [
            folder / f"HAM10000_images_part_{1 + i % 2}" / f"ISIC_{i:07}.jpg" for i in (2 * lesion, 2 * lesion + 1)
        ]
        there = [decode_image(file.read_bytes(), Shape(3, (16, 16))).tobytes() in train for file in files]
        assert there[0] == there[1]


def test_ham10000_missing_image(tmp_path: Path) -> None:
    table = pd.DataFrame([{"lesion_id": "a", "image_id": "ISIC_1", "dx": "nv"}])
    table.to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    with pytest.raises(ConfigError, match=r"1 are missing, the first is ISIC_1\.jpg"):
        loaded("ham10000", tmp_path)


def test_tinyimagenet(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    root.mkdir()
    (root / "wnids.txt").write_text("n2\nn1\n")
    (root / "words.txt").write_text("n1\tcat, house cat\nn2\tdog\nn3\tbird\n")
    for i, wnid in enumerate(("n1", "n1", "n2")):
        picture(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 64, 64, "L" if i == 0 else "RGB", seed=i)
    lines = []
    for i, wnid in enumerate(("n2", "n1")):
        picture(root / "val" / "images" / f"val_{i}.JPEG", 64, 64, seed=10 + i)
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    data = loaded("tinyimagenet", tmp_path)
    assert data.info.shape == (3, 64, 64)
    assert data.info.class_names == ("dog", "cat")
    assert data.train.labels.tolist() == [1, 1, 0]
    assert data.test.labels.tolist() == [0, 1]
    grey = images_of(data)[0]
    assert np.array_equal(grey[0], grey[2])


def folder_of_classes(root: Path, parts: dict[str, int], **values: Any) -> dict[str, np.ndarray]:
    """`parts` holds the number of images a class; returns each part's images, in order of path."""
    made: dict[str, list[np.ndarray]] = {part: [] for part in parts}
    for part, count in parts.items():
        for c in ("ant", "bee"):
            for i in range(count):
                made[part].append(
                    picture(root / part / c / "deep" / f"{i}.png", seed=hash((part, c, i)) % 1000, **values)
                )
    return {part: np.stack(images).transpose(0, 3, 1, 2) for part, images in made.items()}


@pytest.mark.parametrize("storage", ["auto", "stream"])
@pytest.mark.parametrize("kind", ["folder", "zip", "nested zip"])
def test_image_folder(tmp_path: Path, kind: str, storage: Any) -> None:
    made = folder_of_classes(tmp_path / "data", {"train": 5, "test": 2})
    (tmp_path / "data" / "train" / "ant" / "notes.txt").write_text("not an image")
    root = tmp_path / "data"
    if kind != "folder":
        root = tmp_path / "data.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for file in (tmp_path / "data").rglob("*.*"):
                archive.write(file, file.relative_to(tmp_path / "data" if kind == "zip" else tmp_path))
    data = loaded("image_folder", root, storage=storage)
    assert data.info.class_names == ("ant", "bee")
    assert np.array_equal(images_of(data), made["train"])
    assert np.array_equal(images_of(data, "test"), made["test"])
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5


def test_image_folder_without_test_folder(tmp_path: Path) -> None:
    folder_of_classes(tmp_path, {".": 10})
    data = loaded("image_folder", tmp_path, options={"train": ".", "test": None, "test_fraction": 0.3})
    assert torch.bincount(data.train.labels).tolist() == [7, 7]
    assert torch.bincount(data.test.labels).tolist() == [3, 3]
    assert data.info.class_names == ("ant", "bee")


def test_image_folder_streams_with_validation(tmp_path: Path) -> None:
    folder_of_classes(tmp_path, {"train": 10, "test": 2})
    streamed, resident = (loaded("image_folder", tmp_path, storage=s, validation=0.2) for s in ("stream", "device"))
    for part in ("train", "validation", "test"):
        assert np.array_equal(images_of(streamed, part), images_of(resident, part))
    assert len(resident.train) == 16


@pytest.mark.parametrize(("height", "width"), [(20, 31), (47, 16), (10, 10)])
def test_resizing_is_torchvision_s(height: int, width: int) -> None:
    with io.BytesIO() as file:
        Image.fromarray(noise(height, width, 3)).save(file, "PNG")
        content = file.getvalue()
    image = Image.open(io.BytesIO(content))
    expected = reference.center_crop(reference.resize(image, [14]), [12])
    assert np.array_equal(decode_image(content, Shape(3, (12, 12), 14)), np.asarray(expected).transpose(2, 0, 1))


def test_imagenet_defaults(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for wnid in ("n01", "n02"):
            picture(tmp_path / "imagenet" / part / wnid / "x.JPEG", 260, 300)
    data = load(DatasetConfig("imagenet", root=tmp_path), seed=0, device=CPU, dtype=torch.float32)
    assert data.info.shape == (3, 224, 224)
    assert data.info.classes == 2
    assert data.train.mean == (0.485, 0.456, 0.406)


def test_images_of_several_sizes_are_explained(tmp_path: Path) -> None:
    folder_of_classes(tmp_path, {"train": 2, "test": 1})
    picture(tmp_path / "train" / "bee" / "wide.png", 8, 9)
    with pytest.raises(ConfigError, match=r"dataset\.options\.size=null: .*train/bee/wide\.png has 8x9 .* 8x8"):
        loaded("image_folder", tmp_path)
    assert loaded("image_folder", tmp_path, options={"size": 6}).info.shape == (3, 6, 6)


def test_broken_image_is_named(tmp_path: Path) -> None:
    folder_of_classes(tmp_path, {"train": 2, "test": 1})
    (tmp_path / "train" / "ant" / "z.jpg").write_bytes(b"\xff\xd8\xffnothing")
    with pytest.raises(ConfigError, match=r"train/ant/z\.jpg: expected a readable image"):
        loaded("image_folder", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("image_folder", r"dataset\.root=.*nowhere: expected an existing folder or zip file"),
        ("imagenet", r"dataset\.root=.*imagenet: expected an existing folder"),
        ("tinyimagenet", r"tiny-imagenet-200 to exist; unpack http"),
        ("ham10000", r"HAM10000_metadata\.csv and images in .*ham10000"),
        ("femnist", r"data/train/\*\.json.*leaf"),
    ],
)
def test_missing_folder_is_explained(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(name, tmp_path / "nowhere")


def test_unknown_class_in_the_test_folder(tmp_path: Path) -> None:
    folder_of_classes(tmp_path, {"train": 1, "test": 1})
    picture(tmp_path / "test" / "wasp" / "a.png")
    with pytest.raises(ConfigError, match="found wasp"):
        loaded("image_folder", tmp_path)


def test_encoded_images_decode_in_threads_as_alone(tmp_path: Path) -> None:
    made = folder_of_classes(tmp_path, {"train": 80})["train"]
    tree = FolderTree(tmp_path)
    images = EncodedImages(tree, tree.paths(), Shape())
    order = np.argsort([int(path.split("/")[-1].removesuffix(".png")) + 100 * ("bee" in path) for path in tree.paths()])
    for workers in (0, 3):
        assert np.array_equal(images.decode_all(workers).numpy()[order], made)


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="the shared MNIST files are not beside this checkout")
def test_real_mnist() -> None:
    data = load(DatasetConfig("mnist", root=SHARED / "mnist"), seed=0, device=CPU, dtype=torch.float32)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert torch.bincount(data.train.labels)[:3].tolist() == [5923, 6742, 5958]
    sample = torch.cat([x for x, _ in data.train.batches(torch.arange(0, 60_000, 10), batch_size=1000)])
    assert float(sample.mean()) == pytest.approx(0, abs=0.05)
    assert float(sample.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.skipif(
    not (SHARED / "cifar10_jpeg.zip").is_file(), reason="the shared CIFAR-10 zip is not beside this checkout"
)
def test_real_cifar10_zip() -> None:
    data = loaded("image_folder", SHARED / "cifar10_jpeg.zip", storage="stream", workers=2)
    assert (data.info.shape, data.info.classes) == ((3, 32, 32), 10)
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    x, y = next(data.train.batches(torch.arange(0, 50_000, 500), batch_size=100))
    assert x.shape == (100, 3, 32, 32)
    assert y.tolist() == [c for c in range(10) for _ in range(10)]
