"""Independent random streams from the run's seed."""

import zlib

import numpy as np


def derived(seed: int, purpose: str) -> np.random.Generator:
    """A generator for one purpose: the same for the same seed, unrelated to those of other purposes."""
    return np.random.default_rng([seed % (1 << 64), zlib.crc32(purpose.encode())])
