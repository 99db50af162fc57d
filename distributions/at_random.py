"""Samples at random, in equal sizes or in sizes that vary."""

import numpy as np

from cutlayer.distributions import Request, register
from cutlayer.distributions.apportion import dirichlet, raise_to, split_one
from cutlayer.distributions.dealing import deal, same_sizes


@register("iid", "IID", reads=("client_samples",), even=True)
def iid(request: Request) -> np.ndarray:
    """Samples at random; sizes differ by at most one."""
    sizes = same_sizes(request)
    owner = deal(np.append(sizes, len(request.labels) - sizes.sum()), request.rng)
    owner[owner == request.clients] = -1
    return owner


@register("quantity_skew", "quantity skew", shape=("alpha",), reads=("min_samples",))
def quantity_skew(request: Request) -> np.ndarray:
    """Samples at random; sizes are shares drawn from Dir(alpha) over the clients."""
    alpha = np.full(request.clients, request.config.alpha)
    shares = np.exp(dirichlet(alpha, 1, request.rng)[0])
    sizes = split_one(len(request.labels), shares, request.rng)
    return deal(raise_to(sizes, request.config.min_samples), request.rng)
