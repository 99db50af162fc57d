"""Numbers of bytes in the decimal units that papers count in."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """A number of bytes in decimal units, e.g. "12.2 GB", as the papers count."""
    size, unit = byte_unit(count)
    return f"{count / size:.{0 if size == 1 else 2 if count < 10 * size else 1}f} {unit}"


def byte_unit(largest: float) -> tuple[float, str]:
    """Size and name of the decimal unit in which a magnitude reads best: (1e6, "MB") for 12_000_000."""
    units = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next(((size, name) for name, size in units if largest >= size), (1.0, "B"))
