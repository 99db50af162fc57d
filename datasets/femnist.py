"""FEMNIST: handwritten digits and letters, by writer."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datasets.registry import RawDataset, RawSplit, ReadContext, register
from runtime.config import ConfigError

CLASS_NAMES = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
URL = "https://github.com/TalwalkarLab/leaf (data/femnist, preprocess.sh)"


@dataclass(frozen=True)
class FemnistOptions:
    """`test_fraction`: share of each writer's samples that is the test set, where the files are not split already."""

    test_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 1:
            raise ConfigError("test_fraction", self.test_fraction, "a number > 0 and < 1")


@register("femnist", FemnistOptions)
def femnist(context: ReadContext) -> RawDataset:
    """FEMNIST (Caldas et al. 2018, LEAF): 28x28 grey, 62 classes, ink dark on white, with the writer of each sample.

    Reads, in root/femnist, root/FEMNIST or root itself, the first of these that is there:

    - LEAF's json as its preprocess.sh leaves it: `data/train/*.json` and `data/test/*.json` (also without `data/`);
    - LEAF's json before its split: `data/all_data/*.json` or `all_data/*.json`; the last `test_fraction` of each
      writer's samples is then the test set;
    - `processed/training.pt` and `processed/test.pt`, tuples (images, labels, samples of each writer in turn).

    A json file holds `users` and `user_data`: {user: {"x": 784 numbers in 0..1 for each image, "y": labels}}.
    """
    bases = [context.root / "femnist", context.root / "FEMNIST", context.root]
    for base in bases:
        for folder in (base / "data", base):
            if list(folder.glob("train/*.json")) and list(folder.glob("test/*.json")):
                return _pair(_read_leaf(folder / "train"), _read_leaf(folder / "test"))
            if list(folder.glob("all_data/*.json")):
                return _divide(*_read_leaf(folder / "all_data"), context.options.test_fraction)
        if (base / "processed" / "training.pt").exists():
            return _pair(*(_read_pt(base / "processed" / f"{part}.pt") for part in ("training", "test")))
    expected = f"LEAF's files, data/train/*.json and data/test/*.json, in {bases[0].absolute()}; make them with {URL}"
    raise ConfigError("dataset.root", context.root, expected)


Samples = tuple[np.ndarray, np.ndarray, list[str], np.ndarray]  # images, labels, writers' names, writer of each sample


def _read_leaf(folder: Path) -> Samples:
    images, labels, writers, counts = [], [], [], []
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        for user in content["users"]:
            data = content["user_data"][user]
            values = np.asarray(data["x"], dtype=np.float32).reshape(-1, 1, 28, 28)
            images.append(np.round(values * 255).astype(np.uint8))
            labels.append(np.asarray(data["y"], dtype=np.int64))
            writers.append(str(user))
            counts.append(len(labels[-1]))
    return np.concatenate(images), np.concatenate(labels), writers, np.repeat(np.arange(len(writers)), counts)


def _read_pt(file: Path) -> Samples:
    try:
        images, labels, counts = torch.load(file, map_location="cpu", weights_only=True)[:3]
    except (RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError("dataset.root", file, "a tuple of images, labels and samples of each writer") from error
    pixels = torch.as_tensor(images).reshape(-1, 1, 28, 28)
    if pixels.is_floating_point():
        pixels = (pixels * 255).round().to(torch.uint8)
    counts = np.asarray(counts, dtype=np.int64)
    writers = [str(i) for i in range(len(counts))]
    return pixels.numpy(), np.asarray(labels, dtype=np.int64), writers, np.repeat(np.arange(len(counts)), counts)


def _pair(train: Samples, test: Samples) -> RawDataset:
    return RawDataset(_split(train), _split(test), CLASS_NAMES)


def _split(samples: Samples, chosen: np.ndarray | None = None) -> RawSplit:
    images, labels, _, writer = samples
    chosen = np.arange(len(labels)) if chosen is None else chosen
    return RawSplit(torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen]), writer[chosen])


def _divide(images: np.ndarray, labels: np.ndarray, writers: list[str], writer: np.ndarray, share: float) -> RawDataset:
    sizes = np.bincount(writer, minlength=len(writers))
    within = np.arange(len(writer)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held = within >= np.repeat(sizes - np.floor(sizes * share).astype(np.int64), sizes)
    samples = (images, labels, writers, writer)
    return RawDataset(_split(samples, np.flatnonzero(~held)), _split(samples, np.flatnonzero(held)), CLASS_NAMES)
