"""What the pixels of a file come to: depth, transparency, orientation; and that whatever is broken is one line."""

import io
import logging
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from cutlayer.datasets.images import EncodedImages, Shape, decode_image
from cutlayer.datasets.trees import FolderTree, ZipTree
from cutlayer.runtime.ground.config import ConfigError


def encoded(image: Image.Image, form: str = "PNG", **named: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **named)
    return file.getvalue()


def tiff(values: np.ndarray, *, bits: int, kind: int = 1, photometric: int = 1, order: str = "<") -> bytes:
    """A grey TIFF written by the specification: one strip, no compression; kind 1 is unsigned, 2 signed, 3 float."""
    height, width = values.shape
    if bits == 12:
        text = ["".join(f"{v:012b}" for v in row) for row in values.tolist()]
        data = b"".join(
            int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in text
        )
    else:
        data = values.astype(values.dtype.newbyteorder("<" if order == "<" else ">")).tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height),
            (279, len(data)), (339, kind)]  # fmt: skip
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    fields = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    return head + data + struct.pack(order + "H", len(tags)) + fields + bytes(4)


def scaled(values: np.ndarray, white: int) -> np.ndarray:
    """round(255 * v / white), halves upwards, in whole numbers only."""
    return np.array([[(510 * v + white) // (2 * white) for v in row] for row in values.tolist()], dtype=np.uint8)


def whole_numbers(dtype: str, most: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, most + 1, (9, 30)).astype(dtype)
    values[0, :3] = 0, most, most // 2
    return values


SIXTEEN = whole_numbers("u2", 65535)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(SIXTEEN)),
        b"P5\n30 9\n65535\n" + SIXTEEN.astype(">u2").tobytes(),
        tiff(SIXTEEN, bits=16),
        tiff(SIXTEEN, bits=16, order=">"),
    ],
    ids=["png", "pgm", "tiff", "big endian tiff"],
)
def test_grey_of_16_bits_is_scaled_by_its_kind(content: bytes, channels: int) -> None:
    found = decode_image(content, Shape(channels))
    assert found.shape == (channels, 9, 30)
    for channel in found:
        assert np.array_equal(channel, scaled(SIXTEEN, 65535))


def test_of_fewer_bits_the_largest_number_is_white() -> None:
    values = whole_numbers("u2", 4095)
    assert np.array_equal(decode_image(tiff(values, bits=12), Shape(1))[0], scaled(values, 4095))


def test_white_may_be_zero_in_a_tiff() -> None:
    inverted = decode_image(tiff(SIXTEEN, bits=16, photometric=0), Shape(1))[0]
    assert np.array_equal(inverted, np.floor(255.5 - SIXTEEN / 257).astype(np.uint8))


# Unsigned integers of 32 bits are read by Pillow in little-endian files only.
@pytest.mark.parametrize(("kind", "order"), [(1, "<"), (2, "<"), (2, ">"), (3, "<"), (3, ">")])
def test_what_is_white_may_be_said(kind: int, order: str) -> None:
    values = whole_numbers({1: "u4", 2: "i4", 3: "f4"}[kind], 4095)
    content = tiff(values, bits=32, kind=kind, order=order)
    assert np.array_equal(decode_image(content, Shape(1, white=4095))[0], scaled(values.astype(int), 4095))
    with pytest.raises(ValueError, match=r"dataset\.options\.white"):
        decode_image(content, Shape(1))
    with pytest.raises(ValueError, match="from 0 to 4095 where 0 to 4094 is expected"):
        decode_image(content, Shape(1, white=4094))


def test_unsigned_numbers_of_32_bits_stay_unsigned() -> None:
    values = whole_numbers("u4", 2**32 - 1)
    assert np.array_equal(decode_image(tiff(values, bits=32), Shape(1, white=2**32 - 1))[0], scaled(values, 2**32 - 1))


