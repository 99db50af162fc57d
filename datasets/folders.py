"""Datasets kept as folders of image files: your own, ImageNet, Tiny ImageNet."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cutlayer.datasets.classes import DatasetPart, check_training, class_folders, oddities, prefix_of
from cutlayer.datasets.grouping import check_group, group_names, numbered
from cutlayer.datasets.images import EncodedImages, Shape
from cutlayer.datasets.normalize import IMAGENET_MEAN, IMAGENET_STD
from cutlayer.datasets.notes import Notes
from cutlayer.datasets.registry import RawDataset, RawSplit, ReadContext, register
from cutlayer.datasets.splitting import fixed_test
from cutlayer.datasets.trees import Tree, open_tree
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.text import printable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFolderOptions:
    """Where images are and how they are read.

    Attributes:
        train: folder of the training set in root, with a folder for each class; "." for root itself.
        test: folder of the test set, with the same classes; null: `test_fraction` of each class is held out instead.
        size: height and width to bring all images to; null keeps theirs, which must then be equal.
        resize: shorter side before the centre of `size` is cut out; null: size, so that only the overhang is cut.
        channels: 3 for RGB, 1 for grey.
        group: what belongs together (a patient's images, a site's) and is held out together: a folder level below the
            class, from 1, `FILE.csv:COLUMN` of a table in root, or a regular expression with one group, searched for in
            each path; null: nothing.
        test_by: with `test: null` and groups, group holds out whole ones, sample a share of each group's images.
        classes: names of all classes, in order; null: the folders of the training set. To be given where each client
            has data of its own, which may lack a class.
        upright: turn pictures as their EXIF data say.
        background: grey level, 0 (black) to 255 (white), that shows where a picture is transparent.
        white: the value that stands for white in grey images of more than 8 bits; null: 65535 for 16 bits, 1 for
            floats, while 32-bit integers are refused.
    """

    train: str = "train"
    test: str | None = "test"
    size: int | None = None
    resize: int | None = None
    channels: int = 3
    test_fraction: float = 0.2
    classes: list[str] | None = None
    upright: bool = True
    background: int = 255
    white: float | None = None
    group: str | int | None = None
    test_by: Literal["group", "sample"] = "group"

    def __post_init__(self) -> None:
        _check_size(self.size)
        if self.resize is not None and (self.size is None or self.resize < self.size):
            raise ConfigError("resize", self.resize, "null, or an integer >= size")
        if self.channels not in (1, 3):
            raise ConfigError("channels", self.channels, "1 or 3")
        if not 0 < self.test_fraction < 1:
            raise ConfigError("test_fraction", self.test_fraction, "a number > 0 and < 1")
        check_group(self.group)
        if self.classes is not None and len({*self.classes}) < max(1, len(self.classes)):
            raise ConfigError("classes", self.classes, "null, or names that are each given once")
        if not 0 <= self.background <= 255:
            raise ConfigError("background", self.background, "an integer from 0 to 255")
        if self.white is not None and not 0 < self.white < math.inf:
            raise ConfigError("white", self.white, "null, or a number > 0")

    @property
    def shape(self) -> Shape:
        """How a file becomes a tensor."""
        size = None if self.size is None else (self.size, self.size)
        return Shape(self.channels, size, self.resize or self.size, self.background, self.white, self.upright)


@dataclass(frozen=True)
class ImagenetOptions(ImageFolderOptions):
    """As `ImageFolderOptions`, with ImageNet's folder names and sizes, and as its pictures are commonly read."""

    test: str | None = "val"
    size: int | None = 224
    resize: int | None = 256
    upright: bool = False


def _check_size(size: int | None) -> None:
    if size is not None and size < 1:
        raise ConfigError("size", size, "an integer >= 1")


@register("image_folder", ImageFolderOptions)
def image_folder(context: ReadContext) -> RawDataset:
    """`root/train/<class>/**` and `root/test/<class>/**`, in a folder or in a zip file given as root."""
    return _by_class_folder(context.root, context.options)


@register("imagenet", ImagenetOptions)
def imagenet(context: ReadContext) -> RawDataset:
    """ImageNet as class folders, `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`, in root/imagenet or in root itself.

    Images are brought to 256 pixels on the shorter side, and their central 224x224 is kept. In training a random box is
    cut out of the whole picture each time it is read, with the default `augment=resized_crop_flip`, as torchvision's
    reference recipes do.
    """
    found = _by_class_folder(own_folder(context.root, "imagenet", "train"), context.options)
    return RawDataset(found.train, found.test, found.class_names, IMAGENET_MEAN, IMAGENET_STD)


def own_folder(root: Path, name: str, marker: str) -> Path:
    """root itself if it holds `marker` (or is a file), else root/name."""
    return root if root.is_file() or (root / marker).exists() else root / name


