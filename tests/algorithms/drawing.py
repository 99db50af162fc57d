"""What a run draws, made again from the derivation that docs/architecture.md gives ("Randomness"), for bare loops.

Nothing here calls the platform's own drawing: only its images, its partition and its configuration are taken.
"""

import hashlib
from fractions import Fraction

import numpy as np
import torch

from cutlayer.runtime.rounds.federation import Federation

Batch = tuple[torch.Tensor, torch.Tensor]
SERVER = -1


def seed_of(seed: int, round: int, client: int, stream: str) -> int:
    """The seed of a stream."""
    digest = hashlib.blake2b(f"{seed}/{round}/{client}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") // 2


class Drawn:
    """Cohorts and batches of a federation whose training images are not augmented."""

    def __init__(self, federation: Federation) -> None:
        self.config, self.partition = federation.setup.config, federation.setup.partition
        source = federation.setup.dataset.train
        ((self.x, self.y),) = source.batches(torch.arange(len(source)), batch_size=len(source))

    def generator(self, round: int, client: int, stream: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.config.seed, round, client, stream))

    def cohort(self, round: int) -> list[int]:
        """Of N clients frac * N, rounded up, of those that have samples, in the order in which they are served."""
        share = Fraction(str(self.config.frac)) * self.config.num_clients
        able = [client for client in range(self.config.num_clients) if len(self.partition.indices(client))]
        rng = np.random.default_rng(seed_of(self.config.seed, round, SERVER, "cohort"))
        return rng.choice(able, min(len(able), -(-share // 1)), replace=False).tolist()

    def batches(self, round: int, client: int, stream: str = "batches", epochs: int | None = None) -> list[Batch]:
        """Each epoch in a new order; a last batch of one sample is left out where there are others."""
        generator, indices = self.generator(round, client, stream), self.partition.indices(client)
        found: list[Batch] = []
        for _ in range(self.config.local_epochs if epochs is None else epochs):
            order = indices[torch.randperm(len(indices), generator=generator)]
            for start in range(0, len(order), self.config.batch_size):
                batch = order[start : start + self.config.batch_size]
                if len(batch) > 1 or not start:
                    found.append((self.x[batch], self.y[batch]))
        return found