def test_images_of_one_kind_stay_comparable() -> None:
    """The same value is the same grey, whatever the range of the image that it is in."""
    values = np.linspace(0, 1, 40, dtype=np.float32).reshape(5, 8)
    for part in (values, values / 2, values / 8):
        expected = np.floor(part.astype(np.float64) * 255 + 0.5)
        assert np.array_equal(decode_image(tiff(part, bits=32, kind=3), Shape(1))[0], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.01, 1.01])
def test_floats_outside_of_the_range_are_refused(value: float) -> None:
    values = np.full((4, 4), 0.5, np.float32)
    values[2, 1] = value
    with pytest.raises(ValueError, match="where 0 to 1 is expected"):
        decode_image(tiff(values, bits=32, kind=3), Shape(1))


def test_signed_numbers_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="from -7 to 3 where"):
        decode_image(tiff(np.array([[-7, 3]], np.int16), bits=16, kind=2), Shape(1, white=100))


def transparent(mode: str) -> Image.Image:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 256, (8, 9, 4), dtype=np.uint8)
    values[:2, :5, :3], values[:2, 5:, :3] = 128, (10, 20, 30)
    rgba = Image.fromarray(values)
    if mode == "P with an index":
        return rgba.convert("RGB").quantize(7)
    return rgba.convert(mode)


TRANSPARENT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "RGBA": ("RGBA", "PNG", {}),
    "RGBA webp": ("RGBA", "WEBP", {"lossless": True, "exact": True}),
    "RGBA tiff": ("RGBA", "TIFF", {}),
    "LA": ("LA", "PNG", {}),
    "P with an index": ("P with an index", "PNG", {"transparency": 3}),
    "P with a table": ("P with an index", "PNG", {"transparency": bytes(range(0, 250, 40))}),
    "L with a level": ("L", "PNG", {"transparency": 128}),
    "1 with a level": ("1", "PNG", {"transparency": 0}),
    "RGB with a colour": ("RGB", "PNG", {"transparency": (10, 20, 30)}),
}


@pytest.mark.parametrize("background", [0, 255, 90])
@pytest.mark.parametrize("case", TRANSPARENT)
def test_transparent_images_lie_on_the_background(case: str, background: int) -> None:
    mode, form, named = TRANSPARENT[case]
    content = encoded(transparent(mode), form, **named)
    rgba = Image.open(io.BytesIO(content)).convert("RGBA")
    over = Image.alpha_composite(Image.new("RGBA", rgba.size, (background,) * 3 + (255,)), rgba)
    found = decode_image(content, Shape(3, background=background))
    assert np.array_equal(found, np.asarray(over.convert("RGB")).transpose(2, 0, 1))
    # And by arithmetic, to the rounding.
    colours, alpha = np.asarray(rgba, dtype=float)[..., :3], np.asarray(rgba, dtype=float)[..., 3:] / 255
    assert alpha.min() < 1
    assert np.abs(colours * alpha + background * (1 - alpha) - found.transpose(1, 2, 0)).max() <= 1
    grey = decode_image(content, Shape(1, background=background))[0]
    assert np.array_equal(grey, np.asarray(over.convert("RGB").convert("L")))


