"""Datasets that need no files: scikit-learn's digits, and images made from the seed."""

import base64
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from cutlayer.datasets.registry import RawDataset, RawSplit, ReadContext, register
from cutlayer.datasets.seeding import derived
from cutlayer.runtime.ground.config import ConfigError

# A bit for each of the digits: whether it is one to test on. So scikit-learn's `train_test_split(np.arange(1797),
# test_size=0.2, random_state=0, stratify=labels)` draws them; importing it takes a second, and it may change.
_TEST_DIGITS = (
    "AAAEiDUkEEAABkEAk0IFABoACAEAJAAoBiwSABAAlAoAkBkSBCD4oAKBEKAACAqIIEQVJElCQKAKAAAAQATYAACBgCAASAXEABBA"
    "CKAQAAVASAAwEAACDsQJAAIkhACDqAE8IKaYCgAAAAsIQAgEoBhIAgJAQcEAgARARoQ3aoECFgBEgABAQqCkGApQAIQLhWHGCBCA"
    "CABMgMAgBAaOAAEIggCBADgIA8AIGQAAEA4BAIQQoCEAMygpBMBEwIBoDgECgwCCAIgipkAsJAQhCKhggJCBoAwCggJCEgE4pBUA"
)


@register("digits")
def digits(_: ReadContext) -> RawDataset:
    """The 1,797 handwritten digits that come with scikit-learn: 8x8 grey, 17 grey levels spread over 0..255.

    The split is fixed whatever the run's seed: 80% to train on, 20% to test, equal in each class.
    """
    rows = _digits()
    images = np.round(rows[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    whole = RawSplit(torch.from_numpy(images), torch.from_numpy(rows[:, -1].astype(np.int64)))
    is_test = np.unpackbits(np.frombuffer(base64.b64decode(_TEST_DIGITS), np.uint8), count=len(rows)).astype(bool)
    return RawDataset(
        whole.subset(np.flatnonzero(~is_test)), whole.subset(np.flatnonzero(is_test)), tuple("0123456789")
    )


@cache
def _digits() -> np.ndarray:
    """Grey levels 0..16 of 64 pixels and the label [1797, 65], from scikit-learn's file where it is as we know it."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    return np.column_stack([data, labels])


@dataclass(frozen=True)
class SyntheticOptions:
    """Sizes of the synthetic dataset; `groups` natural groups (0: none); `noise` is its share of a pixel, 0..1."""

    n_train: int = 1000
    n_test: int = 200
    channels: int = 1
    height: int = 28
    width: int = 28
    classes: int = 10
    noise: float = 0.5
    groups: int = 0

    def __post_init__(self) -> None:
        for name in ("n_train", "n_test", "channels", "height", "width", "classes"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "an integer >= 1")
        if not 0 <= self.noise <= 1:
            raise ConfigError("noise", self.noise, "a number from 0 to 1")
        if self.groups < 0:
            raise ConfigError("groups", self.groups, "an integer >= 0")

    @property
    def bytes(self) -> int:
        """What the images take in memory, with a picture for each class and the labels."""
        images = self.n_train + self.n_test + self.classes
        return images * (self.channels * self.height * self.width + 8)


@register("synthetic", SyntheticOptions)
def synthetic(context: ReadContext) -> RawDataset:
    """A random picture for each class with noise over it, all from the run's seed; classes equally frequent."""
    options: SyntheticOptions = context.options
    rng = derived(context.seed, "synthetic")
    shape = (options.channels, options.height, options.width)
    pictures = rng.integers(0, 256, (options.classes, *shape), dtype=np.uint8)
    names = tuple(str(c) for c in range(options.classes))
    train, test = (_make(n, pictures, options, rng) for n in (options.n_train, options.n_test))
    return RawDataset(train, test, names)


def _make(n: int, pictures: np.ndarray, options: SyntheticOptions, rng: np.random.Generator) -> RawSplit:
    labels = rng.permutation(np.arange(n) % options.classes)
    images = np.empty((n, *pictures.shape[1:]), dtype=np.uint8)
    # Integers, and a block at a time: a large set is made about as fast as random bytes come, with little extra memory.
    noise = round(256 * options.noise)
    for start in range(0, n, 4096):
        rows = labels[start : start + 4096]
        random = rng.integers(0, 256, (len(rows), *pictures.shape[1:]), dtype=np.uint8).astype(np.uint16)
        images[start : start + 4096] = (pictures[rows] * np.uint16(256 - noise) + random * np.uint16(noise)) >> 8
    groups = rng.integers(0, options.groups, n) if options.groups else None
    return RawSplit(torch.from_numpy(images), torch.from_numpy(labels), groups)
