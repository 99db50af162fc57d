"""FEMNIST: handwritten digits and letters, by writer."""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cutlayer.datasets.registry import RawDataset, RawSplit, ReadContext, register
from cutlayer.datasets.splitting import fixed_test
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.extras import install

CLASS_NAMES = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
FEMNIST_URL = "https://github.com/TalwalkarLab/leaf (data/femnist, preprocess.sh)"
HDF5 = (".h5", ".hdf5")
_PIXELS, _LABELS = ("pixels", "images", "x"), ("label", "labels", "y")  # as TensorFlow Federated and others name them


@dataclass(frozen=True)
class FemnistOptions:
    """How a test set is made where the files are not split already.

    Attributes:
        test_fraction: its share of the samples.
        test_by: sample takes the last of each writer's samples, group takes whole writers (LEAF's `-t sample`, `user`).
    """

    test_fraction: float = 0.1
    test_by: Literal["sample", "group"] = "sample"

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 1:
            raise ConfigError("test_fraction", self.test_fraction, "a number > 0 and < 1")


@dataclass(frozen=True)
class Samples:
    """Images uint8 [n, 1, 28, 28], labels int64 [n], names of writers, and the number of each sample's writer [n]."""

    images: np.ndarray
    labels: np.ndarray
    writers: list[str]
    writer: np.ndarray


@register("femnist", FemnistOptions)
def femnist(context: ReadContext) -> RawDataset:
    """FEMNIST (Caldas et al. 2018, LEAF): 28x28 grey, 62 classes, ink dark on white, with the writer of each sample.

    Reads, in root/femnist, root/FEMNIST or root itself, and `data/` in these, the first of these that is there:

    - LEAF's json as its preprocess.sh leaves it: `train/*.json` and `test/*.json`;
    - LEAF's json before its split: `all_data/*.json`;
    - HDF5 with a group for each writer (needs h5py): files with train and test in their names or in folders `train/`
      and `test/`, as TensorFlow Federated's `fed_emnist_train.h5`, or files without a split;
    - `processed/femnist_train.pt` and `femnist_test.pt`, as FSL-SAGE's code has them: (images, labels, writers);
    - `processed/training.pt` and `processed/test.pt`: (images, labels, number of samples of each writer, in order).

    A json file holds `users` and `user_data`: {user: {"x": 784 numbers in 0..1 for each image, "y": labels}}. In HDF5 a
    writer, in a group `examples` or at the top, has `pixels` (or `images`, `x`) [n, 28, 28], floats in 0..1 or bytes,
    and `label` (or `labels`, `y`) [n]; a file with these at its top is a writer of its name.
    """
    bases = [context.root / "femnist", context.root / "FEMNIST", context.root]
    for base in bases:
        for folder in (base / "data", base):
            for suffixes, read in (((".json",), _read_json), (HDF5, _read_hdf5)):
                found = [_gathered(files, read) for files in _files(folder, suffixes)]
                if found:
                    return _dataset(found, context.options)
        for names in (("femnist_train.pt", "femnist_test.pt"), ("training.pt", "test.pt")):
            files = [base / "processed" / name for name in names]
            if files[0].exists():
                return _dataset([_gathered([file], _read_pt) for file in files], context.options)
    expected = (
        f"LEAF's files, data/train/*.json and data/test/*.json, in {bases[0].absolute()}; make them with {FEMNIST_URL}"
    )
    raise ConfigError("dataset.root", context.root, expected)


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[list[Path]]:
    """The files of the training and of the test set; those of one set that is not divided; or nothing."""

    def inside(name: str) -> list[Path]:
        paths = sorted((folder / name).glob("*"))
        return [path for path in paths if path.suffix.lower() in suffixes and not path.name.startswith(".")]

    train, test, whole = inside("train"), inside("test"), inside("all_data")
    if suffixes == HDF5:
        beside = inside(".")
        train = train or [path for path in beside if "train" in path.stem.lower()]
        test = test or [path for path in beside if "test" in path.stem.lower()]
        whole = whole or [path for path in beside if path not in (*train, *test)]
    if train and test:
        return [train, test]
    if suffixes == HDF5 and (train or test):
        lacking = "test" if train else "train"
        raise ConfigError("dataset.root", folder, f"files of both sets; there is none with {lacking} in its name")
    return [whole] if whole else []


Writer = tuple[str, Any, Any]  # name, images, labels


