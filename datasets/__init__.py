"""Data: loading, partitioning among clients, augmentation, and batches on the device.

A dataset is one function, registered by name, that returns uint8 images and labels; all else is shared. Every module
of this package is imported, so that a new file registers itself::

    dataset = load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    parts = partition(dataset.train.labels, 10, config, seed=0, groups=dataset.groups)
    for x, y in dataset.train.batches(parts.indices(3), batch_size=32):
        ...
"""

if __name__ != "cutlayer.datasets":
    from cutlayer.names import give_way

    give_way(__name__)  # what follows is left to no one then

from cutlayer.datasets.batching import DropLast, batch_count, batch_sizes
from cutlayer.datasets.config import DatasetConfig
from cutlayer.datasets.info import Dataset, DatasetInfo
from cutlayer.datasets.loading import load
from cutlayer.datasets.partition import Partition, apply_partition, own_partition, partition, partition_by_group
from cutlayer.datasets.registry import names, register
from cutlayer.datasets.source import Source
from cutlayer.runtime.ground.registry import import_modules

__all__ = [
    "Dataset",
    "DatasetConfig",
    "DatasetInfo",
    "DropLast",
    "Partition",
    "Source",
    "apply_partition",
    "batch_count",
    "batch_sizes",
    "load",
    "names",
    "own_partition",
    "partition",
    "partition_by_group",
    "register",
]

import_modules("cutlayer.datasets", __path__)
