"""FEMNIST by writer in the forms that others keep it in, and its two ways to a test set."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cutlayer.datasets import Dataset, DatasetConfig, load
from cutlayer.runtime.ground.config import ConfigError

h5py: Any = pytest.importorskip("h5py", reason="h5py is not installed")
Writers = dict[str, tuple[np.ndarray, np.ndarray]]


def loaded(root: Path, **options: Any) -> Dataset:
    config = DatasetConfig("femnist", root=root, normalize="none", options=options)
    return load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)


def writers(sizes: dict[str, int], seed: int) -> Writers:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(0, 256, (size, 28, 28), dtype=np.uint8), rng.integers(0, 62, size))
        for name, size in sizes.items()
    }


TRAIN, TEST = {"f0001_41": 7, "f0000_14": 5, "f0009_00": 3}, {"f0000_14": 4, "f0001_41": 2, "f0777_77": 1}


def found(data: Dataset, part: str) -> dict[int, list[tuple[bytes, int]]]:
    """By group: the pixels and labels, sorted."""
    source = getattr(data, part)
    assert source.groups is not None
    x = torch.cat([x for x, _ in source.batches(torch.arange(len(source)), batch_size=9)])
    read: dict[int, list[tuple[bytes, int]]] = {}
    pixels = (x * 255).round().byte().numpy()
    for image, label, group in zip(pixels, source.labels.tolist(), source.groups, strict=True):
        read.setdefault(int(group), []).append((image.tobytes(), label))
    return {group: sorted(samples) for group, samples in read.items()}


def expected(content: Writers) -> dict[str, list[tuple[bytes, int]]]:
    return {name: sorted((x.tobytes(), int(y)) for x, y in zip(*both, strict=True)) for name, both in content.items()}


def check(data: Dataset, train: Writers, test: Writers) -> None:
    """Each writer's samples are together, and it has one number in both sets."""
    wanted, wanted_test = expected(train), expected(test)
    read, read_test = found(data, "train"), found(data, "test")
    name_of = {group: next(n for n in wanted if wanted[n] == samples) for group, samples in read.items()}
    assert sorted(name_of.values()) == sorted(wanted)
    for group, samples in read_test.items():
        name = next(n for n in wanted_test if wanted_test[n] == samples)
        assert name_of.get(group, "new") == (name if name in train else "new")
    assert len(read_test) == len(wanted_test)


def federated(file: Path, content: Writers) -> None:
    """As TensorFlow Federated keeps its EMNIST: examples/<writer>/pixels, label."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as out:
        for name, (x, y) in content.items():
            out[f"examples/{name}/pixels"] = (x / 255).astype(np.float32)
            out[f"examples/{name}/label"] = y.astype(np.int32)
            out[f"examples/{name}/id"] = np.array([b"x"] * len(y))


def flat(file: Path, content: Writers) -> None:
    """<writer>/images, labels, in bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as out:
        for name, (x, y) in content.items():
            out[f"{name}/images"], out[f"{name}/labels"] = x, y.astype(np.uint8)


def a_file_each(folder: Path, content: Writers) -> None:
    folder.mkdir(parents=True)
    for name, (x, y) in content.items():
        with h5py.File(folder / f"{name}.hdf5", "w") as out:
            out["x"], out["y"] = (x / 255).reshape(len(x), 784), y


