"""HAM10000: dermatoscopic pictures of pigmented skin lesions, from either of the places that give them out."""

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cutlayer.datasets.classes import is_picture
from cutlayer.datasets.images import EncodedImages, Shape
from cutlayer.datasets.notes import Findings
from cutlayer.datasets.registry import RawDataset, RawSplit, ReadContext, register
from cutlayer.datasets.splitting import fixed_test
from cutlayer.datasets.tables import read_table
from cutlayer.datasets.trees import Tree, open_tree
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.text import printable

log = logging.getLogger(__name__)

HAM10000_URL = "https://doi.org/10.7910/DVN/DBW86T"
CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")

# What a diagnosis is called, besides its code. First come the names of the paper (Tschandl et al. 2018) and those made
# of them in the field, then those of the ISIC archive's exports: single terms, and since 2024 levels, of which the
# finest that is given is read. There HAM10000's akiec are "Solar or actinic keratosis" (130) and "Squamous cell
# carcinoma, NOS" (197), and its vasc have the second level alone.
_NAMES = {
    "akiec": (
        "Actinic keratoses and intraepithelial carcinoma / Bowen's disease", "Actinic keratoses", "Actinic keratosis",
        "Actinic keratoses and intraepithelial carcinoma", "Bowen's disease", "Intraepithelial carcinoma",
        "Solar or actinic keratosis", "Squamous cell carcinoma", "Squamous cell carcinoma, NOS",
        "Squamous cell carcinoma in situ", "Squamous cell carcinoma in situ, Bowen's disease",
    ),
    "bcc": ("Basal cell carcinoma",),
    "bkl": (
        "Benign keratosis-like lesions", "Benign keratosis-like lesion", "Benign keratosis", "Benign keratoses",
        "Pigmented benign keratosis", "Seborrheic keratosis", "Solar lentigo", "Lichenoid keratosis",
        "Lichen planus like keratosis",
    ),
    "df": ("Dermatofibroma", "Dermatofibromas"),
    "mel": ("Melanoma", "Melanoma, NOS", "Melanoma Invasive", "Melanoma in situ", "Malignant melanoma"),
    "nv": ("Melanocytic nevi", "Melanocytic nevus", "Nevus", "Nevi"),
    "vasc": (
        "Vascular lesions", "Vascular lesion", "Benign soft tissue proliferations - Vascular", "Hemangioma", "Angioma",
        "Angiokeratoma", "Pyogenic granuloma", "Hemorrhage",
    ),
}  # fmt: skip
_METADATA = re.compile(r"(ham10000_metadata[^/]*|metadata)(\.csv|\.tab|\.tsv|\.txt)|ham10000_metadata", re.IGNORECASE)
_IMAGE = ("image_id", "isic_id", "image", "image_name")
_LESION = ("lesion_id",)
_DIAGNOSIS = ("dx", "diagnosis", "diagnosis_3", "diagnosis_2")  # the first that is given in a row counts
_MASK = re.compile("mask|segmentation", re.IGNORECASE)


@dataclass(frozen=True)
class Ham10000Options:
    """`size`: height and width in pixels to scale to; `test_fraction`: share of each class that is the test set."""

    size: int = 64
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError("size", self.size, "an integer >= 1")
        if not 0 < self.test_fraction < 1:
            raise ConfigError("test_fraction", self.test_fraction, "a number > 0 and < 1")


@register("ham10000", Ham10000Options)
def ham10000(context: ReadContext) -> RawDataset:
    """HAM10000 skin lesions: a table of metadata and images anywhere below it, in root/ham10000 or root, or in a zip.

    The table is `HAM10000_metadata` with or without an ending (.csv, .tab, .tsv, .txt), with commas or tabs, as
    Harvard's Dataverse and Kaggle have it, or `metadata.csv`, as the ISIC archive exports it. Images are squeezed to
    size x size. Segmentation masks among them are left out. The data has no test set of its own: a fixed share of each
    class is held out, all pictures of one lesion on one side. Lesions are the groups.
    """
    root, name = _find(context.root)
    tree = open_tree(root)
    left = Findings()
    left.update(tree.findings)
    rows = _rows(tree, name, left)
    where = _images(tree, {row.image for row in rows}, left)
    missing = [row.image for row in rows if row.image not in where]
    if missing:
        expected = f"all images of {name}; {len(missing)} are missing, the first is {missing[0]}.jpg"
        raise ConfigError("dataset.root", root, expected)
    if left:
        log.warning("dataset.root=%s: left out %s", printable(str(root)), left)
    options: Ham10000Options = context.options
    images = EncodedImages(tree, [where[row.image] for row in rows], Shape(3, (options.size, options.size)))
    labels = np.array([row.label for row in rows], dtype=np.int64)
    lesions = np.unique([row.lesion for row in rows], return_inverse=True)[1].astype(np.int64)
    whole = RawSplit(images, torch.from_numpy(labels), lesions)
    held = fixed_test(labels, options.test_fraction, lesions)
    return RawDataset(whole.subset(np.flatnonzero(~held)), whole.subset(np.flatnonzero(held)), CLASSES)


