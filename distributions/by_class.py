"""Few classes to a client, or one above all others."""

import numpy as np

from cutlayer.distributions import Request, register
from cutlayer.distributions.apportion import bounded, equal_sizes
from cutlayer.distributions.dealing import checked, mixed, samples_by_class
from cutlayer.runtime.ground.config import ConfigError


@register("class_major", "majority class", shape=("major_share",), reads=("client_samples",))
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

    return mixed(request, present, mixtures)


@register("shards", shape=("classes_per_client",), reads=("min_samples",))
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
    by_class = list(samples_by_class(request))
    for place in places:
        # The clients with the most room first, ties at random: room then never differs by more than one, which is
        # what makes sure that no client is left with two places for the last class.
        count = int(slots[place])
        order = np.argpartition(request.rng.random(request.clients) - room, count - 1)[:count]
        room[order] -= 1
        owner[by_class[place]] = np.repeat(order, equal_sizes(len(by_class[place]), len(order)))
    return checked(owner, request, "classes_per_client")
