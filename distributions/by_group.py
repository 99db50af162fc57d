"""The data's own groups as clients."""

import numpy as np

from cutlayer.distributions import Request, register
from cutlayer.distributions.dealing import checked
from cutlayer.runtime.ground.config import ConfigError


@register("natural", reads=("drop_unassigned", "min_samples"), by_group=True)
def natural(request: Request) -> np.ndarray:
    """Clients are the data's own groups, such as writers; with fewer clients than groups each gets several groups.

    Groups are dealt in a random order. `drop_unassigned` keeps one group for each client instead, chosen at random of
    those with at least `min_samples`, and leaves the others out.
    """
    if request.groups is None:
        expected = (
            "a dataset with natural groups, such as femnist, shakespeare, or image_folder with dataset.options.group"
        )
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
    return checked(client_of[group], request, "drop_unassigned or num_clients")