def _by_class_folder(root: Path, options: ImageFolderOptions) -> RawDataset:
    tree = open_tree(root, top=_top(options))
    if options.test is not None and prefix_of(options.train) == prefix_of(options.test):
        raise ConfigError("dataset.options.test", options.test, "another folder than dataset.options.train, or null")
    parts = {options.train: class_folders(tree, options.train, options.test)}
    train = parts[options.train].files
    check_training(parts[options.train], options.train, root, options.classes)
    present = tuple(parts[options.train].classes)
    classes = present if options.classes is None else tuple(options.classes)
    if unknown := sorted({*present} - {*classes}):
        raise ConfigError("dataset.options.classes", options.classes, f"all classes of {root}; found {unknown[0]}")
    notes = Notes()
    if options.test is None:
        (groups,) = _groups(tree, options, parts)
        whole = replace(_split(tree, train, classes, options.shape, notes), groups=groups)
        held = _held(whole, options)
        train_split, test_split = whole.subset(np.flatnonzero(~held)), whole.subset(np.flatnonzero(held))
    else:
        share = f"{options.test_fraction:.0%} of each class"
        otherwise = f", or dataset.options.test=null, which holds out {share} (of a run over the network at the server)"
        parts[options.test] = class_folders(tree, options.test, options.train, otherwise)
        unknown = sorted({*parts[options.test].classes} - set(classes))
        if unknown:
            raise ConfigError(
                "dataset.options.test", options.test, f"classes of {options.train} only; found {unknown[0]}"
            )
        both = zip((train, parts[options.test].files), _groups(tree, options, parts), strict=True)
        train_split, test_split = (
            replace(_split(tree, files, classes, options.shape, notes), groups=groups) for files, groups in both
        )
    _report(tree, parts)
    return RawDataset(train_split, test_split, classes)


def _top(options: ImageFolderOptions) -> tuple[str, ...]:
    """Names of which one is at the top of the data."""
    folders = (prefix_of(folder).split("/")[0] for folder in (options.train, options.test) if folder)
    named = tuple(name for name in folders if name)
    return named if prefix_of(options.train) else (*named, *(options.classes or ()))


def _report(tree: Tree, parts: dict[str, DatasetPart]) -> None:
    left, odd = oddities(tree, parts)
    if left:
        log.info("dataset.root=%s: left out %s", printable(str(tree.root)), left)
    if odd:
        log.warning("dataset.root=%s: there are %s", printable(str(tree.root)), odd)


def _groups(tree: Tree, options: ImageFolderOptions, parts: dict[str, DatasetPart]) -> list[np.ndarray | None]:
    """The groups of the files of each part, int64, with the same number for the same group; or None for each."""
    if options.group is None:
        return [None] * len(parts)
    groups = numbered(
        *(
            group_names([path for _, path in part.files], options.group, tree, prefix_of(folder))
            for folder, part in parts.items()
        )
    )
    if len(groups) > 1 and (shared := {*groups[0].tolist()} & {*groups[1].tolist()}):
        log.warning("%d groups have pictures both in %s and in %s", len(shared), *parts)
    return [*groups]


def _held(whole: RawSplit, options: ImageFolderOptions) -> np.ndarray:
    """Which pictures are the test set."""
    if whole.groups is None or options.test_by == "group":
        return fixed_test(whole.labels.numpy(), options.test_fraction, whole.groups)
    return fixed_test(whole.groups, options.test_fraction)


def _split(
    tree: Tree, files: list[tuple[str, str]], classes: tuple[str, ...], shape: Shape, notes: Notes | None = None
) -> RawSplit:
    number = {name: i for i, name in enumerate(classes)}
    for name, path in files:
        if name not in number:
            raise ConfigError("dataset.root", tree.root, f"classes that are listed; {path} is of {name}")
    labels = torch.tensor([number[name] for name, _ in files], dtype=torch.int64)
    return RawSplit(EncodedImages(tree, [path for _, path in files], shape, notes), labels)


@dataclass(frozen=True)
class TinyImagenetOptions:
    """`size`: height and width in pixels to scale to; null keeps the 64x64 of the files."""

    size: int | None = None

    def __post_init__(self) -> None:
        _check_size(self.size)


TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


@register("tinyimagenet", TinyImagenetOptions)
def tinyimagenet(context: ReadContext) -> RawDataset:
    """Tiny ImageNet as published: 64x64, 200 classes, in root/tiny-imagenet-200, in root itself or in the zip as root.

    Training images are in `train/<wnid>/images/`; the published validation images, all in `val/images/` with their
    classes in `val/val_annotations.txt`, are the test set, as the published test set has no labels. Classes are in the
    order of `wnids.txt`. Some files are grey; they become RGB.
    """
    root = own_folder(context.root, "tiny-imagenet-200", "wnids.txt")
    if not root.exists():
        raise ConfigError("dataset.root", context.root, f"{root} to exist; unpack {TINY_URL} there")
    tree = open_tree(root, top=("wnids.txt",))
    wnids = tuple(_text(tree, "wnids.txt", root).split())
    words = dict(line.split("\t", 1) for line in _text(tree, "words.txt", root).splitlines() if "\t" in line)
    size = context.options.size
    shape = Shape(3, None if size is None else (size, size))
    train = _split(tree, class_folders(tree, "train").files, wnids, shape)
    lines = _text(tree, "val/val_annotations.txt", root).splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    if short := [row for row in rows if len(row) < 2]:
        raise ConfigError(
            "dataset.root", root, f"a name and a class in each line of val_annotations.txt, not {short[0]}"
        )
    test = _split(tree, [(row[1], f"val/images/{row[0]}") for row in rows], wnids, shape)
    names = tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)
    return RawDataset(train, test, names, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))


def _text(tree: Tree, path: str, root: Path) -> str:
    try:
        return tree.read(path).decode()
    except Exception as error:  # of the file system, an archive's or a codec's
        raise ConfigError("dataset.root", root, f"a folder that holds {path}") from error