def test_grey_of_16_bits_with_a_transparent_level() -> None:
    values = np.array([[0, 1000, 65535]], dtype=np.uint16)
    body = b"tRNS" + (1000).to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    content = encoded(Image.fromarray(values))
    at = content.index(b"IDAT") - 4
    assert decode_image(content[:at] + chunk + content[at:], Shape(1, background=77))[0].tolist() == [[0, 77, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_opaque_images_are_what_torchvision_reads(mode: str) -> None:
    rng = np.random.default_rng(2)
    image = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).convert(mode)
    forms = {"CMYK": ["JPEG", "TIFF"], "YCbCr": ["JPEG"], "RGBA": ["PNG", "BMP"]}.get(mode, ["PNG", "BMP", "TIFF"])
    for form in forms:
        content = encoded(image, form)
        expected = Image.open(io.BytesIO(content)).convert("RGB")
        assert np.array_equal(decode_image(content, Shape(3)), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright_on_request(form: str) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    for orientation in range(10):
        exif = Image.Exif()
        exif[274] = orientation
        content = encoded(image, form, exif=exif)
        opened = Image.open(io.BytesIO(content))
        expected = np.asarray(ImageOps.exif_transpose(opened)).transpose(2, 0, 1)
        assert np.array_equal(decode_image(content, Shape(upright=True)), expected)
        assert (expected.shape == (3, 24, 16)) == (5 <= orientation <= 8)
        if form != "TIFF":  # which Pillow turns itself
            plain = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
            assert np.array_equal(decode_image(content, Shape()), plain)


def test_a_picture_is_not_refused_for_broken_exif_data() -> None:
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    assert decode_image(encoded(image, "JPEG", exif=b"Exif\0\0nothing at all"), Shape(upright=True)).shape == (3, 4, 6)


def read(tmp_path: Path, content: bytes, shape: Shape | None = None, name: str = "x.png") -> EncodedImages:
    (tmp_path / name).write_bytes(content)
    return EncodedImages(FolderTree(tmp_path), [name], shape or Shape())


GOOD = encoded(Image.fromarray(np.random.default_rng(4).integers(0, 256, (9, 9, 3), dtype=np.uint8)))


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 30,000 x 30,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return GOOD[:8] + chunk + GOOD[33:]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\xff\xd8\xffnothing", "."),
        (GOOD[:60], "truncated|broken"),
        (bomb(), "decompression bomb"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "cannot identify"),
        (b"\x89PNG\r\n\x1a\n" + b"\x1b[31m\n" * 40, "."),
        (b"P6\n0 4\n255\n", "."),
    ],
    ids=["empty", "stub", "cut", "bomb", "program", "garbage", "no pixels"],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"x\.png: expected a readable image in .*\(.*({reason})") as caught:
        read(tmp_path, content)
    assert str(caught.value).isprintable()


RAISED: list[type[Exception]] = [
    *(ValueError, KeyError, OverflowError, MemoryError, RecursionError, RuntimeError, NotImplementedError, EOFError),
    *(IndexError, AssertionError, UnicodeError, AttributeError, ZeroDivisionError, zlib.error, struct.error),
    *(Image.DecompressionBombError, zipfile.BadZipFile),
]


