"""Whole numbers from shares, the arithmetic under the distributions. All of it ends: nothing is drawn until it fits."""

import heapq

import numpy as np


def dirichlet(alpha: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Logarithms of `size` draws from Dir(alpha), float64 [size, len(alpha)].

    In logarithms because a small alpha makes all Gamma variates underflow to 0, and 0/0 is the NaN that partitioners
    are known for. Gamma(a) is drawn as Gamma(a + 1) * U^(1/a) (Marsaglia & Tsang 2000, section 6).
    """
    shape = (size, len(alpha))
    with np.errstate(divide="ignore"):
        logs = np.log(rng.standard_gamma(alpha + 1, shape)) + np.log1p(-rng.random(shape)) / alpha
    return logs - _logsumexp(logs)


def _logsumexp(logs: np.ndarray) -> np.ndarray:
    top = logs.max(axis=1, keepdims=True)
    return top + np.log(np.exp(logs - top).sum(axis=1, keepdims=True))


def softmax(logs: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Rows of shares from logarithms, restricted to the allowed columns; at least one column must be allowed."""
    logs = np.where(allowed, logs, -np.inf)
    shares = np.exp(logs - logs.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def split_rows(totals: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Divide each row's total by its shares at random: int64, rows sum to the totals exactly.

    Systematic sampling: each entry is its exact share rounded down or up, and the exact share on average.

    Args:
        totals: int64 [rows]; shares: [rows, columns], rows summing to 1.
    """
    marks = np.floor(np.cumsum(shares, axis=1) * totals[:, None] + rng.random((len(totals), 1)))
    marks[:, -1] = totals
    np.minimum(marks, totals[:, None], out=marks)
    return np.diff(marks.astype(np.int64), axis=1, prepend=0)


def split_one(total: int, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`split_rows` for a single total over many receivers, in random order: where many shares are below one sample,
    the same receivers would otherwise be the lucky ones each time."""
    order = rng.permutation(len(shares))
    counts = np.empty(len(shares), dtype=np.int64)
    counts[order] = split_rows(np.array([total]), shares[None, order], rng)[0]
    return counts


def equal_sizes(n: int, parts: int) -> np.ndarray:
    """n divided into `parts` whole numbers that differ by at most one, the larger first: int64 [parts]."""
    return n // parts + (np.arange(parts) < n % parts).astype(np.int64)


def bounded(weights: np.ndarray, total: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whole numbers in low..high, near to proportional to `weights`, that sum to `total`: int64.

    Needs sum(low) <= total <= sum(high) and positive weights.
    """
    assert low.sum() <= total <= high.sum()
    below, above = 0.0, float((high / weights).max())
    for _ in range(100):
        middle = (below + above) / 2
        if np.clip(middle * weights, low, high).sum() > total:
            above = middle
        else:
            below = middle
    ideal = np.clip(below * weights, low, high)
    counts = np.floor(ideal).astype(np.int64)
    # At most about one each is missing: hand them out by what is still due, largest first.
    due = [(float(counts[i] - ideal[i]), i) for i in range(len(weights)) if counts[i] < high[i]]
    heapq.heapify(due)
    for _ in range(total - int(counts.sum())):
        lack, i = heapq.heappop(due)
        counts[i] += 1
        if counts[i] < high[i]:
            heapq.heappush(due, (lack + 1, i))
    return counts


def raise_to(sizes: np.ndarray, least: int) -> np.ndarray:
    """The sizes after those below `least` were raised to it at the cost of the largest: int64, the same sum.

    Needs sum(sizes) >= least * len(sizes).
    """
    lack = int(np.maximum(least - sizes, 0).sum())
    if lack == 0:
        return sizes
    assert int(sizes.sum()) >= least * len(sizes)
    low, high = least, int(sizes.max())
    while low < high:  # the lowest level that need not be undercut to free enough samples
        level = (low + high + 1) // 2
        low, high = (level, high) if int(np.maximum(sizes - level, 0).sum()) >= lack else (low, level - 1)
    raised = np.clip(sizes, least, low)
    # Samples that the level frees beyond the need go back to the donors, one each at most.
    back = np.flatnonzero(sizes > low)[: int(sizes.sum() - raised.sum())]
    raised[back] += 1
    return raised


def fill(log_mix: np.ndarray, totals: np.ndarray, supply: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give each client as many samples as its total, by its mixture of classes, out of a limited supply.

    All clients ask at once, each by its mixture over the classes that are left. A class asked for more often than it
    has samples is divided among its askers in proportion to what they asked, and is used up; the others are given in
    full; then what is still lacking is asked for again. Each pass uses up a class or ends, so there are no more passes
    than classes.

    Args:
        log_mix: logarithms of the mixtures [clients, classes], all finite.
        totals: int64 [clients]; supply: int64 [classes], summing to at least the totals.

    Returns:
        int64 [clients, classes]: rows sum to the totals, columns to at most the supply.
    """
    assert int(totals.sum()) <= int(supply.sum())
    given = np.zeros(log_mix.shape, dtype=np.int64)
    lacking, left = totals.copy(), supply.copy()
    for _ in range(len(supply) + 1):
        rows = np.flatnonzero(lacking)
        if len(rows) == 0:
            return given
        asked = split_rows(lacking[rows], softmax(log_mix[rows], left > 0), rng)
        wanted = asked.sum(axis=0)
        for c in np.flatnonzero(wanted > left):
            asked[:, c] = np.diff(np.cumsum(asked[:, c]) * left[c] // wanted[c], prepend=0)
        given[rows] += asked
        lacking[rows] -= asked.sum(axis=1)
        left -= asked.sum(axis=0)
    # Only rounding could bring us here; the lacking places take what is left in a random order.
    rows = np.repeat(np.arange(len(totals)), lacking)
    classes = rng.permutation(np.repeat(np.arange(len(supply)), left))[: len(rows)]
    np.add.at(given, (rows, classes), 1)
    return given
