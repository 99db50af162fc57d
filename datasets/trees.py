"""Files below a folder or in a zip file, as one sorted list of paths; what of them is left out is noted."""

import contextlib
import os
import stat
import zipfile
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from cutlayer.datasets.notes import Findings
from cutlayer.runtime.ground.config import ConfigError

# Folders and files that systems and programs add to the user's own, in lower case; those whose name starts with a dot
# are left out too.
SYSTEM = frozenset({
    *("$recycle.bin", "#recycle", "@eadir", "__macosx", "__pycache__", "lost+found", "system volume information"),
    *("desktop.ini", "ehthumbs.db", "thumbs.db"),
})  # fmt: skip
# An encoded image is smaller than this. The uncompressed content of 179 million pixels, Pillow's limit, just fits in.
MOST_BYTES = 1 << 30

HIDDEN = "hidden or system files and folders"
BROKEN = "links that lead nowhere"
UNREADABLE = "folders that cannot be read"
CYCLE = "links to a folder that they are in"
SPECIAL = "things that are no file"
TWICE = "names that are in the archive again, of which the last is read"


class Tree(Protocol):
    """Files below a folder, by their path in it with forward slashes.

    Attributes:
        root: where the tree is.
    """

    root: Path

    @property
    def findings(self) -> Findings:
        """What is not among `paths` and `folders`, and why."""
        ...

    def paths(self) -> list[str]:
        """All files but hidden ones and those of the system, sorted."""
        ...

    def folders(self) -> list[str]:
        """All folders but hidden ones and those of the system, sorted; empty ones too."""
        ...

    def read(self, path: str) -> bytes:
        """Content of one file; safe to call from several threads. Raises what the file system or the archive does."""
        ...

    def size(self, path: str) -> int:
        """Bytes of one file's content."""
        ...

    def repeated(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` that are, over a link, the same file as one before them."""
        ...


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a dataset."""
    return name.startswith(".") or name.lower() in SYSTEM


class FolderTree:
    """A folder on disk. Links are followed, but not to a folder that the link is in, directly or over other links."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def paths(self) -> list[str]:
        """All files but hidden ones and those of the system, sorted."""
        return self._walked[0]

    def folders(self) -> list[str]:
        """All folders but hidden ones and those of the system, sorted."""
        return self._walked[1]

    @property
    def findings(self) -> Findings:
        """What is not among `paths` and `folders`, and why."""
        return self._walked[2]

    def read(self, path: str) -> bytes:
        """Content of one file."""
        _check_size(self.size(path))
        return (self.root / path).read_bytes()

    def size(self, path: str) -> int:
        """Bytes of one file's content."""
        return os.stat(f"{self.root}/{path}").st_size

    def repeated(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` that are, over a link, the same file as one before them."""
        links = self._walked[3]
        if not links:
            return []
        top, seen, found = os.path.realpath(self.root), set[str](), list[str]()
        for path in paths:
            place = links.get(path) or os.path.join(top, path)
            found += [path] if place in seen else []
            seen.add(place)
        return found

    @cached_property
    def _walked(self) -> tuple[list[str], list[str], Findings, dict[str, str]]:
        """Files, folders, findings, and where those reached over links really are."""
        files: list[str] = []
        folders: list[str] = []
        findings = Findings()
        real: dict[str, str] = {}
        top = os.path.realpath(self.root)
        # Each folder with its real place, and the real places of the links that led to it.
        waiting: list[tuple[str, str, tuple[str, ...]]] = [("", top, ())]
        while waiting:
            folder, place, over = waiting.pop()
            try:
                with os.scandir(self.root / folder) as entries:
                    inside = list(entries)
            except OSError:
                findings.add(UNREADABLE, [folder])
                continue
            for entry in inside:
                path = f"{folder}/{entry.name}" if folder else entry.name
                linked = entry.is_symlink()
                kind = HIDDEN if is_hidden(entry.name) else _kind(entry)
                if kind == "file":
                    files.append(path)
                    if linked or over:
                        real[path] = os.path.realpath(entry.path) if linked else os.path.join(place, entry.name)
                    continue
                target = os.path.realpath(entry.path) if linked else os.path.join(place, entry.name)
                if kind == "folder" and linked and any(_is_within(each, target) for each in (place, *over)):
                    kind = CYCLE
                if kind == "folder":
                    folders.append(path)
                    waiting.append((path, target, (*over, place) if linked else over))
                else:
                    findings.add(kind, [path])
        return sorted(files), sorted(folders), findings, real


def _kind(entry: os.DirEntry[str]) -> str:
    """ "folder", "file", or why an entry is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return BROKEN if entry.is_symlink() else SPECIAL
    except OSError:  # a link to itself
        return BROKEN


def _is_within(place: str, folder: str) -> bool:
    return place == folder or place.startswith(folder.rstrip(os.sep) + os.sep)


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise OSError(f"{size:,} bytes, more than an image may have")


class ZipTree:
    """A zip file, read in place.

    Args:
        top: names of which one is expected at the top. Where none is, a single folder that holds one of them (where
            `top` is empty: that holds folders) is looked through, even if files lie next to it.
    """

    def __init__(self, file: Path, top: Collection[str] = ()) -> None:
        self.root, self._top = file, top
        self.findings = Findings()
        self._zip = zipfile.ZipFile(file)
        members: dict[str, zipfile.ZipInfo] = {}
        folders: set[str] = set()
        hidden: set[str] = set()
        # For each folder, what of its path is hidden; the same for all that is in it.
        known: dict[str, str] = {}
        for info in self._zip.infolist():
            path = _path(info)
            folder, _, name = path.rpartition("/")
            if folder not in known:
                known[folder] = _hidden_part(folder)
                folders.update(() if known[folder] else _with_above(folder))
            if found := known[folder] or (path if is_hidden(name) else ""):
                hidden.add(found)
            elif info.is_dir():
                folders.update(_with_above(path))
            else:
                self.findings.add(TWICE, [path] if path in members else [])
                members[path] = info
        self.findings.add(HIDDEN, sorted(hidden))
        prefix = _wrapper({*members, *folders}, folders, top)
        self._members = {path.removeprefix(prefix): info for path, info in members.items() if path.startswith(prefix)}
        self._folders = sorted(path.removeprefix(prefix) for path in folders if path.startswith(prefix))
        self.findings.add("files beside the one folder", (path for path in members if not path.startswith(prefix)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Opened anew where it is unpickled: processes that share a file share its position."""
        return ZipTree, (self.root, self._top)

    def paths(self) -> list[str]:
        """All files but hidden ones and those of the system, sorted."""
        return sorted(self._members)

    def folders(self) -> list[str]:
        """All folders but hidden ones and those of the system, sorted."""
        return self._folders

    def read(self, path: str) -> bytes:
        """Content of one file; `ZipFile` guards its file position with a lock."""
        info = self._members.get(path)
        if info is None:
            raise FileNotFoundError("there is no such file")
        _check_size(info.file_size)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise OSError("a link, which is not followed in a zip file")
        with self._zip.open(info) as member:
            # No more than the size that was checked, whatever it inflates to.
            return member.read(info.file_size)

    def size(self, path: str) -> int:
        """Bytes of one file's content."""
        return self._members[path].file_size

    def repeated(self, paths: Iterable[str]) -> list[str]:
        """None: links in a zip file are not followed."""
        return []


def _path(info: zipfile.ZipInfo) -> str:
    """Where a member is, without what makes no difference."""
    name = info.filename
    if not info.flag_bits & 0x800 and not name.isascii():
        # Without the mark for UTF-8 a name is taken for cp437, which macOS and others leave out and write UTF-8.
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    if info.create_system == 0:
        name = name.replace("\\", "/")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _with_above(folder: str) -> list[str]:
    """The paths of a folder and of all those that it is in."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _hidden_part(folder: str) -> str:
    """The path of the outermost hidden folder that a folder is in or is; "" where there is none."""
    return next((path for path in _with_above(folder) if is_hidden(path.rpartition("/")[2])), "")


def _wrapper(paths: Collection[str], folders: Collection[str], top: Collection[str]) -> str:
    """The single folder to look through, with its slash, or ""."""
    at_top = [path for path in folders if "/" not in path]
    if len(at_top) != 1 or any(name in paths for name in top):
        return ""
    prefix = f"{at_top[0]}/"
    holds = any(prefix + name in paths for name in top) if top else any(path.startswith(prefix) for path in folders)
    return prefix if holds else ""


def open_tree(root: Path, key: str = "dataset.root", top: Collection[str] = ()) -> Tree:
    """A folder or a zip file as a tree of files; `top` as of `ZipTree`.

    Raises:
        ConfigError: there is neither, or it cannot be read.
    """
    if root.is_dir():
        return FolderTree(root)
    try:
        if root.is_file() and zipfile.is_zipfile(root):
            return ZipTree(root, top)
    except Exception as error:  # zipfile raises of its own, struct's, codecs' and others' on what is broken
        raise ConfigError(key, root, f"a zip file that can be read ({error or type(error).__name__})") from error
    raise ConfigError(key, root, "an existing folder or zip file of images")
