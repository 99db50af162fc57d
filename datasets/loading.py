"""Loading: read the raw data, hold out a validation set, decide where samples are kept."""

from dataclasses import replace
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from cutlayer.datasets.augment import Augmentation, augmentation, of_whole_pictures
from cutlayer.datasets.config import DatasetConfig
from cutlayer.datasets.facts import facts
from cutlayer.datasets.image_source import ImageSource, ResidentStore, StreamStore
from cutlayer.datasets.images import EncodedImages
from cutlayer.datasets.info import Dataset, DatasetInfo
from cutlayer.datasets.normalize import Normalizer, moments
from cutlayer.datasets.registry import RawDataset, RawSplit, read
from cutlayer.datasets.seeding import derived
from cutlayer.datasets.source import Source
from cutlayer.datasets.splitting import hold_out
from cutlayer.datasets.text_source import TextSource, TokenStore
from cutlayer.datasets.texts import Texts
from cutlayer.runtime.ground.config import ConfigError

# storage=auto keeps all samples on the device up to this many bytes.
RESIDENT_BYTES = 2 << 30


def load(
    config: DatasetConfig, *, seed: int, device: torch.device, dtype: torch.dtype, download: bool = True
) -> Dataset:
    """Load a dataset as the configuration says.

    Args:
        seed: decides the validation split, the fraction and the images of `synthetic`; fixed test splits do not depend
            on it.
        device: where batches (and, if they are kept there, samples) are.
        dtype: of the images in a batch.
        download: fetch published files that are not there; else they are missing.

    Raises:
        ConfigError: files are missing, unreadable or not of one size; the validation share or the fraction leaves
            nothing.
    """
    raw = read(config.name, config.root, config.options, seed, download=download)
    if len(raw.train.labels) == 0 or len(raw.test.labels) == 0:
        empty = "training" if len(raw.train.labels) == 0 else "test"
        raise ConfigError("dataset.root", config.root, f"data with at least one {empty} sample")
    known = facts(config, raw)
    train, held = _hold_out(raw.train, config.validation, seed)
    train, _ = _hold_out(train, 1 - config.fraction, seed, "fraction", config.fraction)
    splits = _Splits(train, raw.test, held)
    sizes, sources = (
        _of_texts(config, splits, device)
        if isinstance(train.inputs, Texts)
        else _of_images(config, raw, splits, device, dtype)
    )
    names = raw.class_names
    info = DatasetInfo(config.name, **sizes, classes=len(names), class_names=names, task=raw.task, outputs=raw.outputs)
    return Dataset(info, *sources, known, raw.tokenizer)


class _Splits(NamedTuple):
    train: RawSplit
    test: RawSplit
    validation: RawSplit | None


_Made = tuple[dict[str, int], tuple[Source, Source, Source | None]]
"""Sizes of `DatasetInfo`, and the source of each split."""


def _of_images(
    config: DatasetConfig, raw: RawDataset, splits: _Splits, device: torch.device, dtype: torch.dtype
) -> _Made:
    channels, height, width = _checked_shape(config, raw)
    sides = (height, width) if config.resize is None else (config.resize, config.resize)
    resident, train = _resident(raw, config, device), splits.train
    whole = _whole(_images(train), config)
    if resident and whole is None:
        # Decode before measuring, which then reads memory and not files again.
        train = replace(train, inputs=_decoded(train, config.workers))
    mean, std = moments(config.normalize, _images(train), channels, (raw.mean, raw.std))
    normalizer = Normalizer(mean, std, device, dtype)

    def source(split: RawSplit, augmented: bool = False) -> ImageSource:
        chosen = whole or augmentation(config.augment, config.moco_area, config.moco_blur) if augmented else None
        area = None if chosen is None else chosen.area
        if resident and area is None:
            store = ResidentStore(_decoded(split, config.workers), device)
        else:
            store = StreamStore(_images(split), device, config.workers, area)
        return ImageSource(store, split.labels, normalizer, chosen, device, config.resize, split.groups, split.targets)

    validation = None if splits.validation is None else source(splits.validation)
    sources = source(train, augmented=True), source(splits.test), validation
    if isinstance(raw.train.inputs, EncodedImages):
        raw.train.inputs.report_depth()
    return {"channels": channels, "height": sides[0], "width": sides[1]}, sources


def _of_texts(config: DatasetConfig, splits: _Splits, device: torch.device) -> _Made:
    for key, given, of_images in (
        ("augment", config.augment, config.augment != "none"),
        ("resize", config.resize, config.resize is not None),
        ("normalize", config.normalize, config.normalize == "imagenet"),
    ):
        if of_images:
            raise ConfigError(f"dataset.{key}", given, f"nothing that is for images: dataset {config.name} is text")
    # Splits of one file have one array.
    arrays = {id(tokens): tokens for tokens in (_texts(split).tokens for split in splits if split is not None)}
    held = sum(array.nbytes for array in arrays.values())
    resident = config.storage == "device" or (config.storage == "auto" and held <= RESIDENT_BYTES)
    stores = {key: TokenStore(tokens, device, resident=resident) for key, tokens in arrays.items()}

    def source(split: RawSplit) -> TextSource:
        texts = _texts(split)
        return TextSource(texts, stores[id(texts.tokens)], split.labels, split.groups, device)

    validation = None if splits.validation is None else source(splits.validation)
    length = _texts(splits.train).length
    return {"channels": 0, "height": 0, "width": 0, "length": length}, (
        source(splits.train),
        source(splits.test),
        validation,
    )


def _texts(split: RawSplit) -> Texts:
    return cast(Texts, split.inputs)


def _images(split: RawSplit) -> Tensor | EncodedImages:
    return cast("Tensor | EncodedImages", split.inputs)


def _checked_shape(config: DatasetConfig, raw: RawDataset) -> tuple[int, int, int]:
    """(channels, height, width) of all images.

    Raises:
        ConfigError: there are images of several sizes, or a configuration that does not fit them.
    """
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
    channels, height, width = _images(split).shape[-3:]
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
    if device.type == "cpu" and all(isinstance(split.inputs, Tensor) for split in splits):
        return True
    decoded = sum(len(split.labels) * int(np.prod(image_shape(split))) for split in splits)
    return decoded <= RESIDENT_BYTES


def _decoded(split: RawSplit, workers: int) -> Tensor:
    images = _images(split)
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
