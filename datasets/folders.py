"""Datasets kept as folders of image files: anyone's own, ImageNet, Tiny ImageNet, HAM10000."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from datasets.images import SUFFIXES, EncodedImages, FolderTree, Shape, Tree, open_tree
from datasets.normalize import IMAGENET_MEAN, IMAGENET_STD
from datasets.registry import RawDataset, RawSplit, ReadContext, register
from runtime.config import ConfigError


@dataclass(frozen=True)
class ImageFolderOptions:
    """Where images are and how they are read.

    Attributes:
        train: folder of the training set in root, with a folder for each class; "." for root itself.
        test: folder of the test set, with the same classes; null: `test_fraction` of each class is held out instead.
        size: height and width to bring all images to; null keeps theirs, which must then be equal.
        resize: shorter side before the centre of `size` is cut out; null: size, so that only the overhang is cut.
        channels: 3 for RGB, 1 for grey.
        classes: names of all classes, in order; null: the folders of the training set. To be given where each client
            has data of its own, which may lack a class.
    """

    train: str = "train"
    test: str | None = "test"
    size: int | None = None
    resize: int | None = None
    channels: int = 3
    test_fraction: float = 0.2
    classes: list[str] | None = None

    def __post_init__(self) -> None:
        _check_size(self.size)
        if self.resize is not None and (self.size is None or self.resize < self.size):
            raise ConfigError("resize", self.resize, "null, or an integer >= size")
        if self.channels not in (1, 3):
            raise ConfigError("channels", self.channels, "1 or 3")
        if not 0 < self.test_fraction < 1:
            raise ConfigError("test_fraction", self.test_fraction, "a number > 0 and < 1")
        if self.classes is not None and len({*self.classes}) < max(1, len(self.classes)):
            raise ConfigError("classes", self.classes, "null, or names that are each given once")

    @property
    def shape(self) -> Shape:
        """How a file becomes a tensor."""
        return Shape(self.channels, None if self.size is None else (self.size, self.size), self.resize or self.size)


@dataclass(frozen=True)
class ImagenetOptions(ImageFolderOptions):
    """As `ImageFolderOptions`, with ImageNet's folder names and sizes."""

    test: str | None = "val"
    size: int | None = 224
    resize: int | None = 256


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

    Images are brought to 256 pixels on the shorter side and their central 224x224 is kept, in training too: the random
    crop of `augment=resized_crop_flip` is taken from that, where the usual recipe takes it from the whole picture.
    """
    found = _by_class_folder(own_folder(context.root, "imagenet", "train"), context.options)
    return RawDataset(found.train, found.test, found.class_names, IMAGENET_MEAN, IMAGENET_STD)


def own_folder(root: Path, name: str, marker: str) -> Path:
    """root itself if it holds `marker` (or is a file), else root/name."""
    return root if root.is_file() or (root / marker).exists() else root / name


def _by_class_folder(root: Path, options: ImageFolderOptions) -> RawDataset:
    tree = open_tree(root)
    files = [path for path in tree.paths() if path.lower().endswith(SUFFIXES)]
    train = _class_files(files, options.train, root)
    present = tuple(sorted({name for name, _ in train}))
    classes = present if options.classes is None else tuple(options.classes)
    if unknown := sorted({*present} - {*classes}):
        raise ConfigError("dataset.options.classes", options.classes, f"all classes of {root}; found {unknown[0]}")
    if options.test is None:
        whole = _split(tree, train, classes, options.shape)
        held = hold_out(whole.labels.numpy(), options.test_fraction)
        train_split, test_split = whole.subset(np.flatnonzero(~held)), whole.subset(np.flatnonzero(held))
    else:
        test = _class_files(files, options.test, root)
        unknown = sorted({name for name, _ in test} - set(classes))
        if unknown:
            raise ConfigError(
                "dataset.options.test", options.test, f"classes of {options.train} only; found {unknown[0]}"
            )
        train_split = _split(tree, train, classes, options.shape)
        test_split = _split(tree, test, classes, options.shape)
    return RawDataset(train_split, test_split, classes)


def _class_files(files: Iterable[str], folder: str, root: Path) -> list[tuple[str, str]]:
    """(class, path) of each image below `folder` of the tree."""
    prefix = "" if folder in ("", ".") else folder.rstrip("/") + "/"
    inside = [path for path in files if path.startswith(prefix) and "/" in path[len(prefix) :]]
    if not inside:
        raise ConfigError("dataset.root", root, f"images in {prefix}<class>/ of it")
    return [(path[len(prefix) :].split("/", 1)[0], path) for path in inside]


def _split(tree: Tree, files: list[tuple[str, str]], classes: tuple[str, ...], shape: Shape) -> RawSplit:
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[name] for name, _ in files], dtype=torch.int64)
    return RawSplit(EncodedImages(tree, [path for _, path in files], shape), labels)


def hold_out(labels: np.ndarray, share: float, units: np.ndarray | None = None) -> np.ndarray:
    """A fixed test set, whatever the run's seed: bool [n], about `share` of each class.

    Args:
        units: int64 [n]; samples of one unit (pictures of one lesion) stay together. A unit is of one class.
    """
    units = np.arange(len(labels)) if units is None else units
    rng = np.random.default_rng(0)
    held = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        own, inverse = np.unique(units[members], return_inverse=True)
        # Units in a random order, taken while what they hold stays within the share.
        order = rng.permutation(len(own))
        taken = np.cumsum(np.bincount(inverse)[order]) <= round(share * len(members))
        held[members] = np.isin(inverse, order[taken])
    return held


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
    tree = open_tree(root)
    wnids = tuple(_text(tree, "wnids.txt", root).split())
    words = dict(line.split("\t", 1) for line in _text(tree, "words.txt", root).splitlines() if "\t" in line)
    size = context.options.size
    shape = Shape(3, None if size is None else (size, size))
    files = [path for path in tree.paths() if path.startswith("train/") and path.lower().endswith(SUFFIXES)]
    train = _split(tree, [(path.split("/")[1], path) for path in files], wnids, shape)
    lines = _text(tree, "val/val_annotations.txt", root).splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    test = _split(tree, [(row[1], f"val/images/{row[0]}") for row in rows], wnids, shape)
    names = tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)
    return RawDataset(train, test, names, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))


def _text(tree: Tree, path: str, root: Path) -> str:
    try:
        return tree.read(path).decode()
    except (OSError, KeyError) as error:
        raise ConfigError("dataset.root", root, f"a folder that holds {path}") from error


@dataclass(frozen=True)
class Ham10000Options:
    """`size`: height and width in pixels to scale to; `test_fraction`: share of each class that is the test set."""

    size: int = 64
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0 < self.test_fraction < 1:
            raise ConfigError("test_fraction", self.test_fraction, "a number > 0 and < 1")


HAM_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
HAM_URL = "https://doi.org/10.7910/DVN/DBW86T"


@register("ham10000", Ham10000Options)
def ham10000(context: ReadContext) -> RawDataset:
    """HAM10000 skin lesions: `HAM10000_metadata.csv` and the folders of images beside it, in root/ham10000 or root.

    Images (`HAM10000_images_part_1/ISIC_*.jpg`, part_2, or any folder below) are squeezed to size x size. The data has
    no test set of its own: a fixed share of each class is held out, all pictures of one lesion on one side.
    """
    root = own_folder(context.root, "ham10000", "HAM10000_metadata.csv")
    if not (root / "HAM10000_metadata.csv").exists():
        raise ConfigError(
            "dataset.root", context.root, f"HAM10000_metadata.csv and images in {root}; get it at {HAM_URL}"
        )
    tree = FolderTree(root)
    options: Ham10000Options = context.options
    table = pd.read_csv(io.BytesIO(tree.read("HAM10000_metadata.csv"))).sort_values("image_id")
    where = {Path(path).stem: path for path in tree.paths() if path.lower().endswith(SUFFIXES)}
    missing = [name for name in table["image_id"] if name not in where]
    if missing:
        expected = f"all images of HAM10000_metadata.csv; {len(missing)} are missing, the first is {missing[0]}.jpg"
        raise ConfigError("dataset.root", root, expected)
    files = [(str(dx), where[name]) for dx, name in zip(table["dx"], table["image_id"], strict=True)]
    whole = _split(tree, files, HAM_CLASSES, Shape(3, (options.size, options.size)))
    lesions = pd.factorize(table["lesion_id"])[0]
    held = hold_out(whole.labels.numpy(), options.test_fraction, lesions)
    return RawDataset(whole.subset(np.flatnonzero(~held)), whole.subset(np.flatnonzero(held)), HAM_CLASSES)