@pytest.mark.parametrize("kind", RAISED)
def test_whatever_a_decoder_raises_is_one_line(
    tmp_path: Path, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise kind()

    monkeypatch.setattr("cutlayer.datasets.images.open_image", broken)
    with pytest.raises(ConfigError, match=r"x\.png: expected a readable image in .*\(\w+\)"):
        read(tmp_path, GOOD)


def test_mutated_files_are_read_or_one_line(tmp_path: Path) -> None:
    random = Random(0)
    image = Image.open(io.BytesIO(GOOD))
    kinds = [("PNG", "RGB"), ("PNG", "P"), ("JPEG", "RGB"), ("BMP", "P"), ("WEBP", "RGB"), ("GIF", "P"), ("PPM", "L")]
    seeds = [encoded(image.convert(mode), form) for form, mode in kinds]
    seeds += [tiff(SIXTEEN, bits=16), encoded(image, "TIFF", compression="tiff_lzw")]
    refused: list[str] = []
    for turn in range(400):
        content = bytearray(seeds[turn % len(seeds)])
        for _ in range(random.choice([1, 2, 8])):
            content[random.randrange(min(len(content), 200))] = random.choice([0, 1, 127, 128, 255])
        try:
            read(tmp_path, bytes(content), Shape(3, (5, 5), upright=True)).decode_all(0)
        except ConfigError as error:
            refused.append(str(error))
    assert 40 < len(refused) < 300
    assert [text for text in refused if "x.png" not in text or not text.isprintable()] == []


def archive(file: Path, members: dict[str, bytes], **named: Any) -> Path:
    with zipfile.ZipFile(file, "w", **named) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return file


def patched(file: Path, at: int, value: int) -> Path:
    """Change 16 bits of the only member's entry: at `at` in the list, and 2 less in the header before the member."""
    content = bytearray(file.read_bytes())
    for place in (content.index(b"PK\x01\x02") + at, content.index(b"PK\x03\x04") + at - 2):
        content[place : place + 2] = value.to_bytes(2, "little")
    file.write_bytes(bytes(content))
    return file


@pytest.mark.parametrize(
    ("at", "value", "reason"), [(8, 1, "encrypted"), (10, 9, "compression method"), (10, 97, "compression method")]
)
def test_a_member_that_cannot_be_unpacked_is_named(tmp_path: Path, at: int, value: int, reason: str) -> None:
    file = patched(archive(tmp_path / "pictures.zip", {"a/b.png": GOOD}), at, value)
    with pytest.raises(ConfigError, match=rf"a/b\.png: .* in .*pictures\.zip .*{reason}"):
        EncodedImages(ZipTree(file), ["a/b.png"], Shape())


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    file = archive(tmp_path / "pictures.zip", {"a/b.png": GOOD})
    content = file.read_bytes()
    file.write_bytes(content[:90] + bytes([content[90] ^ 1]) + content[91:])
    with pytest.raises(ConfigError, match=r"a/b\.png: .* in .*pictures\.zip .*CRC"):
        EncodedImages(ZipTree(file), ["a/b.png"], Shape())


def test_no_more_is_unpacked_than_an_image_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cutlayer.datasets.trees.MOST_BYTES", 1000)
    large = GOOD + bytes(100_000)
    file = archive(tmp_path / "pictures.zip", {"b.png": large}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ConfigError, match=r"b\.png: .*more than an image may have"):
        EncodedImages(ZipTree(file), ["b.png"], Shape())
    with pytest.raises(ConfigError, match=r"x\.png: .*more than an image may have"):
        read(tmp_path, large)


def test_a_member_that_lies_about_its_size_takes_no_more_memory_than_it_says(tmp_path: Path) -> None:
    size = 30_000_000
    file = archive(tmp_path / "pictures.zip", {"b.png": bytes(size)}, compression=zipfile.ZIP_DEFLATED)
    content = file.read_bytes()
    at = content.index(b"PK\x01\x02") + 24
    file.write_bytes(content[:at] + (10).to_bytes(4, "little") + content[at + 4 :])
    tree = ZipTree(file)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=r"b\.png: expected a readable image"):
            EncodedImages(tree, ["b.png"], Shape())
        assert tracemalloc.get_traced_memory()[1] < size / 10
    finally:
        tracemalloc.stop()


def test_an_image_too_long_for_its_breadth_is_refused(tmp_path: Path) -> None:
    content = encoded(Image.new("L", (60_000, 1)))
    with pytest.raises(ConfigError, match="60000x1 pixels, too long for its breadth"):
        read(tmp_path, content, Shape(3, (224, 224), 256)).decode_all(0)


def test_frames_that_are_not_read_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (Image.new("L", (4, 4), level) for level in (10, 20))
    for form, name in (("TIFF", "a.tif"), ("GIF", "b.png"), ("TIFF", "c.tif")):
        content = encoded(first, form, save_all=True, append_images=[second])
        (tmp_path / name).write_bytes(content)
    tree = FolderTree(tmp_path)
    with caplog.at_level(logging.INFO):
        found = EncodedImages(tree, tree.paths(), Shape(1)).decode_all(0)
    assert found.unique().tolist() == [10]
    assert [record.getMessage() for record in caplog.records] == [
        "a.tif has several frames; of such files only the first frame is read"
    ]


@pytest.mark.parametrize(("most", "said"), [(4095, True), (65535, False), (20_000, False)])
def test_a_range_hardly_used_is_said(tmp_path: Path, most: int, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    images = read(tmp_path, encoded(Image.fromarray(whole_numbers("u2", most))))
    images.decode_all(0)
    images.report_depth()
    assert ("dataset.options.white=4095" in caplog.text) == said