def samples_and_writers(file: Path, content: Writers, kind: str) -> None:
    """As FSL-SAGE's code keeps it: (images, labels, each sample's writer), of numpy arrays, lists or tensors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    x = np.concatenate([x for x, _ in content.values()]) / np.float32(255)
    y = np.concatenate([y for _, y in content.values()])
    who = [name for name, (_, y) in content.items() for _ in y]
    order = np.random.default_rng(5).permutation(len(y))
    x, y, who = x[order].reshape(-1, 784), y[order], [who[i] for i in order]
    of: Any = {
        "arrays": (x, y, np.array(who)),
        "lists": (x.tolist(), y.tolist(), who),
        "tensors": (torch.from_numpy(x), torch.from_numpy(y), who),
    }
    torch.save(of[kind], file)


@pytest.mark.parametrize("folder", ["femnist", "FEMNIST/data", "."])
def test_hdf5_of_tensorflow_federated(tmp_path: Path, folder: str) -> None:
    train, test = writers(TRAIN, 0), writers(TEST, 1)
    federated(tmp_path / folder / "fed_emnist_train.h5", train)
    federated(tmp_path / folder / "fed_emnist_test.h5", test)
    check(loaded(tmp_path), train, test)


def test_hdf5_with_a_group_or_a_file_for_each_writer(tmp_path: Path) -> None:
    train, test = writers(TRAIN, 0), writers(TEST, 1)
    flat(tmp_path / "one" / "train" / "writers.hdf5", train)
    flat(tmp_path / "one" / "test" / "writers.hdf5", test)
    check(loaded(tmp_path / "one"), train, test)
    a_file_each(tmp_path / "many" / "train", train)
    a_file_each(tmp_path / "many" / "test", test)
    check(loaded(tmp_path / "many"), train, test)


@pytest.mark.parametrize("kind", ["arrays", "lists", "tensors"])
def test_tensors_of_fsl_sage(tmp_path: Path, kind: str) -> None:
    train, test = writers(TRAIN, 0), writers(TEST, 1)
    samples_and_writers(tmp_path / "FEMNIST" / "processed" / "femnist_train.pt", train, kind)
    samples_and_writers(tmp_path / "FEMNIST" / "processed" / "femnist_test.pt", test, kind)
    check(loaded(tmp_path), train, test)


def test_json_names_writers_and_not_places(tmp_path: Path) -> None:
    """The test files have fewer writers, in another order: a writer keeps its number all the same."""
    train, test = writers(TRAIN, 0), writers(TEST, 1)
    for part, content in (("train", train), ("test", test)):
        data = {name: {"x": (x.reshape(-1, 784) / 255).tolist(), "y": y.tolist()} for name, (x, y) in content.items()}
        (tmp_path / part).mkdir()
        (tmp_path / part / "all.json").write_text(json.dumps({"users": list(content), "user_data": data}))
    check(loaded(tmp_path), train, test)


@pytest.mark.parametrize("by", ["sample", "group"])
def test_hdf5_that_is_not_divided(tmp_path: Path, by: str) -> None:
    content = writers({f"w{i}": 10 for i in range(20)}, 0)
    flat(tmp_path / "femnist.hdf5", content)
    data = loaded(tmp_path, test_fraction=0.2, test_by=by)
    assert data.groups is not None
    assert data.test.groups is not None
    assert (len(data.train), len(data.test)) == (160, 40)
    shared = {*data.groups.tolist()} & {*data.test.groups.tolist()}
    assert len(shared) == (20 if by == "sample" else 0)


def test_what_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reported(root: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            loaded(root)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    federated(tmp_path / "half" / "fed_emnist_train.h5", writers(TRAIN, 0))
    assert "there is none with test in its name" in reported(tmp_path / "half")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "femnist.h5").write_bytes(b"\x89HDF")
    assert "femnist.h5: expected FEMNIST as docs/datasets.md describes it" in reported(tmp_path / "torn")
    (tmp_path / "cut" / "all_data").mkdir(parents=True)
    (tmp_path / "cut" / "all_data" / "a.json").write_text('{"users": ["a"]')
    assert "a.json: expected FEMNIST" in reported(tmp_path / "cut")
    (tmp_path / "labels").mkdir()
    flat(tmp_path / "labels" / "a.h5", {"w": (np.zeros((2, 28, 28), np.uint8), np.array([0, 62]))})
    assert "writer w has no label of 0 to 61" in reported(tmp_path / "labels")
    flat(tmp_path / "whole" / "a.h5", writers(TRAIN, 0))
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    assert 'h5py to read it: pip install -e ".[hdf5]"' in reported(tmp_path / "whole")
