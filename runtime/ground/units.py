"""Numbers as people read them: bytes in the decimal units that papers count in, accuracies in percent."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """A number of bytes in decimal units, e.g. "12.2 GB", as the papers count."""
    size, unit = byte_unit(count)
    return f"{count / size:.{0 if size == 1 else 2 if count < 10 * size else 1}f} {unit}"


def format_percent(accuracy: float | None) -> str:
    """A fraction in percent, e.g. "95.83%"; "-" for None."""
    return "-" if accuracy is None else f"{accuracy:.2%}"


def byte_unit(largest: float) -> tuple[float, str]:
    """Size and name of the decimal unit in which a magnitude reads best: (1e6, "MB") for 12_000_000."""
    units = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next(((size, name) for name, size in units if largest >= size), (1.0, "B"))
