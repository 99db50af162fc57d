"""Mixtures of classes that are drawn from a Dirichlet distribution."""

import numpy as np

from cutlayer.distributions import Request, register
from cutlayer.distributions.apportion import dirichlet, raise_to, split_one
from cutlayer.distributions.dealing import mixed, samples_by_class


@register("dirichlet", "Dirichlet, unequal sizes", shape=("alpha",), reads=("min_samples",))
def dirichlet_split(request: Request) -> np.ndarray:
    """Each class is divided among the clients by shares drawn from Dir(alpha); sizes vary (Yurochkin et al. 2019).

    Clients below `min_samples` get random samples of the largest clients.
    """
    owner = np.empty(len(request.labels), dtype=np.int64)
    alpha = np.full(request.clients, request.config.alpha)
    for samples in samples_by_class(request):
        shares = np.exp(dirichlet(alpha, 1, request.rng)[0])
        owner[samples] = np.repeat(np.arange(request.clients), split_one(len(samples), shares, request.rng))
    return _even_out(owner, request)


@register("noniid_dirichlet", "Dirichlet", shape=("alpha",), reads=("client_samples",))
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
    return mixed(request, present, lambda clients: dirichlet(alpha, len(clients), request.rng))


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
