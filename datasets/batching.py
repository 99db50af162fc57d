"""How many batches an epoch has, and how large each is."""

from typing import Literal

DropLast = bool | Literal["auto", "always", "never"]


def batch_sizes(n: int, batch_size: int, drop_last: DropLast = False) -> list[int]:
    """Sizes of the batches of one epoch over `n` samples.

    Args:
        n: samples, 0 gives no batch.
        batch_size: samples in a full batch, at least 1.
        drop_last: True or "always" leaves out a last batch that is not full; False or "never" keeps it; "auto" leaves
            it out only when it is a single sample and not the only batch, so that BatchNorm never sees one sample
            where it need not.

    Raises:
        ValueError: batch_size below 1, or an unknown `drop_last`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected an integer >= 1")
    full, rest = divmod(n, batch_size)
    if drop_last == "auto":
        keep = rest > 1 or (rest == 1 and full == 0)
    elif drop_last in (True, False, "always", "never"):
        keep = rest > 0 and drop_last in (False, "never")
    else:
        raise ValueError(f"drop_last={drop_last!r}: expected auto, always or never")
    return [batch_size] * full + ([rest] if keep else [])


def batch_count(n: int, batch_size: int, drop_last: DropLast = False) -> int:
    """Batches of one epoch over `n` samples; see `batch_sizes`."""
    return len(batch_sizes(n, batch_size, drop_last))
