"""Loading: read the raw data, hold out a validation set, decide where images are kept."""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cutlayer.datasets.augment import Augmentation, augmentation, of_whole_pictures
from cutlayer.datasets.config import DatasetConfig
from cutlayer.datasets.facts import facts
from cutlayer.datasets.images import EncodedImages
from cutlayer.datasets.info import Dataset, DatasetInfo
from cutlayer.datasets.normalize import Normalizer, moments
from cutlayer.datasets.registry import RawDataset, RawSplit, read
from cutlayer.datasets.seeding import derived
from cutlayer.datasets.source import ResidentStore, Source, StreamStore
from cutlayer.datasets.splitting import hold_out
from cutlayer.runtime.ground.config import ConfigError

# storage=auto keeps all images on the device up to this many bytes.
RESIDENT_BYTES = 2 << 30


def load(
    config: DatasetConfig, *, seed: int, device: torch.device, dtype: torch.dtype, download: bool = True
) -> Dataset:
    """Load a dataset as the configuration says.

    Args:
        seed: decides the validation split, the fraction and the images of `synthetic`; fixed test splits do not depend
            on it.
        device: where batches (and, if they are kept there, images) are.
        dtype: of the images in a batch.
        download: fetch published files that are not there; else they are missing.

    Raises:
        ConfigError: files are missing, unreadable or not of one size; the validation share or the fraction leaves
            nothing.
    """
    raw = read(config.name, config.root, config.options, seed, download=download)
    channels, height, width = _checked_shape(config, raw)
    known = facts(config, raw)
    train, held = _hold_out(raw.train, config.validation, seed)
    train, _ = _hold_out(train, 1 - config.fraction, seed, "fraction", config.fraction)
    sides = (height, width) if config.resize is None else (config.resize, config.resize)
    info = DatasetInfo(config.name, channels, *sides, len(raw.class_names), raw.class_names, raw.task, raw.outputs)
    resident = _resident(raw, config, device)
    whole = _whole(train.images, config)
    if resident and whole is None:
        # Decode before measuring, which then reads memory and not files again.
        train = replace(train, images=_decoded(train.images, config.workers))
    mean, std = moments(config.normalize, train.images, channels, (raw.mean, raw.std))
    normalizer = Normalizer(mean, std, device, dtype)

    def source(split: RawSplit, augmented: bool) -> Source:
        chosen = whole or augmentation(config.augment, config.moco_area, config.moco_blur) if augmented else None
        area = None if chosen is None else chosen.area
        if resident and area is None:
            store = ResidentStore(_decoded(split.images, config.workers), device)
        else:
            store = StreamStore(split.images, device, config.workers, area)
        return Source(store, split.labels, normalizer, chosen, device, config.resize, split.groups, split.targets)

    validation = None if held is None else source(held, augmented=False)
    sources = source(train, augmented=True), source(raw.test, augmented=False)
    if isinstance(raw.train.images, EncodedImages):
        raw.train.images.report_depth()
    return Dataset(info, *sources, validation, known)


def _checked_shape(config: DatasetConfig, raw: RawDataset) -> tuple[int, int, int]:
    """(channels, height, width) of all images.

    Raises:
        ConfigError: there are no samples, images of several sizes, or a configuration that does not fit them.
    """
    if len(raw.train.labels) == 0 or len(raw.test.labels) == 0:
        empty = "training" if len(raw.train.labels) == 0 else "test"
        raise ConfigError("dataset.root", config.root, f"data with at least one {empty} sample")
    shape = image_shape(raw.train)
    if image_shape(raw.test) != shape:
        raise ConfigError("dataset.options", config.options, "training and test images of one size; give a size")
    if config.augment == "moco" and shape[0] not in (1, 3):
        raise ConfigError("dataset.augment", config.augment, f"one without colours for images of {shape[0]} channels")
    if not config.divided and config.normalize == "dataset" and not raw.mean:
        expected = "imagenet or none with dataset.distribution=own: each machine would measure a mean of its own"
        raise ConfigError("dataset.normalize", config.normalize, expected)
    return shape


def image_shape(split: RawSplit) -> tuple[int, int, int]:
    """(channels, height, width) of the images of a split."""
    channels, height, width = split.images.shape[-3:]
    return channels, height, width


def _whole(images: Tensor | EncodedImages, config: DatasetConfig) -> Augmentation | None:
    """What augments training images by crops of whole pictures, where what is stored would be only their centres."""
    if not isinstance(images, EncodedImages) or not images.is_cut:
        return None
    found = of_whole_pictures(config.augment, config.moco_area, config.moco_blur)
    if found is not None and config.storage == "device":
        expected = f"auto or stream with dataset.augment={config.augment}, which cuts boxes out of whole pictures"
        raise ConfigError("dataset.storage", "device", expected)
    return found


def _resident(raw: RawDataset, config: DatasetConfig, device: torch.device) -> bool:
    if config.storage != "auto":
        return config.storage == "device"
    splits = (raw.train, raw.test)
    if device.type == "cpu" and all(isinstance(split.images, Tensor) for split in splits):
        return True
    decoded = sum(len(split.labels) * int(np.prod(image_shape(split))) for split in splits)
    return decoded <= RESIDENT_BYTES


def _decoded(images: Tensor | EncodedImages, workers: int) -> Tensor:
    return images if isinstance(images, Tensor) else images.decode_all(workers)


def _hold_out(
    split: RawSplit,
    share: float,
    seed: int,
    key: Literal["validation", "fraction"] = "validation",
    given: float | None = None,
) -> tuple[RawSplit, RawSplit | None]:
    """Divide a split into the part to train on and the part left out: equal shares of each class, groups whole.

    Args:
        key: says that the share is to be left out, with the value ``given`` where that is not the share; it names the
            stream of randomness too.
    """
    if share == 0:
        return split, None
    held = hold_out(split.labels.numpy(), share, derived(seed, key), split.groups)
    if held.all() or not held.any():
        groups = "" if split.groups is None else f" in {len(np.unique(split.groups))} groups that stay whole"
        expected = f"a share that leaves both parts of {len(held)} samples{groups} non-empty"
        raise ConfigError(f"dataset.{key}", share if given is None else given, expected)
    return split.subset(np.flatnonzero(~held)), split.subset(np.flatnonzero(held))