def _gathered(files: list[Path], read: Callable[[Path], Iterable[Writer]]) -> Samples:
    """All samples of some files, those of a writer in the order in which they come."""
    images, labels, names = list[np.ndarray](), list[np.ndarray](), dict[str, int]()
    writer: list[np.ndarray] = []
    for file in files:
        try:
            for name, x, y in read(file):
                images.append(_bytes(x))
                labels.append(np.asarray(y).reshape(-1).astype(np.int64))
                if len(images[-1]) != len(labels[-1]) or not np.isin(labels[-1], np.arange(len(CLASS_NAMES))).all():
                    raise ValueError(f"writer {name} has no label of 0 to 61 for each image")
                writer.append(np.full(len(labels[-1]), names.setdefault(name, len(names))))
        except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError("dataset.root", file, f"FEMNIST as docs/datasets.md describes it ({error})") from error
    empty = [np.zeros((0, 1, 28, 28), np.uint8)], [np.zeros(0, np.int64)]
    return Samples(
        np.concatenate(images or empty[0]),
        np.concatenate(labels or empty[1]),
        list(names),
        np.concatenate(writer or empty[1]),
    )


def _bytes(values: Any) -> np.ndarray:
    """Images as uint8 [n, 1, 28, 28]; numbers that are no bytes are in 0..1, or in 0..255 if any is above 1."""
    pixels = np.asarray(values)
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
        pixels = np.round(pixels * (255 if pixels.max(initial=0) <= 1 else 1)).astype(np.uint8)
    return pixels.reshape(-1, 1, 28, 28)


def _read_json(file: Path) -> Iterator[Writer]:
    content = json.loads(file.read_text())
    for user in content["users"]:
        data = content["user_data"][user]
        yield str(user), data["x"], data["y"]


def _read_hdf5(file: Path) -> Iterator[Writer]:
    try:
        h5py: Any = import_module("h5py")
    except ImportError:
        raise ConfigError("dataset.root", file, f"h5py to read it: {install('hdf5')}") from None

    def of(group: Any, names: tuple[str, ...]) -> Any:
        return next((group[name][()] for name in names if isinstance(group.get(name), h5py.Dataset)), None)

    with h5py.File(file, "r") as content:
        groups = {file.stem: content} if of(content, _LABELS) is not None else content.get("examples", content)
        for name in groups:
            images, labels = of(groups[name], _PIXELS), of(groups[name], _LABELS)
            if images is None or labels is None:
                raise ValueError(f"{name} has no {' or '.join(_PIXELS)}, or no {' or '.join(_LABELS)}")
            yield name, images, labels


def _read_pt(file: Path) -> Iterator[Writer]:
    with torch.serialization.safe_globals(_ARRAYS):
        images, labels, writers = torch.load(file, map_location="cpu", weights_only=True)[:3]
    images, labels, writers = _bytes(images), np.asarray(labels), np.asarray(writers).reshape(-1)
    if len(writers) == len(labels) and (writers.dtype.kind not in "iu" or writers.sum() != len(labels)):
        # Each sample's writer: samples of one come together, in the order of their first ones.
        names, first, number = np.unique(writers, return_index=True, return_inverse=True)
        for place in np.argsort(first):
            own = number == place
            yield str(names[place]), images[own], labels[own]
        return
    ends = np.cumsum(writers)
    if ends[-1] != len(labels):
        raise ValueError(f"{ends[-1]} samples by its writers, {len(labels)} labels")
    for name, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        yield str(name), images[start:end], labels[start:end]


def _dataset(parts: list[Samples], options: FemnistOptions) -> RawDataset:
    """Training and test set; one writer has one number in both."""
    names = list(dict.fromkeys(name for part in parts for name in part.writers))
    number = {name: i for i, name in enumerate(names)}
    splits = [
        RawSplit(
            torch.from_numpy(part.images),
            torch.from_numpy(part.labels),
            np.array([number[name] for name in part.writers], dtype=np.int64)[part.writer],
        )
        for part in parts
    ]
    if len(splits) == 1:
        held = _held(parts[0], options)
        splits = [splits[0].subset(np.flatnonzero(~held)), splits[0].subset(np.flatnonzero(held))]
    return RawDataset(splits[0], splits[1], CLASS_NAMES)


def _held(samples: Samples, options: FemnistOptions) -> np.ndarray:
    if options.test_by == "group":
        return fixed_test(samples.labels, options.test_fraction, samples.writer)
    order = np.argsort(samples.writer, kind="stable")  # a writer's samples may come in several pieces
    sizes = np.bincount(samples.writer, minlength=len(samples.writers))
    within = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held = np.empty(len(order), dtype=bool)
    held[order] = within >= np.repeat(sizes - np.floor(sizes * options.test_fraction).astype(np.int64), sizes)
    return held


def _arrays() -> list[Any]:
    """What a pickled numpy array names, by the names that numpy 1 and 2 give it."""
    core = np._core.multiarray  # type: ignore[attr-defined]
    kinds = {type(np.dtype(kind)) for kind in ("u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "U1")}
    old = [(getattr(core, name), f"numpy.core.multiarray.{name}") for name in ("_reconstruct", "scalar")]
    return [np.ndarray, np.dtype, core._reconstruct, core.scalar, *old, *kinds]


_ARRAYS = _arrays()
