"""From the mode that an image file has to 8 bits of grey or RGB: depth, transparency, orientation."""

import contextlib
import importlib
import io

import numpy as np
from PIL import Image

# What the suffixes stand for, and what is often found under a wrong one. Others start programs, as EPS does.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
Image.preinit()
for plugin in ("Tiff", "WebP", "Jpeg2K", "Avif"):
    with contextlib.suppress(ImportError):  # a Pillow before 11.3 has no AVIF
        importlib.import_module(f"PIL.{plugin}ImagePlugin")
IMAGE_FORMATS = tuple(name for name in _FORMATS if name in Image.OPEN)

# How to turn a picture upright, by EXIF's orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 274, 258, 262, 339


def open_image(content: bytes) -> Image.Image:
    """An image whose pixels are not decoded yet. Raises many kinds of exception for what is broken."""
    if not content:
        raise ValueError("the file is empty")
    image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    if min(image.size) < 1:
        raise ValueError("it has no pixels")
    return image


def has_frames(image: Image.Image) -> bool:
    """Whether a file that was opened holds several pictures; those that cameras add to a JPEG do not count."""
    return bool(getattr(image, "is_animated", False)) and image.format != "MPO"


def is_deep(image: Image.Image) -> bool:
    """Whether it is a grey image of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def eight_bits(image: Image.Image, *, channels: int, background: int = 255) -> Image.Image:
    """An image of at most 8 bits a channel as "L" or "RGB".

    Args:
        channels: 1 or 3.
        background: the grey level, 0 to 255, that shows where the image is transparent.
    """
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        behind = Image.new("RGBA", picture.size, (background, background, background, 255))
        image = Image.alpha_composite(behind, picture).convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def deep_grey(
    image: Image.Image, *, white: float | None = None, background: int = 255
) -> tuple[Image.Image, tuple[float, float]]:
    """A grey image of more than 8 bits as "L": each value times 255 / `white`, rounded to the nearest.

    Args:
        white: the value that becomes white; None is what its kind says: 65535 (or 2^n - 1 where a TIFF has fewer bits)
            for 16 bits, 1 for floats. The same for all images of a kind, so that they stay comparable.
        background: the grey level of the value that a PNG declares transparent.

    Returns:
        The image, and (its largest value, what stands for white).

    Raises:
        ValueError: its kind does not say what is white, or a value is below 0, above `white` or no number.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(_SAMPLE_FORMAT, (1,)) == (1,) and tags.get(_BITS_PER_SAMPLE) == (32,):
        values = values.view(np.uint32)  # Pillow has no mode for it
    full = _white(image) if white is None else white
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= full):
        # Not a number compares as false with all.
        found = "values that are no number" if low != low else f"values from {low:g} to {high:g}"
        raise ValueError(f"{found} where 0 to {full:g} is expected; dataset.options.white says what is white")
    transparent = image.info.get("transparency")
    scaled = values * np.float64(255 / full)
    if tags.get(_PHOTOMETRIC) == 0:
        scaled = 255 - scaled
    grey = np.floor(scaled + 0.5).astype(np.uint8)
    if isinstance(transparent, int):
        grey[values == transparent] = background
    return Image.fromarray(grey), (high, full)


def _white(image: Image.Image) -> float:
    if image.mode == "F":
        return 1.0
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        return float(2**bits - 1) if 8 < bits < 16 else 65535.0
    if image.format in ("PNG", "PPM"):  # Pillow brings what these hold to 16 bits
        return 65535.0
    raise ValueError("whole numbers of 32 bits or with a sign; dataset.options.white has to say which of them is white")


def upright(image: Image.Image, source: Image.Image) -> Image.Image:
    """Turned or mirrored as the EXIF data of `source`, the opened file whose pixels have been decoded, say."""
    try:
        orientation = source.getexif().get(_ORIENTATION)
    except Exception:  # an image is not refused for the broken EXIF data beside it
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)
