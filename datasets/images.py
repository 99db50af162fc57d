"""Encoded image files that decode, by several threads, to uint8 tensors of one shape."""

import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from runtime.config import ConfigError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class Tree(Protocol):
    """Files below a folder, by their path in it with forward slashes."""

    def paths(self) -> list[str]:
        """All files, sorted."""
        ...

    def read(self, path: str) -> bytes:
        """Content of one file; safe to call from several threads."""
        ...


class FolderTree:
    """A folder on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def paths(self) -> list[str]:
        """All files below the folder, sorted; links to folders are followed."""
        found = []
        for folder, _, files in os.walk(self.root, followlinks=True):
            inside = Path(folder).relative_to(self.root).as_posix()
            prefix = "" if inside == "." else f"{inside}/"
            found += [prefix + file for file in files]
        return sorted(found)

    def read(self, path: str) -> bytes:
        """Content of one file."""
        return (self.root / path).read_bytes()


class ZipTree:
    """A zip file, read in place; a single folder that holds everything in it is looked through."""

    def __init__(self, file: Path) -> None:
        self._zip = zipfile.ZipFile(file)
        names = [name for name in self._zip.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
        tops = {name.split("/", 1)[0] for name in names}
        nested = len(tops) == 1 and all(name.count("/") >= 2 for name in names)
        self._prefix = f"{tops.pop()}/" if nested else ""
        self._names = sorted(name.removeprefix(self._prefix) for name in names)

    def paths(self) -> list[str]:
        """All files in the archive, sorted."""
        return self._names

    def read(self, path: str) -> bytes:
        """Content of one file; `ZipFile` guards its file position with a lock."""
        return self._zip.read(self._prefix + path)


def open_tree(root: Path, key: str = "dataset.root") -> Tree:
    """A folder or a zip file as a tree of files; ConfigError when there is neither."""
    if root.is_dir():
        return FolderTree(root)
    if root.is_file() and zipfile.is_zipfile(root):
        return ZipTree(root)
    raise ConfigError(key, root, "an existing folder or zip file of images")


@dataclass(frozen=True)
class Shape:
    """How a file becomes a tensor.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        size: height and width in pixels, or None to keep what the file has (all files must then agree).
        resize: with a size: scale the shorter side to this many pixels, then cut `size` from the centre, as
            torchvision's Resize and CenterCrop do; None squeezes the whole image into `size`.
    """

    channels: int = 3
    size: tuple[int, int] | None = None
    resize: int | None = None


def decode(content: bytes, shape: Shape) -> np.ndarray:
    """Decode one file: uint8 [channels, height, width]."""
    with Image.open(io.BytesIO(content)) as image:
        if shape.size is not None:
            # A JPEG can be decoded at a fraction of its size, which is most of the time for large pictures. Twice the
            # size that is needed leaves the quality to the resampling filter.
            least = 2 * max(*shape.size, shape.resize or 0)
            image.draft(None, (least, least))
        picture = image.convert("L" if shape.channels == 1 else "RGB")
    if shape.size is not None:
        picture = _fit(picture, shape.size, shape.resize)
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _fit(picture: Image.Image, size: tuple[int, int], resize: int | None) -> Image.Image:
    height, width = size
    if resize is None:
        return picture.resize((width, height), Image.Resampling.BILINEAR)
    short = min(picture.size)
    scaled = (resize * picture.width // short, resize * picture.height // short)
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    return picture.resize(scaled, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))


class EncodedImages:
    """Image files that all decode to one shape.

    Args:
        tree: where the files are.
        paths: one path for each sample.
        shape: how to decode; where it has no size, the first file decides and all others must agree.
    """

    def __init__(self, tree: Tree, paths: Sequence[str], shape: Shape) -> None:
        self._tree, self._decode = tree, shape
        self._paths = list(paths)
        if shape.size is None and len(paths):
            first = self._read(paths[0])
            self.shape: tuple[int, int, int] = (shape.channels, first.shape[1], first.shape[2])
        else:
            height, width = shape.size or (0, 0)
            self.shape = (shape.channels, height, width)

    def __len__(self) -> int:
        return len(self._paths)

    def subset(self, indices: np.ndarray) -> "EncodedImages":
        """The same files, only those at `indices`."""
        size = (self.shape[1], self.shape[2])
        made = EncodedImages(self._tree, [], Shape(self._decode.channels, size, self._decode.resize))
        made._paths, made._decode = [self._paths[i] for i in indices.tolist()], self._decode
        return made

    def decode_into(self, out: np.ndarray, indices: np.ndarray) -> None:
        """Decode the files at `indices` into `out`, uint8 [len(indices), channels, height, width].

        Raises:
            ConfigError: a file cannot be decoded or has another shape than the first.
        """
        for row, index in zip(out, indices.tolist(), strict=True):
            path = self._paths[index]
            pixels = self._read(path)
            if pixels.shape != self.shape:
                expected = "x".join(map(str, self.shape[1:]))
                found = "x".join(map(str, pixels.shape[1:]))
                raise ConfigError("dataset.options.size", None, f"a size to resize to: {path} has {found} pixels "
                                  f"(height x width), the first image {expected}")  # fmt: skip
            row[...] = pixels

    def _read(self, path: str) -> np.ndarray:
        try:
            return decode(self._tree.read(path), self._decode)
        except (OSError, SyntaxError, zipfile.BadZipFile) as error:
            raise ConfigError("dataset.root", path, f"a readable image ({error})") from error

    def decode_all(self, workers: int) -> Tensor:
        """All images, uint8 [n, channels, height, width], decoded by `workers` threads."""
        out = torch.empty((len(self), *self.shape), dtype=torch.uint8)
        pieces = list(_pieces(len(self), 64))
        if workers == 0:
            for piece in pieces:
                self.decode_into(out.numpy()[piece], np.arange(len(self))[piece])
            return out
        with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
            jobs = [pool.submit(self.decode_into, out.numpy()[piece], np.arange(len(self))[piece]) for piece in pieces]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return out


def _pieces(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
