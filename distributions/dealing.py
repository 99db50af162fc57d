"""What the distributions share: samples by class, equal sizes by mixtures of classes, and the least size."""

from collections.abc import Callable

import numpy as np

from cutlayer.distributions import Request
from cutlayer.distributions.apportion import equal_sizes, fill
from cutlayer.runtime.ground.config import ConfigError

# Mixtures are held for this many (client, class) pairs at a time: memory stays bounded for many clients and classes.
_PAIRS = 1 << 20


def deal(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Owners of sum(sizes) samples at random: int64, client i `sizes[i]` times."""
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes))


def same_sizes(request: Request) -> np.ndarray:
    """Equal sizes of the clients, int64 [clients]: `client_samples` each, else all samples, to one sample.

    Raises:
        ConfigError: there are not so many samples, or clients have to have more.
    """
    wanted, samples = request.config.client_samples, len(request.labels)
    if wanted is None:
        return equal_sizes(samples, request.clients)
    if not request.config.min_samples <= wanted <= samples // request.clients:
        least, most = request.config.min_samples, samples // request.clients
        expected = f"a number from min_samples={least} to {most}: {samples} samples, {request.clients} clients"
        raise ConfigError("dataset.client_samples", wanted, expected)
    return np.full(request.clients, wanted, dtype=np.int64)


def samples_by_class(request: Request) -> list[np.ndarray]:
    """The samples of each class that occurs, in ascending order of class, each shuffled."""
    order = request.rng.permutation(len(request.labels))
    order = order[np.argsort(request.labels[order], kind="stable")]
    counts = request.prior
    return np.split(order, np.cumsum(counts[counts > 0])[:-1])


def mixed(request: Request, present: np.ndarray, log_mix: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Equal sizes by a mixture of the classes that occur for each client, blocks of clients in a random order."""
    by_class = samples_by_class(request)
    used = np.zeros(len(present), dtype=np.int64)
    supply = np.array([len(samples) for samples in by_class], dtype=np.int64)
    sizes = same_sizes(request)
    owner = np.full(len(request.labels), -1, dtype=np.int64)
    order = request.rng.permutation(request.clients)
    block = max(1, _PAIRS // len(present))
    for start in range(0, request.clients, block):
        clients = order[start : start + block]
        given = fill(log_mix(clients), sizes[clients], supply - used, request.rng)
        for c, samples in enumerate(by_class):
            owners = np.repeat(clients, given[:, c])
            owner[samples[used[c] : used[c] + len(owners)]] = owners
            used[c] += len(owners)
    return owner


def checked(owner: np.ndarray, request: Request, other: str) -> np.ndarray:
    """The owners, if all clients have `min_samples`; moving samples would break what the distribution promises."""
    smallest = int(np.bincount(owner[owner >= 0], minlength=request.clients).min())
    if smallest < request.config.min_samples:
        expected = (
            f"at most {smallest}, the smallest client of this {request.config.distribution} split, or another {other}"
        )
        raise ConfigError("dataset.min_samples", request.config.min_samples, expected)
    return owner
