"""Laws of what is drawn and read: of random boxes, shares of rare classes, and what is measured and reported."""

import csv
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torch import Tensor

from cutlayer.datasets import DatasetConfig, Partition, apply_partition, partition, partition_files
from cutlayer.datasets.augment import augmentation, flip, moco_parameters, of_whole_pictures
from cutlayer.datasets.colour import greyscale, hue, jitter_
from cutlayer.datasets.image_source import ImageSource, ResidentStore, StreamStore
from cutlayer.datasets.images import EncodedImages, Shape
from cutlayer.datasets.normalize import Normalizer, channel_statistics, moments
from cutlayer.datasets.partition_files import save_partition
from cutlayer.datasets.seeding import derived
from cutlayer.datasets.trees import FolderTree
from cutlayer.runtime.ground.config import ConfigError

CPU, META = torch.device("cpu"), torch.device("meta")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- boxes


def alike(found: np.ndarray, expected: np.ndarray) -> float:
    """The chance of a difference this large if both were drawn from one distribution."""
    return float(stats.ks_2samp(found, expected, method="asymp")[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(4000, 4000), (3000, 9000), (9000, 3000)])
def test_boxes_have_an_even_share_of_the_area_and_an_even_logarithm_of_the_ratio(height: int, width: int) -> None:
    n, rand = 4000, np.random.default_rng(5)
    found = augmentation("resized_crop_flip")
    assert found is not None
    top, left, tall, wide = found.draw((n, height, width), rng(3))["box"].double().numpy().T
    area = height * width * rand.uniform(0.08, 1, n)
    side = np.sqrt(np.exp(rand.uniform(np.log(3 / 4), np.log(4 / 3), n)))
    expected_tall, expected_wide = (np.sqrt(area) / side).clip(1, height), (np.sqrt(area) * side).clip(1, width)
    for got, expected in ((tall, expected_tall), (wide, expected_wide), (wide / tall, expected_wide / expected_tall)):
        assert alike(got, expected) > 1e-4
    free = (tall < height) & (wide < width)
    places = np.array([top[free] / (height - tall[free]), left[free] / (width - wide[free])])
    for place in places:
        assert alike(place, rand.random(n)) > 1e-4
    together = np.corrcoef([*places, tall[free] * wide[free], wide[free] / tall[free]])
    together[2, 3] = together[3, 2] = 0  # bound to each other where a box is clipped
    assert np.abs(together - np.eye(4)).max() < 0.08, "places and sizes have nothing to do with each other"


def test_boxes_reach_every_edge_of_a_small_image() -> None:
    found = augmentation("resized_crop_flip")
    assert found is not None
    boxes = found.draw((20_000, 6, 5), rng())["box"].int().tolist()
    for first, length, size in ((0, 2, 6), (1, 3, 5)):
        seen = {(box[first], box[length]) for box in boxes}
        lengths = {each for _, each in seen}
        assert max(lengths) == size
        assert seen == {(start, each) for each in lengths for start in range(size - each + 1)}


def on_meta(x: Tensor) -> Tensor:
    return x.to(META)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["flip", "crop", "crop_flip", "resized_crop_flip", "moco"])
def test_augmentations_make_what_they_need_on_the_device_of_the_images(name: Any, channels: int) -> None:
    """A device of its own kind refuses what is on another: as a GPU would, with no GPU."""
    x = torch.zeros(4, channels, 8, 6, dtype=torch.uint8, device=META)
    for found in (augmentation(name), of_whole_pictures(name)):
        if found is not None and not (name == "moco" and channels == 3):  # which looks at values
            params = {key: on_meta(value) for key, value in found.draw((4, 8, 6), rng()).items()}
            out = found.apply(x, params)
            assert out.device == META
            assert out.shape == x.shape
    p = moco_parameters(torch.rand(4, 30, device=META), 8, 6)
    assert {value.device for value in p.values()} == {META}
    if channels == 3:
        assert hue(x.float(), p["factors"][:, 3]).device == META
        assert greyscale(x.float(), p["grey"]).device == META
    else:
        assert jitter_(x.float(), p["order"], p["factors"], p["jittered"]).device == META
    normalized = Normalizer((0.5,) * channels, (0.25,) * channels, META, torch.float32)(x)
    assert (normalized.device, normalized.dtype) == (META, torch.float32)
    assert flip(x, p["mirrored"]).device == META


