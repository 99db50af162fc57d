"""Randomness derived from (seed, round, client, stream), never from the history of a global generator.

The same seed therefore gives the same numbers whatever the order in which clients run, the number of workers or the
transport, and a resumed run needs no stored generator state.
"""

from __future__ import annotations

import hashlib
from types import TracebackType

import numpy as np
import torch

SERVER = -1
"""The client number of the server's own streams."""


def derive(seed: int, *, round: int = -1, client: int = SERVER, stream: str) -> int:
    """A 63-bit seed for one stream of one party in one round (``round=-1``: outside any round)."""
    key = f"{seed}/{round}/{client}/{stream}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, *, round: int = -1, client: int = SERVER, stream: str) -> torch.Generator:
    """A CPU generator of its own for one stream."""
    return torch.Generator().manual_seed(derive(seed, round=round, client=client, stream=stream))


def numpy_generator(seed: int, *, round: int = -1, client: int = SERVER, stream: str) -> np.random.Generator:
    """A numpy generator of its own for one stream."""
    return np.random.default_rng(derive(seed, round=round, client=client, stream=stream))


class TorchStream:
    """A party's own torch random stream: in place inside ``with stream:``, put away outside it.

    Interleaved clients each advance their own stream, so dropout, noise and the like do not depend on who ran before.
    On a GPU the generator's state is its seed and offset, kept on the host: swapping it forces no synchronisation.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            index = device.index or 0
            self._generators.append(torch.cuda.default_generators[index])
        self._seed = seed
        self._first: list[torch.Tensor] = []
        self._inner: list[torch.Tensor] | None = None
        self._outer: list[torch.Tensor] = []

    @property
    def drawn(self) -> bool:
        """Whether a number was drawn from it."""
        return any(not torch.equal(*states) for states in zip(self._first, self._inner or [], strict=True))

    def __enter__(self) -> TorchStream:
        self._outer = [generator.get_state() for generator in self._generators]
        for index, generator in enumerate(self._generators):
            if self._inner is None:
                generator.manual_seed(self._seed)
                self._first.append(generator.get_state())
            else:
                generator.set_state(self._inner[index])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, self._outer, strict=True):
            generator.set_state(state)
