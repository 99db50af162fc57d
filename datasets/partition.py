"""Which training samples each client holds."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import cutlayer.distributions as distributions
from cutlayer.datasets.config import DatasetConfig
from cutlayer.datasets.seeding import derived
from cutlayer.runtime.ground.config import ConfigError


@dataclass(frozen=True, eq=False)
class Partition:
    """Samples by client in compressed rows: memory for samples and clients, no object per client.

    Attributes:
        order: int64 [assigned samples], sample indices, those of client 0 first, ascending within a client.
        offsets: int64 [clients + 1]; client i holds order[offsets[i]:offsets[i + 1]].
    """

    order: np.ndarray
    offsets: np.ndarray
    _tensor: Tensor = field(init=False, repr=False)
    _bounds: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.order.dtype == np.int64
        assert self.offsets.dtype == np.int64
        object.__setattr__(self, "_tensor", torch.from_numpy(self.order))
        object.__setattr__(self, "_bounds", self.offsets.tolist())

    @classmethod
    def from_owner(cls, owner: np.ndarray, clients: int) -> "Partition":
        """From the owner of each sample, int64 [n]; -1 leaves a sample out."""
        order = np.argsort(owner, kind="stable")
        order = order[np.searchsorted(owner[order], 0) :].astype(np.int64)
        sizes = np.bincount(owner[owner >= 0], minlength=clients)
        return cls(order, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Samples of each client, int64 [clients]."""
        return np.diff(self.offsets)

    def indices(self, client: int) -> Tensor:
        """Samples of one client, int64 [its size], CPU; a view that must not be written to."""
        if not 0 <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        return self._tensor[self._bounds[client] : self._bounds[client + 1]]

    def table(self, labels: np.ndarray | Tensor, classes: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Samples of each class that the clients first..last (all, unless given) hold: int64 [clients, classes]."""
        last = len(self) if last is None else last
        samples = self.order[self.offsets[first] : self.offsets[last]]
        rows = np.repeat(np.arange(last - first), self.sizes[first:last])
        counts = np.bincount(rows * classes + np.asarray(labels)[samples], minlength=(last - first) * classes)
        return counts.reshape(last - first, classes)


def own_partition(samples: int, num_clients: int, client: int | None) -> Partition:
    """The partition as one client with data of its own knows it: all samples are its; None is nobody's, a server's."""
    sizes = np.zeros(num_clients, dtype=np.int64)
    if client is not None:
        sizes[client] = samples
    order = np.arange(sizes.sum(), dtype=np.int64)
    return Partition(order, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def partition(
    labels: np.ndarray | Tensor,
    num_clients: int,
    config: DatasetConfig,
    *,
    seed: int,
    groups: np.ndarray | None = None,
) -> Partition:
    """Give the training samples to clients by `config.distribution`; deterministic from the seed, and always ends.

    Each sample goes to exactly one client (but see `drop_unassigned`), each client gets at least `min_samples`.

    Args:
        labels: int64 [n], non-negative; groups: int64 [n], the natural group of each sample.

    Raises:
        ConfigError: more clients than samples, `min_samples` impossible, `natural` without groups, or a
            `classes_per_client` that cannot be.
        ValueError: what the distribution gives are no owners.
    """
    labels = np.asarray(labels, dtype=np.int64)
    n = len(labels)
    if num_clients < 1:
        raise ConfigError("num_clients", num_clients, "an integer >= 1")
    if num_clients > n:
        raise ConfigError("num_clients", num_clients, f"at most {n}, the training samples")
    if num_clients * config.min_samples > n:
        raise ConfigError(
            "dataset.min_samples", config.min_samples, f"at most {n // num_clients}: {n} samples, {num_clients} clients"
        )
    rng = derived(seed, "partition")
    divide = distributions.get(config.distribution).divide
    assert divide is not None, "each client has data of its own"
    owner = divide(distributions.Request(labels, num_clients, config, rng, groups))
    reported = f"distribution {config.distribution} has to give int64 [{n}], each -1 or a client below {num_clients}"
    if owner.shape != (n,) or owner.dtype != np.int64 or not ((owner >= -1) & (owner < num_clients)).all():
        raise ValueError(reported)
    return Partition.from_owner(owner, num_clients)


def apply_partition(
    parts: Partition, labels: np.ndarray | Tensor, test_labels: np.ndarray | Tensor, *, seed: int
) -> Partition:
    """Divide a test set among the clients with the class proportions that they have in the training set.

    Each class's test samples are divided in proportion to the clients' training samples of it, to within one sample.
    A test sample goes to one client at most; one of a class that no client holds goes to none. With many clients some
    get no test sample.

    Args:
        parts: of the training set; labels: its labels; test_labels: int64 [m].
    """
    labels, test_labels = np.asarray(labels, dtype=np.int64), np.asarray(test_labels, dtype=np.int64)
    rng = derived(seed, "local test")
    # Shuffled clients, so that rounding does not favour the same ones in each class.
    rank = rng.permutation(len(parts))
    client = np.repeat(np.arange(len(parts)), parts.sizes)
    held = labels[parts.order]
    owner = np.full(len(test_labels), -1, dtype=np.int64)
    by_class = np.lexsort((rank[client], held))
    marks = np.searchsorted(held[by_class], np.arange(int(test_labels.max(initial=-1)) + 2))
    test_order = rng.permutation(len(test_labels))
    test_order = test_order[np.argsort(test_labels[test_order], kind="stable")]
    test_marks = np.searchsorted(test_labels[test_order], np.arange(len(marks)))
    for c in range(len(marks) - 1):
        holders = client[by_class[marks[c] : marks[c + 1]]]
        wanted = test_order[test_marks[c] : test_marks[c + 1]]
        if len(holders) and len(wanted):
            # The training samples of the class, lined up by client; test samples fall on evenly spaced ones.
            places = ((np.arange(len(wanted)) + 0.5) * len(holders) / len(wanted)).astype(np.int64)
            owner[wanted] = holders[places]
    return Partition.from_owner(owner, len(parts))


def partition_by_group(parts: Partition, groups: np.ndarray, test_groups: np.ndarray) -> Partition:
    """Give each client the test samples of its own groups; those of a group that no client has go to none.

    Args:
        parts: of the training set, each group of which is one client's; groups: int64 [n], its groups.
        test_groups: int64 [m], those of the test samples.
    """
    own, first = np.unique(groups[parts.order], return_index=True)
    client = np.repeat(np.arange(len(parts)), parts.sizes)[first]
    place = np.minimum(np.searchsorted(own, test_groups), len(own) - 1)
    return Partition.from_owner(np.where(own[place] == test_groups, client[place], -1), len(parts))