# ---------------------------------------------------------------------- measured


def files(root: Path, images: np.ndarray) -> EncodedImages:
    for at, pixels in enumerate(images):
        Image.fromarray(pixels).save(root / f"{at:03}.png")
    tree = FolderTree(root)
    return EncodedImages(tree, sorted(tree.paths()), Shape(3))


def statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    values = images.astype(float) / 255
    return values.mean((0, 1, 2)).tolist(), values.std((0, 1, 2)).tolist()


@pytest.mark.parametrize("known", [((), ()), ((0.25,), (0.5,))])
def test_files_are_measured_as_what_they_decode_to(tmp_path: Path, known: Any) -> None:
    images = np.random.default_rng(2).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
    mean, deviation = moments("dataset", files(tmp_path, images), 3, known)
    assert (mean, deviation) == tuple(pytest.approx(each, abs=1e-9) for each in statistics(images))


@pytest.mark.parametrize("count", [1, 2, 5, 12, 13])
def test_of_many_files_evenly_spread_ones_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("cutlayer.datasets.normalize._SAMPLED", count)
    images = np.random.default_rng(2).integers(0, 256, (13, 5, 4, 3), dtype=np.uint8)
    encoded = files(tmp_path, images)
    read: list[int] = []
    subset = encoded.subset
    monkeypatch.setattr(encoded, "subset", lambda indices: (read.extend(indices.tolist()), subset(indices))[1])
    assert channel_statistics(encoded) == tuple(pytest.approx(each, abs=1e-9) for each in statistics(images[read]))
    assert len(read) == count
    assert read[0] == 0
    assert count == 1 or read[-1] == 12
    assert np.ptp(np.diff(read, append=read[-1] + 12 // max(1, count - 1))) <= 1, "as far from each other, to rounding"


def test_blocks_of_images_are_measured_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (23, 2, 3, 5), dtype=torch.uint8, generator=rng())
    whole = channel_statistics(images)
    monkeypatch.setattr("cutlayer.datasets.normalize._BLOCK", 4)
    assert channel_statistics(images) == whole
    values = images.double().transpose(0, 1).flatten(1) / 255
    assert whole == (
        pytest.approx(values.mean(1).tolist(), abs=1e-12),
        pytest.approx(values.std(1, correction=0).tolist(), abs=1e-12),
    )


def test_no_images_and_a_single_pixel_have_moments_that_are_safe_to_divide_by() -> None:
    assert channel_statistics(torch.full((1, 1, 1, 1), 51, dtype=torch.uint8)) == ((51 / 255,), (1 / 255,))
    assert channel_statistics(torch.zeros(0, 2, 3, 3, dtype=torch.uint8)) == ((0.0, 0.0), (1 / 255, 1 / 255))


def test_more_pixels_than_a_float_can_count_are_measured() -> None:
    images = torch.zeros(1, 1, 4097, 4097, dtype=torch.uint8)
    images[0, 0, 0, :2] = 255
    assert images.numel() - 2 > 2**24
    assert images.numel() % 2 == 1, "black pixels are no number of float32"
    assert channel_statistics(images)[0][0] == pytest.approx(2 / images.numel(), rel=1e-12, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_what_was_normalised(dtype: torch.dtype, channels: int) -> None:
    images = torch.randint(0, 256, (5, channels, 4, 3), dtype=torch.uint8, generator=rng())
    normalizer = Normalizer((0.2, 0.4, 0.6)[:channels], (0.3, 0.2, 0.5)[:channels], CPU, dtype)
    source = ImageSource(ResidentStore(images, CPU), torch.arange(5), normalizer, None, CPU)
    ((x, _),) = source.batches(torch.arange(5), batch_size=5)
    exact = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(source.pixels(x), images.to(dtype) / 255, atol=exact, rtol=0)
    assert torch.equal(source.pixels(x - 100), torch.zeros_like(x)), "never darker than black"
    assert torch.equal(source.pixels(x + 100), torch.ones_like(x)), "never brighter than white"


# ---------------------------------------------------------------------- read


def test_what_a_source_was_not_made_for_is_said_in_full() -> None:
    store = ResidentStore(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), CPU)
    source = ImageSource(store, torch.arange(2), Normalizer((0.0,), (1.0,), CPU, torch.float32), None, CPU)
    with pytest.raises(ValueError, match="^shuffle and augment need a generator$"):
        next(source.batches(torch.arange(2), batch_size=1, shuffle=True))
    with pytest.raises(ValueError, match="^parameters of an augmentation, but this source has none$"):
        source.take(torch.arange(2), [{}, {"mirrored": torch.ones(2, dtype=torch.bool)}])


class Recorded(StreamStore):
    """Notes how many images each read is of, and by which thread it is done."""

    def __init__(self, images: Tensor, workers: int) -> None:
        super().__init__(images, CPU, workers)
        self.read: list[int] = []

    def _read(self, out: Tensor, piece: Tensor, boxes: Tensor | None) -> None:
        self.read.append(len(piece))
        super()._read(out, piece, boxes)


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
def test_exactly_two_pieces_are_read_ahead(pieces: int) -> None:
    store = Recorded(torch.zeros(10 * pieces, 1, 2, 2, dtype=torch.uint8), workers=0)
    for done, _ in enumerate(store.chunks(torch.arange(10 * pieces).split(10))):
        assert len(store.read) == min(pieces, done + 3)
    assert store.read == [10] * pieces


@pytest.mark.parametrize(("samples", "workers"), [(7, 3), (2, 3), (1, 1), (0, 2), (9, 2)])
def test_a_piece_is_divided_among_all_workers(samples: int, workers: int) -> None:
    store = Recorded(torch.zeros(9, 1, 2, 2, dtype=torch.uint8), workers)
    (found,) = store.chunks([torch.arange(samples)])
    parts = max(1, min(samples, workers))
    assert len(found) == samples
    assert sorted(store.read) == sorted(len(part) for part in np.array_split(np.arange(samples), parts))


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("limit", [1, 23, 24, 25, 100, 10**6])
def test_a_chunk_is_as_many_whole_batches_as_fit(monkeypatch: pytest.MonkeyPatch, limit: int, drop: bool) -> None:
    monkeypatch.setattr("cutlayer.datasets.image_source.CHUNK_VALUES", limit)
    store = Recorded(torch.zeros(31, 1, 2, 2, dtype=torch.uint8), workers=0)
    source = ImageSource(store, torch.arange(31), Normalizer((0.0,), (1.0,), CPU, torch.float32), None, CPU)
    sizes = [len(x) for x, _ in source.batches(torch.arange(31), batch_size=3, drop_last=drop)]
    assert sizes == [3] * 10 + [1] * (not drop)
    whole = max(1, limit // (3 * 4))
    assert store.read == [sum(sizes[at : at + whole]) for at in range(0, len(sizes), whole)]


# ---------------------------------------------------------------------- whole numbers


def always_of_class_0(totals: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    asked = np.zeros(shares.shape, dtype=np.int64)
    asked[:, 0] = totals
    return asked


def test_what_rounding_leaves_lacking_is_given_at_random_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from cutlayer.distributions.apportion import fill

    # Rounding that asks for a class that is used up, each time anew.
    monkeypatch.setattr("cutlayer.distributions.apportion.split_rows", always_of_class_0)
    rand, totals, supply = np.random.default_rng(4), np.array([3, 0, 5, 4]), np.array([2, 12, 0, 6])
    tables = np.stack([fill(np.zeros((4, 4)), totals, supply, rand) for _ in range(600)])
    assert tables.min() >= 0
    assert (tables.sum(axis=2) == totals).all()
    assert (tables.sum(axis=1) <= supply).all()
    assert (tables[:, :, 0].sum(axis=1) == 2).all(), "what was asked for and is there"
    rest = totals - tables[0, :, 0]
    expected = rest[:, None] * np.array([12, 6]) / 18
    assert tables[:, :, [1, 3]].mean(axis=0) == pytest.approx(expected, abs=0.15)


@st.composite
def rare(draw: st.DrawFn) -> np.ndarray:
    """Labels in classes of very different sizes, some absent."""
    counts = draw(st.lists(st.sampled_from([0, 1, 2, 3, 9, 40, 100]), min_size=1, max_size=7).filter(any))
    return np.repeat(np.arange(len(counts)), counts)


def shards(labels: np.ndarray, clients: int, wanted: int, seed: int = 0) -> Partition:
    config = DatasetConfig("synthetic", distribution="shards", classes_per_client=wanted, min_samples=0)
    return partition(labels, clients, config, seed=seed)


@settings(max_examples=60, deadline=None)
@given(labels=rare(), clients=st.integers(1, 9), seed=st.integers(0, 99))
def test_shards_of_a_class_are_as_many_as_its_share_says(labels: np.ndarray, clients: int, seed: int) -> None:
    clients = min(clients, len(labels))
    possible: list[int] = []
    refused: dict[int, ConfigError] = {}
    counts = np.bincount(labels)
    for wanted in range(1, 9):
        try:
            parts = shards(labels, clients, wanted, seed)
        except ConfigError as error:
            refused[wanted] = error
            continue
        possible.append(wanted)
        holders = (parts.table(labels, len(counts)) > 0).sum(axis=0)
        for one, other in np.ndindex(len(counts), len(counts)):
            if holders[one] > 1 and counts[other] > holders[other] < clients:
                # No shard could go from a class to another for the better.
                assert (holders[one] - 1) / counts[one] <= (holders[other] + 1) / counts[other] + 1e-9
    present = int((counts > 0).sum())
    for wanted, error in refused.items():
        expected = error.expected
        assert (error.key, error.value) == ("dataset.classes_per_client", wanted)
        reported = int(next(word.strip(",:") for word in expected.split() if word.strip(",:").isdigit()))
        if expected.startswith("at least"):
            assert reported == -(-present // clients) > wanted
            rest = f", so that {clients} clients hold all {present} classes"
        elif wanted > present:
            assert reported == present
            rest = ", the classes that there are"
        else:
            # What is said is the last that can be, unless other classes would then be left out.
            assert reported == max(possible, default=reported) < wanted
            rest = ": rare classes have fewer samples than would need them"
        assert expected == f"{expected[:8].strip()} {reported}{rest}"


@pytest.mark.parametrize("alpha", [0.4, 3.0])
def test_sizes_by_quantity_have_the_variance_of_the_dirichlet(alpha: float) -> None:
    config = DatasetConfig("synthetic", distribution="quantity_skew", alpha=alpha, min_samples=0)
    labels = np.zeros(10_000, dtype=np.int64)
    sizes = np.stack([partition(labels, 5, config, seed=seed).sizes for seed in range(400)])
    assert (sizes / len(labels)).var() == pytest.approx(0.2 * 0.8 / (5 * alpha + 1), rel=0.12)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_clients_of_a_major_class_are_as_many_as_its_share_says(share: float) -> None:
    counts = np.array([600, 0, 300, 100])
    labels = np.repeat(np.arange(4), counts)
    config = DatasetConfig("synthetic", distribution="class_major", major_share=share)
    parts = partition(labels, 10, config, seed=1)
    table = parts.table(labels, 4)
    if share == 1:
        assert sorted(map(tuple, table.tolist())) == [(0, 0, 0, 100)] + [(0, 0, 100, 0)] * 3 + [(100, 0, 0, 0)] * 6
    else:
        assert (table[:, 3] == 0).any(), "met for the one client of the rarest class, whose others last"


# ---------------------------------------------------------------------- streams, files and what is told


def test_partitions_are_drawn_from_the_streams_of_their_purposes() -> None:
    def stream(seed: int, purpose: str) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(purpose.encode())])

    for seed in (0, 7, 2**64 - 1):
        owner = stream(seed, "partition").permutation([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
        parts = partition(np.zeros(10, dtype=int), 3, DatasetConfig("synthetic", distribution="iid"), seed=seed)
        assert [parts.indices(client).tolist() for client in range(3)] == [
            np.flatnonzero(owner == client).tolist() for client in range(3)
        ]
        drawn = stream(seed, "local test")
        rank, order = drawn.permutation(3), drawn.permutation(4)
        line = [client for client in np.argsort(rank) for _ in range(parts.sizes[client])]
        local = apply_partition(parts, np.zeros(10, dtype=int), np.zeros(4, dtype=int), seed=seed)
        expected = {int(sample): line[int((at + 0.5) * 10 / 4)] for at, sample in enumerate(order)}
        assert {s: c for c in range(3) for s in local.indices(c).tolist()} == expected
    assert derived(-1, "x").integers(2**62) == stream(2**64 - 1, "x").integers(2**62), "seeds are taken of 64 bits"


@pytest.mark.parametrize("cells", [1, 6, 9, 1000])
def test_the_table_is_whole_however_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    def drawn(path: Path, parts: Partition, labels: np.ndarray, names: Sequence[str]) -> None:
        path.write_text(f"{len(parts)} {labels.tolist()} {list(names)}")

    monkeypatch.setattr(partition_files, "_CELLS", cells)
    monkeypatch.setattr(partition_files, "draw", drawn)
    owner, labels = np.array([0, 1, 1, 3, 4, 4, 4, 6]), np.array([0, 1, 2, 2, 0, 0, 1, 2])
    names = ["samples", "client", "client"]
    save_partition(tmp_path, Partition.from_owner(owner, 7), torch.from_numpy(labels), 3, names)
    with (tmp_path / "partition.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["client", "samples", *names]
    expected = [
        [c, *(sum(owner == c), *(sum((owner == c) & (labels == k)) for k in range(3)))] for c in range(7)
    ]  # fmt: skip
    assert [[int(value) for value in row] for row in rows] == expected
    assert (tmp_path / "partition.png").read_text() == f"7 {labels.tolist()} {names}"


def natural(groups: Sequence[int] | None, clients: int, **values: Any) -> Partition:
    config = DatasetConfig("synthetic", distribution="natural", **values)
    own = None if groups is None else np.array(groups)
    return partition(np.zeros(6 if own is None else len(own), dtype=int), clients, config, seed=0, groups=own)


def iid(samples: int, clients: int, least: int = 1) -> Partition:
    return partition(np.zeros(samples, dtype=int), clients, DatasetConfig("synthetic", min_samples=least), seed=0)


@pytest.mark.parametrize(
    ("make", "reported"),
    [
        (lambda: iid(5, 0), "num_clients=0: expected an integer >= 1"),
        (lambda: iid(5, 6), "num_clients=6: expected at most 5, the training samples"),
        (lambda: iid(11, 3, 4), "dataset.min_samples=4: expected at most 3: 11 samples, 3 clients"),
        (
            lambda: natural(None, 2),
            "dataset.distribution=natural: expected a dataset with natural groups, such as femnist, shakespeare, or "
            "image_folder with dataset.options.group",
        ),
        (lambda: natural([1, 1, 2, 2], 3), "num_clients=3: expected at most 2, the natural groups"),
        (
            lambda: natural([1, 1, 2, 2, 3], 3, drop_unassigned=True, min_samples=1) and natural([1] * 8 + [2], 2,
            drop_unassigned=True, min_samples=2),
            "num_clients=2: expected at most 1, the natural groups with at least 2 samples",
        ),
        (
            lambda: natural([1] * 8 + [2], 2, min_samples=2),
            "dataset.min_samples=2: expected at most 1, the smallest client of this natural split, or another "
            "drop_unassigned or num_clients",
        ),
        (
            lambda: moments("imagenet", torch.zeros(1, 2, 1, 1, dtype=torch.uint8), 2, ((), ())),
            "dataset.normalize=imagenet: expected dataset or none for images of 2 channels",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_full(make: Callable[[], Any], reported: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == reported


def test_too_few_samples_of_shards_are_said_in_full() -> None:
    labels = np.repeat([0, 1], [1, 5])
    config = DatasetConfig("synthetic", distribution="shards", classes_per_client=1, min_samples=2)
    with pytest.raises(ConfigError) as caught:
        partition(labels, 2, config, seed=0)
    assert str(caught.value) == (
        "dataset.min_samples=2: expected at most 1, the smallest client of this shards split, or another "
        "classes_per_client"
    )
