"""Encoded image files that decode, by several threads, to uint8 tensors of one shape."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cutlayer.datasets.boxes import random_boxes
from cutlayer.datasets.notes import Notes
from cutlayer.datasets.pixels import deep_grey, eight_bits, has_frames, is_deep, open_image, upright
from cutlayer.datasets.trees import Tree
from cutlayer.runtime.ground.config import NO_VALUE, ConfigError

_SIZES, _CONTENTS = 200_000, 64
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# As many as Pillow decodes.
MOST_PIXELS = 178_956_970
_SHOWN_PATH, _SHOWN_REASON = 110, 200


@dataclass(frozen=True)
class Shape:
    """How a file becomes a tensor.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        size: height and width in pixels, or None to keep what the file has (all files must then agree).
        resize: with a size: scale the shorter side to this many pixels, then cut `size` from the centre, as
            torchvision's Resize and CenterCrop do; None squeezes the whole image into `size`.
        background: the grey level, 0 to 255, that shows where an image is transparent.
        white: the value that stands for white in grey images of more than 8 bits; None as `pixels.deep_grey` says.
        upright: turn pictures as their EXIF data say.
    """

    channels: int = 3
    size: tuple[int, int] | None = None
    resize: int | None = None
    background: int = 255
    white: float | None = None
    upright: bool = False


def decode_image(content: bytes, shape: Shape) -> np.ndarray:
    """Decode one file, of several frames the first: uint8 [channels, height, width]."""
    return _decoded(content, shape)[0]


class _Seen(NamedTuple):
    """What came to light when a file was decoded: several frames; what `pixels.deep_grey` says of the image."""

    frames: bool
    depth: tuple[float, float] | None


Crop = Callable[[Image.Image], Image.Image]
"""What makes an image of the wanted size of a whole picture."""


def _decoded(content: bytes, shape: Shape, cut: Crop | None = None) -> tuple[np.ndarray, _Seen]:
    depth = None
    with open_image(content) as image:
        frames = has_frames(image)
        if shape.size is not None and cut is None:
            # A JPEG can be decoded at a fraction of its size, which is most of the time for large pictures. Twice the
            # size that is needed leaves the quality to the resampling filter.
            least = 2 * max(*shape.size, shape.resize or 0)
            image.draft(None, (least, least))
        image.load()
        if is_deep(image):
            picture, depth = deep_grey(image, white=shape.white, background=shape.background)
        else:
            picture = eight_bits(image, channels=shape.channels, background=shape.background)
        if shape.upright:
            picture = upright(picture, image)
    if cut is not None:
        picture = cut(picture)
    elif shape.size is not None:
        picture = _fit(picture, shape.size, shape.resize)
    pixels = np.asarray(picture)
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (shape.channels, *pixels.shape)), _Seen(frames, depth)
    return pixels.transpose(2, 0, 1), _Seen(frames, depth)


def _fit(picture: Image.Image, size: tuple[int, int], resize: int | None) -> Image.Image:
    height, width = size
    if resize is None:
        return picture.resize((width, height), Image.Resampling.BILINEAR)
    short = min(picture.size)
    scaled = (resize * picture.width // short, resize * picture.height // short)
    if scaled[0] * scaled[1] > MOST_PIXELS:
        raise ValueError(f"{picture.width}x{picture.height} pixels, too long for its breadth to scale to {resize}")
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    return picture.resize(scaled, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))


class EncodedImages:
    """Image files that all decode to one shape.

    Args:
        tree: where the files are.
        paths: one path for each sample.
        shape: how to decode; where it has no size, the first file decides and all others must agree.
        notes: those of another set of the same files, to start with.
    """

    def __init__(self, tree: Tree, paths: Sequence[str], shape: Shape, notes: Notes | None = None) -> None:
        self._tree, self._decode = tree, shape
        self.notes = Notes() if notes is None else notes
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
        made = EncodedImages(self._tree, [], Shape(self._decode.channels, size, self._decode.resize), self.notes)
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

    @property
    def is_cut(self) -> bool:
        """Whether an image is only the centre of its picture."""
        return self._decode.size is not None and self._decode.resize is not None

    def crop_into(self, out: np.ndarray, indices: np.ndarray, uniform: Tensor, area: tuple[float, float]) -> None:
        """Cut a box out of each whole picture at `indices` and scale it to the size of an image, into `out`.

        The same as torchvision's `resized_crop` of a PIL image: bilinear with antialiasing.

        Args:
            out: uint8 [k, channels, height, width]; indices: int64 [k].
            uniform, area: as of `boxes.random_boxes`, float32 [k, 22 or more].

        Raises:
            ConfigError: a file cannot be decoded.
        """
        size = (self.shape[2], self.shape[1])
        for row, index, numbers in zip(out, indices.tolist(), uniform.split(1), strict=True):

            def cut(picture: Image.Image, numbers: Tensor = numbers) -> Image.Image:
                top, left, height, width = random_boxes(numbers, picture.height, picture.width, area)[0].tolist()
                box = picture.crop((int(left), int(top), int(left + width), int(top + height)))
                return box.resize(size, Image.Resampling.BILINEAR)

            row[...] = self._read(self._paths[index], cut)

    def _read(self, path: str, cut: Crop | None = None) -> np.ndarray:
        try:
            pixels, seen = _decoded(self._tree.read(path), self._decode, cut)
        except Exception as error:  # decoders raise what they like on what is broken or hostile, MemoryError too
            name = path if len(path) <= _SHOWN_PATH else f"...{path[-_SHOWN_PATH:]}"
            reason = str(error)[:_SHOWN_REASON] or type(error).__name__
            raise ConfigError("dataset.root", name, f"a readable image in {self._tree.root} ({reason})") from error
        if seen.frames:
            self.notes.once("frames", f"{path} has several frames; of such files only the first frame is read")
        if seen.depth is not None:
            self.notes.deep(*seen.depth)
        return pixels

    def report_depth(self) -> None:
        """Say where grey images of more than 8 bits, if they were decoded, use a small part of their range."""
        if self.notes.brightest is None or self._decode.white is not None:
            return
        largest, white = self.notes.brightest
        if largest < white / 4:
            text = f"values in grey images of more than 8 bits reach {largest:g} only, where {white:g} stands for white"
            self.notes.once("depth", f"{text}; dataset.options.white={largest:g} makes the most of them")

    def sum(self) -> str:
        """A sum (SHA-256) of all names, of the sizes of up to 200,000 evenly spaced files, and of the bytes of 64."""
        digest = hashlib.sha256("\0".join(self._paths).encode(errors="surrogateescape"))
        try:
            for path in _spaced(self._paths, _SIZES):
                digest.update(self._tree.size(path).to_bytes(8, "little"))
            for path in _spaced(self._paths, _CONTENTS):
                digest.update(self._tree.read(path))
        except Exception as error:  # of the file system or an archive's
            raise ConfigError("dataset.root", NO_VALUE, f"{self._tree.root} cannot be read ({error})") from error
        return digest.hexdigest()

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


def _spaced(paths: list[str], count: int) -> list[str]:
    """At most so many of the paths, evenly spaced."""
    if len(paths) <= count:
        return paths
    return [paths[at] for at in np.linspace(0, len(paths) - 1, count).astype(np.int64).tolist()]


def _pieces(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