def _find(root: Path) -> tuple[Path, str]:
    """The folder or zip file that holds the metadata, and its name there."""
    places = [root] if root.is_file() else [root, root / "ham10000", root / "HAM10000"]
    for place in places:
        inside = open_tree(place).paths() if place.is_file() else sorted(p.name for p in place.glob("*") if p.is_file())
        found = [name for name in inside if _METADATA.fullmatch(name)]
        if found:
            return place, min(found, key=lambda name: (not name.lower().startswith("ham10000"), name))
    expected = f"HAM10000_metadata.csv and images in {places[-1 if root.is_file() else 1]}; get it at {HAM10000_URL}"
    raise ConfigError("dataset.root", root, expected)


class _Row(NamedTuple):
    image: str
    lesion: str
    label: int


def _rows(tree: Tree, name: str, left: Findings) -> list[_Row]:
    """What the metadata say, in order of image; `left` gets what is left out."""
    root = tree.root
    table = read_table(tree, name, "dataset.root").rename(columns=lambda column: str(column).strip().lower())
    image, lesion = (next((c for c in of if c in table.columns), None) for of in (_IMAGE, _LESION))
    given = [column for column in _DIAGNOSIS if column in table.columns]
    if image is None or not given:
        expected = f"a column {' or '.join(_IMAGE)} and one {' or '.join(_DIAGNOSIS)} in {name}"
        raise ConfigError("dataset.root", f"{root}/{name}", f"{expected}; found {', '.join(table.columns)}")
    lesions = table[lesion].tolist() if lesion else [""] * len(table)
    lines = zip(table[image].tolist(), lesions, table[given].values.tolist(), strict=True)
    found = [
        (re.sub(r"\.\w+$", "", picture.strip()), of.strip(), next((d.strip() for d in levels if d.strip()), ""))
        for picture, of, levels in lines
    ]
    known: dict[tuple[str, str, str], None] = {}
    for line in found:
        if not (line[0] and line[2]):
            left.add(f"rows of {name} without an image or a diagnosis", [line[0] or "one without an image"])
        elif line in known:
            left.add(f"rows of {name} that are there again", [line[0]])
        else:
            known[line] = None
    if alone := sum(not line[1] for line in known):
        log.warning("%s: %d pictures are of no known lesion, and each is taken for one of its own", name, alone)
    labels = _labels([line[2] for line in known], f"{given[0]} in {root}/{name}")
    rows = [
        _Row(picture, of or f"picture {picture}", label) for (picture, of, _), label in zip(known, labels, strict=True)
    ]
    for picture, count in Counter(row.image for row in rows).items():
        if count > 1:
            expected = f"one lesion and one diagnosis for each image; {picture} has {count} rows that differ"
            raise ConfigError("dataset.root", f"{root}/{name}", expected)
    return sorted(rows)


def _labels(diagnoses: list[str], column: str) -> list[int]:
    """The number of each diagnosis's class."""
    spelled = {_plain(name): CLASSES.index(code) for code, names in _NAMES.items() for name in (code, *names)}
    unknown = Counter(diagnosis for diagnosis in diagnoses if _plain(diagnosis) not in spelled)
    if unknown:
        first, count = next(iter(unknown.items()))
        more = f" and {unknown.total() - count} rows have others" if len(unknown) > 1 else ""
        expected = f"a diagnosis of HAM10000; {count} rows have this{more}"
        raise ConfigError(column, first, expected, [*CLASSES, *(name for names in _NAMES.values() for name in names)])
    return [spelled[_plain(diagnosis)] for diagnosis in diagnoses]


def _plain(name: str) -> str:
    """A spelling without case, punctuation and spaces."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _images(tree: Tree, wanted: set[str], left: Findings) -> dict[str, str]:
    """Where each wanted image is, by its name without ending; of two of the same size, the first.

    Raises:
        ConfigError: two images of one name differ in size, and no name says that one is a mask.
    """
    where: dict[str, str] = {}
    for path in filter(is_picture, tree.paths()):
        stem = Path(path).stem
        if _MASK.search(path):
            left.add("segmentation masks", [path])
        elif stem not in wanted:
            left.add("pictures without a row in the table", [path])
        elif stem not in where:
            where[stem] = path
        elif tree.size(where[stem]) == tree.size(path):
            left.add("pictures that are there twice", [path])
        else:
            expected = f"one picture of each name; {where[stem]} and {path} differ"
            raise ConfigError("dataset.root", tree.root, expected)
    return where
