"""The `dataset` section of the configuration."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import cutlayer.distributions as distributions
from cutlayer.datasets.registry import check_options
from cutlayer.runtime.ground.config import ConfigError, Use, plain, scoped

Augment = Literal["none", "flip", "crop", "crop_flip", "resized_crop_flip", "moco"]
Normalize = Literal["dataset", "imagenet", "none"]


def _dividing(key: str) -> dict[str, Use]:
    """Of a key that those distributions read which say so."""
    return scoped(read_if=lambda own, _: key in distributions.get(own.distribution).keys)


_OF_MOCO = scoped(read_if=lambda own, _: own.augment == "moco")


@dataclass(frozen=True)
class DatasetConfig:
    """What to load, how to give it to clients, and how batches are made of it.

    Attributes:
        name: a registered dataset.
        root: folder that holds the data; a dataset uses (and a download fills) its own folder in it. For the datasets
            that torchvision knows it is what torchvision calls root. `image_folder` reads the folder itself, or a zip.
        distribution: how training samples are given to clients: one that is registered, see `cutlayer.distributions`.
            ``own``: with transport=grpc only, every client trains on all the data on its machine.
        distribution_options: the distribution's own options, of those that have some.
        alpha: Dirichlet concentration of noniid_dirichlet, dirichlet and quantity_skew; small is far from iid.
        classes_per_client: distinct classes that each client holds (shards), or shards that it draws (drawn_shards).
        major_share: share of a client's samples that is of its major class (class_major).
        min_samples: no client gets fewer; 0 allows clients without data.
        client_samples: samples of each client, where all have equally many; the rest is left out. None leaves none out.
        drop_unassigned: natural only: take as many natural groups as there are clients and leave the rest out, where
            otherwise several groups go to one client.
        augment: what training batches go through: `crop` is a random crop of the image padded by 4 black pixels,
            `flip` a horizontal flip of every second image by chance, `resized_crop_flip` the ImageNet crop, `moco` the
            crop, flip, colour jitter and greyscale of MoCo v2, for images of 1 or 3 channels.
        moco_area: least share of an image's area that the crop of `moco` has, above 0 and at most 1.
        moco_blur: chance that `moco` blurs an image, by a deviation of 0.1 to 2 pixels.
        resize: height and width that images are scaled to after the augmentation, bilinear with antialiasing; None
            leaves them as they are.
        normalize: mean and deviation to normalise by: the dataset's own, ImageNet's, or none (values in 0..1).
        shuffle: draw a new order in each epoch.
        drop_last: what happens to a last batch that is not full; see `cutlayer.datasets.batching.batch_sizes`.
        validation: share of the training set, equal in every class, that is held out; groups stay whole.
        fraction: share of the rest, likewise, that is trained on; what is left out is not used at all.
        local_test: give each client a share of the test set with its own class proportions, or of its own groups where
            clients are groups (natural). With `only`, what is tested
            is each client's model (of most methods the global one) on its own share alone, and the accuracy is the
            mean over clients.
        storage: `device` holds all images as uint8, and tokens of text, on the device, `stream` reads them when needed,
            `auto` chooses `device` up to 2 GiB of decoded images or tokens. Training pictures that random boxes are cut
            out of are always read.
        workers: threads that read and decode images; 0 reads them in the caller's thread.
        options: the dataset's own options.
    """

    name: str
    root: Path = field(default=Path("data"), metadata=scoped("machine", later=True))
    distribution: str = "iid"
    distribution_options: dict[str, Any] = field(default_factory=dict)
    alpha: float = field(default=0.1, metadata=_dividing("alpha"))
    classes_per_client: int = field(default=2, metadata=_dividing("classes_per_client"))
    major_share: float = field(default=0.8, metadata=_dividing("major_share"))
    min_samples: int = field(default=1, metadata=_dividing("min_samples"))
    client_samples: int | None = field(default=None, metadata=_dividing("client_samples"))
    drop_unassigned: bool = field(default=False, metadata=_dividing("drop_unassigned"))
    augment: Augment = "none"
    moco_area: float = field(default=0.2, metadata=_OF_MOCO)
    moco_blur: float = field(default=0.0, metadata=_OF_MOCO)
    resize: int | None = None
    normalize: Normalize = "dataset"
    shuffle: bool = True
    drop_last: Literal["auto", "always", "never"] = "auto"
    validation: float = 0.0
    fraction: float = 1.0
    local_test: bool | Literal["only"] = False
    storage: Literal["auto", "device", "stream"] = field(default="auto", metadata=scoped("machine", later=True))
    workers: int = field(default=4, metadata=scoped("machine", later=True))
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError("alpha", self.alpha, "a finite number > 0")
        if self.classes_per_client < 1:
            raise ConfigError("classes_per_client", self.classes_per_client, "an integer >= 1")
        if not 0 <= self.major_share <= 1:
            raise ConfigError("major_share", self.major_share, "a number from 0 to 1")
        if not 0 < self.moco_area <= 1:
            raise ConfigError("moco_area", self.moco_area, "a number > 0 and <= 1")
        if not 0 <= self.moco_blur <= 1:
            raise ConfigError("moco_blur", self.moco_blur, "a number from 0 to 1")
        if self.min_samples < 0:
            raise ConfigError("min_samples", self.min_samples, "an integer >= 0")
        if self.client_samples is not None and self.client_samples < 1:
            raise ConfigError("client_samples", self.client_samples, "null or an integer >= 1")
        if self.resize is not None and self.resize < 1:
            raise ConfigError("resize", self.resize, "null or an integer >= 1")
        if not 0 <= self.validation < 1:
            raise ConfigError("validation", self.validation, "a number >= 0 and < 1")
        if not 0 < self.fraction <= 1:
            raise ConfigError("fraction", self.fraction, "a number > 0 and <= 1")
        if self.workers < 0:
            raise ConfigError("workers", self.workers, "an integer >= 0")
        own = distributions.check_options(self.distribution, self.distribution_options)
        # With the values that were left out, so that a run's configuration says what shaped its clients.
        object.__setattr__(self, "distribution_options", plain(own))
        check_options(self.name, self.options)

    @property
    def divided(self) -> bool:
        """Whether one data set is divided among the clients; else each has data of its own."""
        return distributions.get(self.distribution).divide is not None

    @property
    def by_group(self) -> bool:
        """Whether clients are groups of the data."""
        return distributions.get(self.distribution).by_group

    def evenly(self) -> "DatasetConfig":
        """The same data in equal parts at random, in as many as there are clients with or without samples."""
        return replace(self, distribution="iid", distribution_options={}, min_samples=0, client_samples=None)
