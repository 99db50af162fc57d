"""What FSL-SAGE's authors' code was run on for the golden traces: the network, and the samples as a data set."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cutlayer.datasets.registry import RawDataset, RawSplit
from cutlayer.distributions import Request

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CUT = "5"
"""The flattening: what comes before it is the client's too."""


def network() -> nn.Sequential:
    """Images [b, 3, 32, 32] -> logits [b, 10]; the first six children are the client part."""
    client = (
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
    )
    return nn.Sequential(*client, nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


def whole(client: Mapping[str, Tensor], server: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the authors' two parts, ``net.<child>.<name>`` in each, as those of `network`."""
    found: dict[str, Tensor] = {}
    for part, first in ((client, 0), (server, 6)):
        for name, tensor in part.items():
            child, _, own = name.removeprefix("net.").partition(".")
            found[f"{int(child) + first}.{own}"] = tensor
    return found


def auxiliary(weights: Mapping[str, Tensor]) -> nn.Linear:
    """The auxiliary model with these weights, ``fc.weight`` [10, 512] and ``fc.bias`` [10]."""
    layer = nn.Linear(512, 10)
    layer.load_state_dict({name.removeprefix("fc."): tensor for name, tensor in weights.items()})
    return layer


def served(file: Path, orders: Sequence[Sequence[int]]) -> RawDataset:
    """The images to train on, client after client, each client's in the order of its numbers; and those to test on."""
    train, test = (_thousand(file, split) for split in ("train", "test"))
    return RawDataset(train.subset(np.concatenate(orders).astype(np.int64)), test, CLASSES)


@cache
def _thousand(file: Path, split: str) -> RawSplit:
    """Of all images by class and number, the first of a permutation."""
    with zipfile.ZipFile(file) as found:
        names = sorted(name for name in found.namelist() if name.startswith(f"{split}/") and name.endswith(".jpg"))
        generator = np.random.RandomState(0)
        chosen = [names[number] for number in generator.permutation(len(names))[:1000]]
        pictures = [Image.open(io.BytesIO(found.read(name))).convert("RGB") for name in chosen]
    images = np.stack([np.asarray(picture) for picture in pictures])
    labels = torch.tensor([CLASSES.index(name.split("/")[1]) for name in chosen])
    return RawSplit(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)


def in_blocks(request: Request) -> np.ndarray:
    """Equal shares in the order of the data set."""
    return np.arange(len(request.labels)) // (len(request.labels) // request.clients)
