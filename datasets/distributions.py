"""The ways to give training samples to clients.

Each is a function that returns the owner of each sample, int64 [n], -1 for a sample that is left out (only `natural`
with `drop_unassigned` does). All finish in a number of steps known in advance: a condition that cannot be met is an
error that says why, never another try.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cutlayer.datasets.apportion import bounded, dirichlet, equal_sizes, fill, raise_to, split_one
from cutlayer.datasets.config import DatasetConfig
from cutlayer.runtime.ground.config import ConfigError

# Mixtures are held for this many (client, class) pairs at a time: memory stays bounded for many clients and classes.
_PAIRS = 1 << 20


@dataclass(frozen=True)
class Request:
    """What a distribution works from: labels int64 [n], groups int64 [n] or None."""

    labels: np.ndarray
    clients: int
    config: DatasetConfig
    rng: np.random.Generator
    groups: np.ndarray | None

    @property
    def prior(self) -> np.ndarray:
        """Samples of each class, int64 [classes]."""
        return np.bincount(self.labels)


def iid(request: Request) -> np.ndarray:
    """Samples at random; sizes differ by at most one."""
    return _deal(equal_sizes(len(request.labels), request.clients), request.rng)


def quantity_skew(request: Request) -> np.ndarray:
    """Samples at random; sizes are shares drawn from Dir(alpha) over the clients."""
    alpha = np.full(request.clients, request.config.alpha)
    shares = np.exp(dirichlet(alpha, 1, request.rng)[0])
    sizes = split_one(len(request.labels), shares, request.rng)
    return _deal(raise_to(sizes, request.config.min_samples), request.rng)


def dirichlet_split(request: Request) -> np.ndarray:
    """Each class is divided among the clients by shares drawn from Dir(alpha); sizes vary (Yurochkin et al. 2019).

    Clients below `min_samples` get random samples of the largest clients.
    """
    owner = np.empty(len(request.labels), dtype=np.int64)
    alpha = np.full(request.clients, request.config.alpha)
    for samples in _by_class(request):
        shares = np.exp(dirichlet(alpha, 1, request.rng)[0])
        owner[samples] = np.repeat(np.arange(request.clients), split_one(len(samples), shares, request.rng))
    return _even_out(owner, request)


def noniid_dirichlet(request: Request) -> np.ndarray:
    """Each client draws its own mixture of classes from Dir(alpha); sizes differ by at most one (Hsu et al. 2019).

    The concentration of class c is alpha * classes * (share of c in the data): alpha for each class in balanced data,
    and in other data a mixture that tends to the data's own as alpha grows. Where the mixtures together ask for more
    of a class than there is, its samples are divided in proportion and the rest is drawn from the classes left
    (`apportion.fill`); each sample is given out once.
    """
    prior = request.prior
    present = np.flatnonzero(prior)
    alpha = request.config.alpha * len(present) * prior[present] / prior.sum()
    return _mixed(request, present, lambda clients: dirichlet(alpha, len(clients), request.rng))


def class_major(request: Request) -> np.ndarray:
    """Each client takes `major_share` of its samples from one class, the rest from the others at random; equal sizes.

    As many clients have a class as their major one as its share of the data says. Where a class runs out, its clients
    get other classes instead.
    """
    prior = request.prior
    present = np.flatnonzero(prior)
    counts = prior[present]
    zero = np.zeros_like(counts)
    slots = bounded(counts.astype(float), request.clients, zero, np.full_like(counts, request.clients))
    major = request.rng.permutation(np.repeat(np.arange(len(present)), slots))
    share = request.config.major_share if len(present) > 1 else 1.0

    def mixtures(clients: np.ndarray) -> np.ndarray:
        mix = np.repeat(counts[None].astype(float), len(clients), axis=0)
        rows = np.arange(len(clients))
        mix[rows, major[clients]] = 0
        mix *= (1 - share) / np.maximum(mix.sum(axis=1, keepdims=True), 1)
        mix[rows, major[clients]] = share
        # A share of 0 stays possible in an emergency only: when the client's other classes have run out.
        return np.log(np.maximum(mix, 1e-300))

    return _mixed(request, present, mixtures)


def shards(request: Request) -> np.ndarray:
    """Each client holds `classes_per_client` distinct classes (McMahan et al. 2017; as FedBABU uses it).

    Each class is cut into shards of equal size (to one sample), as many as its share of the data says, and each client
    gets shards of different classes.
    """
    wanted = request.config.classes_per_client
    prior = request.prior
    present = np.flatnonzero(prior)
    high = np.minimum(prior[present], request.clients)
    total = request.clients * wanted
    key = "dataset.classes_per_client"
    if wanted > len(present):
        raise ConfigError(key, wanted, f"at most {len(present)}, the classes that there are")
    if total < len(present):
        least = -(-len(present) // request.clients)
        raise ConfigError(
            key, wanted, f"at least {least}, so that {request.clients} clients hold all {len(present)} classes"
        )
    if total > int(high.sum()):
        most = int(high.sum()) // request.clients
        raise ConfigError(key, wanted, f"at most {most}: rare classes have fewer samples than would need them")
    slots = bounded(prior[present].astype(float), total, np.ones_like(high), high)
    owner = np.empty(len(request.labels), dtype=np.int64)
    room = np.full(request.clients, wanted)
    places = request.rng.permutation(len(present))
    by_class = list(_by_class(request))
    for place in places:
        # The clients with the most room first, ties at random: room then never differs by more than one, which is
        # what makes sure that no client is left with two places for the last class.
        count = int(slots[place])
        order = np.argpartition(request.rng.random(request.clients) - room, count - 1)[:count]
        room[order] -= 1
        owner[by_class[place]] = np.repeat(order, equal_sizes(len(by_class[place]), len(order)))
    return _checked(owner, request, "classes_per_client")


def natural(request: Request) -> np.ndarray:
    """Clients are the data's own groups, such as writers; with fewer clients than groups each gets several groups.

    Groups are dealt in a random order. `drop_unassigned` keeps one group for each client instead, chosen at random of
    those with at least `min_samples`, and leaves the others out.
    """
    if request.groups is None:
        expected = "a dataset with natural groups, such as femnist, or image_folder with dataset.options.group"
        raise ConfigError("dataset.distribution", "natural", expected)
    _, group = np.unique(request.groups, return_inverse=True)
    sizes = np.bincount(group)
    usable = np.arange(len(sizes))
    if request.config.drop_unassigned:
        usable = np.flatnonzero(sizes >= request.config.min_samples)
    if request.clients > len(usable):
        enough = f" with at least {request.config.min_samples} samples" if len(usable) < len(sizes) else ""
        raise ConfigError("num_clients", request.clients, f"at most {len(usable)}, the natural groups{enough}")
    client_of = np.full(len(sizes), -1, dtype=np.int64)
    order = request.rng.permutation(usable)
    if request.config.drop_unassigned:
        order = order[: request.clients]
    client_of[order] = np.arange(len(order)) % request.clients
    return _checked(client_of[group], request, "drop_unassigned or num_clients")


DISTRIBUTIONS: dict[str, Callable[[Request], np.ndarray]] = {
    "iid": iid,
    "noniid_dirichlet": noniid_dirichlet,
    "dirichlet": dirichlet_split,
    "shards": shards,
    "class_major": class_major,
    "quantity_skew": quantity_skew,
    "natural": natural,
}


def _deal(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes))


def _by_class(request: Request) -> list[np.ndarray]:
    """The samples of each class that occurs, in ascending order of class, each shuffled."""
    order = request.rng.permutation(len(request.labels))
    order = order[np.argsort(request.labels[order], kind="stable")]
    counts = request.prior
    return np.split(order, np.cumsum(counts[counts > 0])[:-1])


def _mixed(request: Request, present: np.ndarray, log_mix: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Equal sizes by a mixture of the classes that occur for each client, blocks of clients in a random order."""
    by_class = _by_class(request)
    used = np.zeros(len(present), dtype=np.int64)
    supply = np.array([len(samples) for samples in by_class], dtype=np.int64)
    sizes = equal_sizes(len(request.labels), request.clients)
    owner = np.empty(len(request.labels), dtype=np.int64)
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


def _even_out(owner: np.ndarray, request: Request) -> np.ndarray:
    """Move random samples of the largest clients to those below `min_samples`."""
    sizes = np.bincount(owner, minlength=request.clients)
    target = raise_to(sizes, request.config.min_samples)
    order = request.rng.permutation(len(owner))
    order = order[np.argsort(owner[order], kind="stable")]
    within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    freed = request.rng.permutation(order[within >= np.repeat(target, sizes)])
    owner[freed] = np.repeat(np.arange(request.clients), np.maximum(target - sizes, 0))
    return owner


def _checked(owner: np.ndarray, request: Request, other: str) -> np.ndarray:
    """The owners, if all clients have `min_samples`; moving samples would break what the distribution promises."""
    smallest = int(np.bincount(owner[owner >= 0], minlength=request.clients).min())
    if smallest < request.config.min_samples:
        expected = (
            f"at most {smallest}, the smallest client of this {request.config.distribution} split, or another {other}"
        )
        raise ConfigError("dataset.min_samples", request.config.min_samples, expected)
    return owner
