"""The datasets that torchvision reads and downloads: MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100, SVHN."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST

from cutlayer.datasets.registry import RawDataset, RawSplit, ReadContext, register
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.folders import nothing_left

DIGIT_NAMES = tuple("0123456789")


def fetch(make: Callable[[bool], Any], context: ReadContext, name: str, urls: Sequence[str], folder: Path) -> Any:
    """Open a torchvision dataset, downloading it only if its files are not there and the context allows it.

    Args:
        make: opens it; its argument says whether to download.
        urls: what the download tries; folder: where the files belong. Both are for the message.

    Raises:
        ConfigError: the files are not there and cannot be, or may not be, downloaded, or are there and cannot be read.
    """
    root = context.root
    try:
        return make(False)
    except FileNotFoundError:
        pass
    except (
        Exception
    ) as error:  # of torchvision's readers and torch's, on files that are cut, or not what they should be
        if not (isinstance(error, RuntimeError) and "not found" in str(error)):
            raise _broken(root, name, folder, str(error) or type(error).__name__) from error
    if not context.download:
        named = shlex.quote(f"dataset.root={root}")
        expected = f"the files of {name} in {folder.absolute()}; to download them there, add: {named}"
        raise ConfigError("dataset.root", root, expected)
    try:
        with nothing_left(folder):
            return make(True)
    except (RuntimeError, OSError) as error:
        tried = " or ".join(urls)
        expected = f"the files of {name}; downloading {tried} failed ({error}); put them into {folder.absolute()}"
        raise ConfigError("dataset.root", root, expected) from error


def _broken(root: Path, name: str, folder: Path, reason: str) -> ConfigError:
    expected = f"files of {name} that can be read in {folder.absolute()} ({reason}); without them they are downloaded"
    return ConfigError("dataset.root", root, expected)


def _mnist_like(cls: type[MNIST], name: str, context: ReadContext) -> tuple[RawSplit, RawSplit]:
    root = context.root
    urls = [mirror + cls.resources[0][0] for mirror in cls.mirrors]
    splits = []
    for train in (True, False):
        found = fetch(
            lambda download, train=train: cls(str(root), train=train, download=download),
            context, name, urls, root / cls.__name__ / "raw",
        )  # fmt: skip
        images, labels = found.data[:, None].contiguous(), found.targets.long()
        # torchvision checks the sums of what it downloads only.
        fit = images.shape[1:] == (1, 28, 28) and len(images) == len(labels) and bool((labels < len(cls.classes)).all())
        if not fit:
            sides = "x".join(map(str, images.shape[2:]))
            reason = f"{len(images)} images of {sides}, {len(labels)} labels up to {max(labels.tolist(), default=0)}"
            raise _broken(root, name, root / cls.__name__ / "raw", reason)
        splits.append(RawSplit(images, labels))
    return splits[0], splits[1]


@register("mnist")
def mnist(context: ReadContext) -> RawDataset:
    """MNIST: 28x28 grey, files in root/MNIST/raw as torchvision has them."""
    train, test = _mnist_like(MNIST, "mnist", context)
    return RawDataset(train, test, DIGIT_NAMES, (0.1307,), (0.3081,))


@register("fashion_mnist")
def fashion_mnist(context: ReadContext) -> RawDataset:
    """Fashion-MNIST: 28x28 grey, files in root/FashionMNIST/raw as torchvision has them."""
    train, test = _mnist_like(FashionMNIST, "fashion_mnist", context)
    return RawDataset(train, test, tuple(FashionMNIST.classes), (0.2860,), (0.3530,))


def _cifar(cls: type[CIFAR10], name: str, context: ReadContext) -> tuple[RawSplit, RawSplit, tuple[str, ...]]:
    root = context.root
    splits, names = [], ()
    for train in (True, False):
        found = fetch(
            lambda download, train=train: cls(str(root), train=train, download=download),
            context, name, [cls.url], root / cls.base_folder,
        )  # fmt: skip
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        splits.append(RawSplit(images, _labels(found.targets)))
        names = tuple(found.classes)
    return splits[0], splits[1], names


@register("cifar10")
def cifar10(context: ReadContext) -> RawDataset:
    """CIFAR-10: 32x32 RGB, the python version's files in root/cifar-10-batches-py."""
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return RawDataset(*_cifar(CIFAR10, "cifar10", context), mean, std)


@register("cifar100")
def cifar100(context: ReadContext) -> RawDataset:
    """CIFAR-100 with its 100 fine classes: 32x32 RGB, the python version's files in root/cifar-100-python."""
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return RawDataset(*_cifar(CIFAR100, "cifar100", context), mean, std)


@register("svhn")
def svhn(context: ReadContext) -> RawDataset:
    """SVHN, cropped digits: 32x32 RGB, train_32x32.mat and test_32x32.mat in root/svhn or in root itself."""
    root = context.root
    folder = root if (root / "train_32x32.mat").exists() else root / "svhn"
    splits = []
    for split in ("train", "test"):
        found = fetch(
            lambda download, split=split: SVHN(str(folder), split=split, download=download),
            context, "svhn", [SVHN.split_list[split][0]], folder,
        )  # fmt: skip
        splits.append(RawSplit(torch.from_numpy(np.ascontiguousarray(found.data)), _labels(found.labels)))
    mean, std = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
    return RawDataset(splits[0], splits[1], DIGIT_NAMES, mean, std)


def _labels(values: Sequence[int] | np.ndarray) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.int64)
