"""Fuzz what reads image files and zip files of them, by atheris (libFuzzer).

    pip install atheris
    python -m fuzz.fuzz_images -max_total_time=600

Whatever the bytes are, they come to uint8 pixels of the shape that was asked for, or to a ConfigError of one line that
names the file. The first byte of an input chooses how it is read, and whether it is a zip file or one image.
"""

import io
import logging
import struct
import tempfile
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from random import Random

import atheris
import numpy as np

with atheris.instrument_imports(
    include=["PIL", "cutlayer.datasets.classes", "cutlayer.datasets.images", "cutlayer.datasets.pixels"]
):
    from PIL import Image

    from cutlayer.datasets import images, pixels, trees

from cutlayer.datasets.folders import ImageFolderOptions, image_folder
from cutlayer.datasets.notes import Findings
from cutlayer.datasets.registry import ReadContext
from cutlayer.runtime.ground.config import ConfigError
from fuzz.harness import run

OPTIONS = (
    ImageFolderOptions(train=".", test=None, classes=["a", "b"]),
    ImageFolderOptions(train=".", test=None, classes=["a", "b"], channels=1, white=300, background=0),
    ImageFolderOptions(train=".", test=None, classes=["a", "b"], size=5),
    ImageFolderOptions(train=".", test=None, classes=["a", "b"], size=6, resize=9, channels=1, upright=False),
)
ZIPPED = 128  # a first byte from which on the rest is a zip file
NAME = "a/picture.png"


class One:
    """A tree of a single file."""

    root = Path("memory")
    findings = Findings()

    def __init__(self, content: bytes) -> None:
        self._content = content

    def paths(self) -> list[str]:
        return [NAME]

    def folders(self) -> list[str]:
        return ["a"]

    def read(self, path: str) -> bytes:
        return self._content

    def size(self, path: str) -> int:
        return len(self._content)

    def repeated(self, paths: Iterable[str]) -> list[str]:
        return []


def target(data: bytes) -> None:
    """Read one input."""
    if not data:
        return
    options = OPTIONS[data[0] % len(OPTIONS)]
    try:
        if data[0] < ZIPPED:
            check(images.EncodedImages(One(data[1:]), [NAME], options.shape), options)
        else:
            ARCHIVE.write_bytes(data[1:])
            found = image_folder(ReadContext(ARCHIVE, options))
            for split in (found.train, found.test):
                assert isinstance(split.inputs, images.EncodedImages)
                check(split.inputs, options)
    except ConfigError as error:
        text = str(error)
        assert 0 < len(text) < 1000, text
        assert not any(unicodedata.category(each).startswith("C") and each < "\xa0" for each in text), text
        text.encode()
        assert data[0] >= ZIPPED or "picture.png" in text, text


def check(found: images.EncodedImages, options: ImageFolderOptions) -> None:
    """All pictures have the shape that was asked for."""
    decoded = found.decode_all(0).numpy()
    assert decoded.dtype == np.uint8
    assert decoded.shape[:2] == (len(found), options.channels)
    if options.size is not None:
        assert decoded.shape[2:] == (options.size, options.size)
    assert decoded.size or not len(found)


def mutate(data: bytes, random: Random) -> bytes:
    """Change how an input is read, its bytes, the fields of its format, or the members of its archive."""
    first, rest = data[:1] or b"\0", data[1:]
    if random.random() < 0.05:
        first = bytes([random.randrange(256)])
    if first[0] >= ZIPPED and random.random() < 0.7:
        return first + mutate_zip(rest, random)
    return first + mutate_image(rest, random)


