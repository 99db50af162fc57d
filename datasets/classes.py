"""Pictures by the class folder they are in, and what is odd about them."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cutlayer.datasets.images import IMAGE_SUFFIXES
from cutlayer.datasets.notes import Findings, kinds
from cutlayer.datasets.trees import UNREADABLE, Tree
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.text import printable

# Folders of these names hold parts of a dataset and no class.
PART_FOLDERS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
# What is added to a picture's name for what is made from it.
_DERIVED = re.compile(
    r"(.+)[-_. ](?:(?:ground[-_ ]?truth|label|mask|preview|segmentation|seg|small|thumbnail|thumb)s?|gt)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class DatasetPart:
    """One part of a dataset, training or test.

    Attributes:
        files: (class, path in the tree) of each picture, sorted by path.
        without: class folders that hold no picture, and the files of other kinds in them.
        unread: files of kinds that are not read, in class folders; beside: pictures in no class folder.
    """

    files: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    without: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    unread: list[str] = field(default_factory=list[str])
    beside: list[str] = field(default_factory=list[str])

    @property
    def classes(self) -> list[str]:
        """Names of the classes that there are pictures of, sorted."""
        return sorted({name for name, _ in self.files})


def is_picture(path: str) -> bool:
    """Whether the name of a file is that of an image that is read."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def prefix_of(folder: str) -> str:
    """How the paths below a folder of the tree begin; "" and "." are the tree itself."""
    path = PurePosixPath(folder).as_posix()
    return "" if path == "." else f"{path}/"


def class_folders(tree: Tree, folder: str, other: str | None = None, otherwise: str = "") -> DatasetPart:
    """What the class folders in `folder` of the tree hold; `other` is a folder that does not belong to it.

    `otherwise` is what else can be done where there is no picture, for the error's line.

    Raises:
        ConfigError: there is no picture in any; one cannot be read; two are the same once what is no UTF-8 is escaped.
    """
    prefix = prefix_of(folder)
    for path in tree.findings.paths.get(UNREADABLE, ()):
        if f"{path}/".startswith(prefix) or prefix.startswith(f"{path}/") or not path:
            raise ConfigError("dataset.root", tree.root, f"folders that can be read; {path or 'it'} cannot")
    but = prefix_of(other) if other else ""
    but = but if but != prefix and but.startswith(prefix) else None
    inside = [path for path in tree.paths() if path.startswith(prefix) and not (but and path.startswith(but))]
    part = DatasetPart()
    held = {path[len(prefix) :]: list[str]() for path in tree.folders()
            if path.startswith(prefix) and "/" not in path[len(prefix) :] and f"{path}/" != but}  # fmt: skip
    for path in inside:
        name, slash, _ = path[len(prefix) :].partition("/")
        if not slash:
            part.beside.extend([path] if is_picture(path) else [])
        elif is_picture(path):
            part.files.append((printable(name), path))
        else:
            part.unread.append(path)
            held.setdefault(name, []).append(path)
    if not part.files:
        instead = f"{_instead(tree, part)}{otherwise}"
        raise ConfigError("dataset.root", tree.root, f"images in {prefix}<class>/ of it{instead}")
    if len({*map(printable, held)}) < len(held):
        raise ConfigError("dataset.root", tree.root, f"class folders in {prefix or '.'} whose names differ when shown")
    shown = {printable(name): files for name, files in sorted(held.items())}
    part.without.update({name: shown[name] for name in sorted(shown.keys() - {*part.classes})})
    return part


def _instead(tree: Tree, part: DatasetPart) -> str:
    """What there is where no picture is in a class folder, for the end of an error."""
    if part.unread:
        return f"; found files of other kinds ({kinds(part.unread)})"
    if part.beside:
        return f"; found some in no class folder: {len(part.beside):,}"
    elsewhere = sorted({path.rpartition("/")[0].partition("/")[0] for path in filter(is_picture, tree.paths())} - {""})
    if elsewhere:
        return f"; found some in {', '.join(elsewhere[:5])}{', ...' if len(elsewhere) > 5 else ''}"
    return f"; found files of other kinds ({kinds(tree.paths())})" if tree.paths() else "; found no file"


def check_training(part: DatasetPart, folder: str, root: Path, classes: Sequence[str] | None) -> None:
    """Refuse what is hardly meant: class folders without a picture, a single class, folders that are parts.

    Args:
        classes: those that the user named, who then may lack pictures of some.

    Raises:
        ConfigError: one of these; it says which folder.
    """
    where = prefix_of(folder) or "the root"
    if classes is not None:
        return
    if part.without:
        name, files = next(iter(part.without.items()))
        held = f"only files of other kinds: {kinds(files)}" if files else "none"
        more = f" and {len(part.without) - 1} more" if len(part.without) > 1 else ""
        raise ConfigError("dataset.root", root, f"images in every class folder of {where}; {name}{more} has {held}. "
                          "dataset.options.classes=[...] names those that are classes")  # fmt: skip
    present = part.classes
    if all(name.lower() in PART_FOLDERS for name in present):
        hint = f"dataset.options.train={prefix_of(folder)}{present[-1]}"
        raise ConfigError("dataset.options.train", folder, f"the folder of the classes; found {', '.join(present)} in "
                          f"it, as in {hint}")  # fmt: skip
    if len(present) == 1:
        raise ConfigError("dataset.root", root, f"two classes or more in {where}; found the folder {present[0]} only. "
                          f"dataset.options.classes=[{present[0]}] if that is meant")  # fmt: skip


def oddities(tree: Tree, parts: dict[str, DatasetPart]) -> tuple[Findings, Findings]:
    """(what is left out, what is taken but hardly meant) of the parts of a dataset, by their folder."""
    left, odd = Findings(), Findings()
    left.update(tree.findings)
    prefixes = tuple(map(prefix_of, parts))
    for folder, part in parts.items():
        if part.unread:
            left.add(f"files of other kinds in {folder} ({kinds(part.unread)})", part.unread)
        left.add("pictures in no class folder", part.beside)
    outside = [path for path in tree.paths() if not path.startswith(prefixes) and is_picture(path)]
    left.add(f"pictures outside of {' and '.join(prefixes)}", outside)
    names = sorted({name for part in parts.values() for name in part.classes})
    odd.add("names of classes that differ only by case or Unicode form from another", _alike(names))
    for folder, part in parts.items():
        odd.add(f"class folders without a picture in {folder}", part.without)
        twins, derived = _relatives(part.files)
        odd.add("pictures of the same class and name as another", twins)
        odd.add("pictures that by their name are made from another", derived)
    first = next(iter(parts.values()))
    for folder, part in [*parts.items()][1:]:
        odd.add(f"classes without a picture in {folder}", sorted({*first.classes} - {*part.classes} - {*part.without}))
    odd.add("pictures that are the same file as another, over a link",
            tree.repeated(path for part in parts.values() for _, path in part.files))  # fmt: skip
    return left, odd


def _alike(names: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    found: list[str] = []
    for name in names:
        form = unicodedata.normalize("NFC", name).casefold()
        found += [name] if form in seen else []
        seen.add(form)
    return found


def _relatives(files: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Pictures that share class and name, but not folder or suffix, with one before; those named as its mask or so."""
    stems: defaultdict[str, set[str]] = defaultdict(set)
    twins: list[str] = []
    named = [(name, path.rpartition("/")[2].rpartition(".")[0], path) for name, path in files]
    for name, stem, path in named:
        twins += [path] if stem in stems[name] else []
        stems[name].add(stem)
    derived = [path for name, stem, path in named if (base := _DERIVED.match(stem)) and base[1] in stems[name]]
    return twins, derived
