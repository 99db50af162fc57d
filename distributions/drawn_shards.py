"""Shards of classes, drawn without regard to which of them a client has already."""

import numpy as np

from cutlayer.distributions import Request, register
from cutlayer.distributions.apportion import bounded, equal_sizes
from cutlayer.distributions.dealing import checked, samples_by_class
from cutlayer.runtime.ground.config import ConfigError

_KEY = "dataset.classes_per_client"


@register("drawn_shards", shape=("classes_per_client",), reads=("min_samples",))
def drawn_shards(request: Request) -> np.ndarray:
    """Each client draws `classes_per_client` shards, of which several may be of one class.

    So the code of LG-FedAvg, FedRep and FedBABU does. Each class is cut into shards of equal size (to one sample), as
    many as its share of the data says.
    """
    present = np.flatnonzero(request.prior)
    counts = request.prior[present]
    total = request.clients * request.config.classes_per_client
    if total < len(present):
        least = -(-len(present) // request.clients)
        expected = f"at least {least}, so that {request.clients} clients hold all {len(present)} classes"
        raise ConfigError(_KEY, request.config.classes_per_client, expected)
    if total > int(counts.sum()):
        most = int(counts.sum()) // request.clients
        raise ConfigError(_KEY, request.config.classes_per_client, f"at most {most}, as a shard has a sample")
    slots = bounded(counts.astype(float), total, np.ones_like(counts), counts)
    drawn = request.rng.permutation(np.repeat(np.arange(len(present)), slots))
    clients = np.arange(total) // request.config.classes_per_client
    owner = np.empty(len(request.labels), dtype=np.int64)
    for place, samples in enumerate(samples_by_class(request)):
        holders = request.rng.permutation(clients[drawn == place])
        owner[samples] = np.repeat(holders, equal_sizes(len(samples), len(holders)))
    return checked(owner, request, "classes_per_client")
