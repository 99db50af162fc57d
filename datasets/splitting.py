"""What is held out of a set of samples: a share of each class, and all samples of a group on one side."""

import numpy as np


def hold_out(
    labels: np.ndarray, share: float, rng: np.random.Generator, groups: np.ndarray | None = None
) -> np.ndarray:
    """Choose samples to hold out: bool [n], about `share` of each class.

    Args:
        labels: int64 [n], non-negative.
        groups: int64 [n]; samples of one group (lesion, writer, patient, site) stay together. None: all are apart.
    """
    return stratified(labels, share, rng) if groups is None else whole_groups(labels, share, rng, groups)


def fixed_test(labels: np.ndarray, share: float, groups: np.ndarray | None = None) -> np.ndarray:
    """A test set that is the same whatever the run's seed: bool [n], about `share` of each class.

    Args:
        groups: int64 [n], as of `hold_out`. Where each is of one class, no class gives more than its share, rounded.
    """
    rng = np.random.default_rng(0)
    groups = np.arange(len(labels)) if groups is None else groups
    pairs = np.unique(np.stack([groups, labels]), axis=1)
    if len(np.unique(pairs[0])) < pairs.shape[1]:
        return whole_groups(labels, share, rng, groups)
    held = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        own, inverse = np.unique(groups[members], return_inverse=True)
        # Groups in a random order, taken while what they hold stays within the share.
        order = rng.permutation(len(own))
        taken = np.cumsum(np.bincount(inverse)[order]) <= round(share * len(members))
        held[members] = np.isin(inverse, order[taken])
    return held


def stratified(labels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Choose round(share * n) samples, of each class in proportion (to within one): bool [n]."""
    n = len(labels)
    count = round(share * n)
    shuffled = rng.permutation(n)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    chosen = np.zeros(n, dtype=bool)
    # Evenly spaced places in a list sorted by class fall on each class in proportion.
    chosen[by_class[((np.arange(count) + 0.5) * n / max(count, 1)).astype(np.int64)]] = True
    return chosen


def whole_groups(labels: np.ndarray, share: float, rng: np.random.Generator, groups: np.ndarray) -> np.ndarray:
    """Choose whole groups that together hold about `share` of each class and of all samples: bool [n].

    The groups come one after another, the largest first and those of one size in a random order. Each goes to the
    side on which the surplus is smaller: the vector of what is held beyond `share` of what has come, by class and in
    all. A side drawn with chance `share` would add `share * (1 - share) * |group|^2` to its expected square, and the
    better of two sides adds no more than that average. So in the end, with |group|^2 the sum of squares of its samples
    by class and of its size, surplus^2 <= share * (1 - share) * sum of |group|^2: at most as far as a random draw is on
    average, and where there are many small groups much nearer.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    classes = int(labels.max(initial=0)) + 1
    # The pairs of a group and a class that there are, those of group i from starts[i] to starts[i + 1].
    pairs, counts = np.unique(group * classes + labels, return_counts=True)
    starts = np.searchsorted(pairs, np.arange(len(sizes) + 1) * classes).tolist()
    columns = pairs % classes
    held = np.zeros(len(sizes), dtype=bool)
    surplus, in_all = np.zeros(classes), 0.0
    order = rng.permutation(len(sizes))
    for i in order[np.argsort(-sizes[order], kind="stable")].tolist():
        own, samples = columns[starts[i] : starts[i + 1]], counts[starts[i] : starts[i + 1]]
        size = int(sizes[i])
        # The square of the surplus with the group held, less that without it.
        more = 2 * (surplus[own] @ samples + in_all * size) + (1 - 2 * share) * (samples @ samples + size * size)
        held[i] = more < 0
        step = held[i] - share
        surplus[own] += step * samples
        in_all += step * size
    return held[group]