def mutate_image(raw: bytes, random: Random) -> bytes:
    """Change an image file, and mend the checksums of a PNG mostly."""
    choice = random.randrange(6)
    if choice == 0 or len(raw) < 16:
        changed = atheris.Mutate(raw, len(raw) + 64)
    elif choice == 1:
        changed = raw[: random.randrange(len(raw))] + random.choice([b"", bytes(16), random.choice(SEEDS)[1:]])
    else:
        changed = bytearray(raw)
        for _ in range(random.choice([1, 1, 2, 4, 16])):
            # Sizes, counts and offsets are near the beginning of most formats.
            at = random.randrange(min(len(raw) - 8, 256)) if random.random() < 0.6 else random.randrange(len(raw) - 8)
            telling = random.choice(
                [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
            )
            form = random.choice(["<H", ">H", "<I", ">I", "B"])
            size = struct.calcsize(form)
            changed[at : at + size] = struct.pack(form, telling % 2 ** (8 * size))
        changed = bytes(changed)
    return mended(changed) if random.random() < 0.9 else changed


def mended(raw: bytes) -> bytes:
    """A PNG with the checksums of its chunks made right; anything else as it is."""
    if not raw.startswith(b"\x89PNG\r\n\x1a\n"):
        return raw
    made, at = raw[:8], 8
    while at + 12 <= len(raw):
        length = int.from_bytes(raw[at : at + 4], "big")
        body = raw[at + 4 : at + 8 + length]
        made += raw[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        at += 12 + length
    return made


def mutate_zip(raw: bytes, random: Random) -> bytes:
    """Change one member of an archive or its entry in the list, and write the archive anew; or change its bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        members = []
    if not members or random.random() < 0.4:
        return mutate_image(raw, random)
    at = random.randrange(len(members))
    name, content = members[at]
    choice = random.randrange(4)
    if choice == 0:
        members[at] = random.choice(odd_names(name)), content
    elif choice == 1:
        members.append((name, random.choice(SEEDS)[1:]))
    else:
        members[at] = name, mutate_image(content, random)
    made = zipped(members, random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))
    if random.random() < 0.3:  # encrypted, Deflate64, a wrong size: in the list at the end and before the member
        for mark, place in ((b"PK\x01\x02", random.choice([8, 10, 20, 24, 28, 38, 42])), (b"PK\x03\x04", 6)):
            entry = made.find(mark)
            made = made[: entry + place] + random.choice([b"\1", b"\x09", b"\xff"]) + made[entry + place + 1 :]
    return made


def odd_names(name: str) -> list[str]:
    """What may stand in an archive in the place of a name."""
    return [
        *(
            f"{name}x",
            f"../{name}",
            f"/{name}",
            name.upper(),
            f"top/{name}",
            "a",
            "a/b/",
            f".x/{name}",
            f"\u00fc/{name}",
        ),
        *("a\n\x1b[31m.png", "a\\b.png", name.replace("a", "\udcff"), "a" * 300 + ".png"),
    ]


def zipped(members: list[tuple[str, bytes]], method: int) -> bytes:
    """An archive of members, as bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            try:
                archive.writestr(name, content)
            except UnicodeError:  # a name that is no UTF-8
                archive.writestr("\u00ff" + name.encode("ascii", "ignore").decode(), content)
    return file.getvalue()


def seeds() -> list[bytes]:
    """Small pictures of every kind that is read, each as one file and some in an archive."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (9, 12, 4), dtype=np.uint8)
    whole = Image.fromarray(values)
    deep = Image.fromarray(rng.integers(0, 65536, (9, 12)).astype(np.uint16))
    single = Image.fromarray(rng.random((9, 12)).astype(np.float32))
    modes = {mode: whole.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
    modes["CMYK"] = modes["RGB"].convert("CMYK")
    exif = Image.Exif()
    exif[274] = 6
    made = [(image, "PNG", {}) for mode, image in modes.items() if mode != "CMYK"]
    made += [(modes["P"], "PNG", {"transparency": 3}), (deep, "PNG", {}), (modes["RGB"], "PNG", {"exif": exif})]
    made += [(modes["L"], "PNG", {"save_all": True, "append_images": [modes["L"].rotate(90)]})]
    made += [(modes[mode], "JPEG", {"exif": exif}) for mode in ("L", "RGB", "CMYK")]
    made += [(modes["RGB"], "JPEG", {"progressive": True})]
    made += [(modes[mode], "BMP", {}) for mode in ("1", "L", "P", "RGB", "RGBA")]
    made += [(modes[mode], "WEBP", {"lossless": mode == "RGBA", "exif": exif}) for mode in ("RGB", "RGBA")]
    made += [(image, "TIFF", {}) for image in (*modes.values(), deep, single, deep.convert("I"))]
    made += [(modes["RGB"], "TIFF", {"compression": kind}) for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits")]
    made += [(modes["RGB"], "TIFF", {"save_all": True, "append_images": [modes["L"]], "exif": exif})]
    made += [(modes[mode], "PPM", {}) for mode in ("1", "L", "RGB")] + [(deep, "PPM", {})]
    made += [(modes["P"], "GIF", {"save_all": True, "append_images": [modes["P"].rotate(180)], "transparency": 1})]
    made += [(modes["RGBA"], kind, {}) for kind in ("JPEG2000", "AVIF") if kind in pixels.IMAGE_FORMATS]
    files: list[bytes] = []
    for image, form, named in made:
        file = io.BytesIO()
        image.save(file, form, **named)
        files.append(file.getvalue())
    files.append(b"P3\n3 2\n15\n" + b"1 2 3 4 5 6 " * 3)
    members = [(f"{name}/{at}.png", files[at * 2 + (name == "b")]) for at in range(4) for name in "ab"]
    methods = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2
    archives = [zipped(members, method) for method in methods]
    return [
        *(bytes([which]) + file for file in files for which in range(len(OPTIONS))),
        *(bytes([ZIPPED + which]) + archive for archive in archives for which in range(len(OPTIONS))),
    ]


if __name__ == "__main__":
    logging.disable()
    warnings.simplefilter("ignore")  # Pillow's, on EXIF data and large pictures
    Image.MAX_IMAGE_PIXELS = images.MOST_PIXELS = 2**18
    trees.MOST_BYTES = 2**22
    SEEDS = seeds()
    with tempfile.TemporaryDirectory(prefix="fuzz-zip-") as folder:
        ARCHIVE = Path(folder) / "pictures.zip"
        for seed in SEEDS:
            target(seed)
        run(target, mutate, SEEDS, max_bytes=2**14)
