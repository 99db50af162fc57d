"""Batches: order, augmentation, normalisation, and streaming, against torchvision and plain loops."""

import gc
import threading
import time
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from cutlayer.datasets import Dataset, DatasetConfig, Source, batch_count, batch_sizes, load
from cutlayer.datasets.augment import augmentation, crop, flip, resized_crop
from cutlayer.datasets.image_source import CHUNK_VALUES, ImageSource, ResidentStore, StreamStore
from cutlayer.datasets.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalizer, channel_statistics
from cutlayer.runtime.ground.config import ConfigError

CPU = torch.device("cpu")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(n: int, channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=rng(9))


def make(store: Any, n: int, augment: Any = "none", dtype: torch.dtype = torch.float32) -> Source:
    plain = Normalizer((0.0,) * store.shape[0], (1 / 255,) * store.shape[0], CPU, dtype)
    return ImageSource(store, torch.arange(n), plain, augmentation(augment), CPU)


@given(n=st.integers(0, 300), size=st.integers(1, 50), drop=st.sampled_from(["auto", "always", "never", True, False]))
def test_batch_sizes(n: int, size: int, drop: Any) -> None:
    sizes = batch_sizes(n, size, drop)
    loader = torch.utils.data.DataLoader(range(n), batch_size=size, drop_last=drop in (True, "always"))  # type: ignore[arg-type]
    expected = [len(batch) for batch in loader]
    if drop == "auto" and len(expected) > 1 and expected[-1] == 1 and size > 1:
        expected.pop()
    assert sizes == expected
    assert batch_count(n, size, drop) == len(expected)


@pytest.mark.parametrize(("size", "drop"), [(0, False), (3, "sometimes")])
def test_batch_sizes_refuse(size: int, drop: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        batch_sizes(10, size, drop)


def reference_crop_flip(image: Tensor, top: int, left: int, mirrored: bool) -> Tensor:
    image = reference.crop(reference.pad(image, [4, 4, 4, 4]), top, left, image.shape[1], image.shape[2])
    return reference.horizontal_flip(image) if mirrored else image


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (2, 9, 14)])
def test_crop_flip_is_torchvision_s(channels: int, height: int, width: int) -> None:
    x = pixels(40, channels, height, width)
    found = augmentation("crop_flip")
    assert found is not None
    p = found.draw((40, height, width), rng())
    assert 0 < int(p["mirrored"].sum()) < 40
    rows = zip(x, p["top"].tolist(), p["left"].tolist(), p["mirrored"].tolist(), strict=True)
    expected = torch.stack([reference_crop_flip(*row) for row in rows])
    assert torch.equal(found.apply(x, p), expected)
    assert torch.equal(flip(crop(x, p["top"], p["left"]), p["mirrored"]), expected)


def test_crop_and_flip_draw_all_places_evenly() -> None:
    found = augmentation("crop_flip")
    assert found is not None
    p = found.draw((90_000, 32, 32), rng())
    for side in ("top", "left"):
        assert torch.bincount(p[side], minlength=9) / 10_000 == pytest.approx(np.ones(9), abs=0.05)
    assert p["mirrored"].float().mean() == pytest.approx(0.5, abs=0.01)


def test_resized_crop_is_torchvision_s() -> None:
    x = pixels(30, 3, 24, 36)
    found = augmentation("resized_crop_flip")
    assert found is not None
    box = found.draw((30, 24, 36), rng())["box"]
    expected = torch.stack([
        reference.resized_crop(image.float(), *map(int, one), size=[24, 36], antialias=False)
        for image, one in zip(x, box.tolist(), strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(resized_crop(x, box), expected, atol=1e-2, rtol=1e-4)


def test_resized_crop_boxes_lie_inside() -> None:
    found = augmentation("resized_crop_flip")
    assert found is not None
    top, left, height, width = found.draw((5000, 64, 48), rng())["box"].T
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() <= 64
    assert (left + width).max() <= 48
    area = height * width / (64 * 48)
    assert area.min() < 0.12
    assert area.max() > 0.8


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalising_is_torchvision_s(channels: int, dtype: torch.dtype) -> None:
    x = pixels(8, channels)
    mean, std = IMAGENET_MEAN[:channels], IMAGENET_STD[:channels]
    expected = reference.normalize(x.double() / 255, list(mean), list(std))
    found = Normalizer(mean, std, CPU, dtype)(x)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_measured_moments() -> None:
    x = pixels(50, 2, 5, 7)
    x[:, 1] = 8
    mean, std = channel_statistics(x)
    values = x.double().transpose(0, 1).flatten(1) / 255
    assert mean == pytest.approx(values.mean(1).tolist())
    assert std == pytest.approx([float(values[0].std(correction=0)), 1 / 255])


@settings(deadline=None, max_examples=30)
@given(
    k=st.integers(0, 70), size=st.integers(1, 30), epochs=st.integers(0, 3), shuffle=st.booleans(),
    augment=st.booleans(), drop=st.sampled_from(["auto", True, False]), seed=st.integers(0, 99),
    chunk=st.sampled_from([1, 1500, CHUNK_VALUES]),
)  # fmt: skip
def test_batches_equal_a_plain_loop(
    k: int, size: int, epochs: int, shuffle: bool, augment: bool, drop: Any, seed: int, chunk: int
) -> None:
    images = pixels(80, 2, 10, 8)
    indices = torch.randperm(80, generator=rng(seed))[:k]
    source = make(ResidentStore(images, CPU), 80, "crop_flip")
    options: dict[str, Any] = {"shuffle": shuffle, "augment": augment, "drop_last": drop, "generator": rng(seed)}
    with patch("cutlayer.datasets.image_source.CHUNK_VALUES", chunk):
        found = list(source.batches(indices, batch_size=size, epochs=epochs, **options))
    generator, expected = rng(seed), []
    recipe = augmentation("crop_flip")
    assert recipe is not None
    for _ in range(epochs):
        order = indices[torch.randperm(k, generator=generator)] if shuffle else indices
        order = order[: sum(batch_sizes(k, size, drop))]
        x = images[order]
        if augment:
            p = recipe.draw((len(order), 10, 8), generator)
            rows = zip(x, p["top"].tolist(), p["left"].tolist(), p["mirrored"].tolist(), strict=True)
            x = torch.stack([reference_crop_flip(*row) for row in rows]) if len(order) else x
        expected += list(zip(x.float().split(size), order.split(size), strict=True)) if len(order) else []
    assert len(found) == len(expected) == epochs * batch_count(k, size, drop)
    for (x, y), (wanted_x, wanted_y) in zip(found, expected, strict=True):
        assert torch.equal(y, wanted_y)
        torch.testing.assert_close(x, wanted_x, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop_flip"])
def test_streaming_gives_the_same_values(workers: int, augment: str) -> None:
    images = pixels(120, 3, 64, 64)
    assert 3 * 25 * 3 * 64 * 64 < CHUNK_VALUES < images.numel(), "several batches a chunk, several chunks"
    resident = make(ResidentStore(images, CPU), 120, augment)
    stream = make(StreamStore(images, CPU, workers), 120, augment)
    options: dict[str, Any] = {"batch_size": 25, "epochs": 2, "shuffle": True, "augment": True}
    pairs = zip(
        resident.batches(torch.arange(120), generator=rng(), **options),
        stream.batches(torch.arange(120), generator=rng(), **options),
        strict=True,
    )
    for (x, y), (other_x, other_y) in pairs:
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def test_streaming_reads_ahead_and_stops_when_the_caller_does() -> None:
    read: list[int] = []

    class Slow(StreamStore):
        def _read(self, out: Tensor, piece: Tensor, boxes: Tensor | None) -> None:
            time.sleep(0.005)
            read.extend(piece.tolist())

    before = set(threading.enumerate())
    store = Slow(pixels(1000, 1, 2, 2), CPU, workers=2)
    chunks = store.chunks(torch.arange(1000).split(10))
    next(chunks)
    chunks.close()
    time.sleep(0.05)
    assert 10 <= len(read) <= 40
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    del store, chunks
    gc.collect()
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started), "the pool ends with its store"


def test_an_error_in_a_worker_reaches_the_caller() -> None:
    class Broken(StreamStore):
        def _read(self, out: Tensor, piece: Tensor, boxes: Tensor | None) -> None:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(make(Broken(pixels(10), CPU, 2), 10).batches(torch.arange(10), batch_size=5))


def test_randomness_needs_a_generator_and_leaves_the_global_one_alone() -> None:
    source = make(ResidentStore(pixels(10), CPU), 10, "flip")
    for asked in ({"shuffle": True}, {"augment": True}):
        with pytest.raises(ValueError, match="generator"):
            next(source.batches(torch.arange(10), batch_size=2, **asked))  # type: ignore[arg-type]
    before = torch.get_rng_state()
    list(source.batches(torch.arange(10), batch_size=2, shuffle=True, augment=True, generator=rng()))
    assert torch.equal(before, torch.get_rng_state())


def synthetic(**values: Any) -> Dataset:
    options = {"n_train": 103, "n_test": 11, "channels": 3, "height": 6, "width": 5, "classes": 4} | values.pop(
        "options", {}
    )
    return load(DatasetConfig("synthetic", options=options, **values), seed=1, device=CPU, dtype=torch.float32)


def all_of(source: Source) -> Tensor:
    return torch.cat([x for x, _ in source.batches(torch.arange(len(source)), batch_size=17)])


def test_dataset_normalisation_centres_the_training_images() -> None:
    x = all_of(synthetic().train)
    assert x.mean((0, 2, 3)) == pytest.approx(np.zeros(3), abs=1e-4)
    assert x.std((0, 2, 3), correction=0) == pytest.approx(np.ones(3), abs=1e-4)


def test_no_normalisation_is_the_unit_range() -> None:
    x = all_of(synthetic(normalize="none").train)
    assert 0 <= x.min() < 0.1
    assert 0.9 < x.max() <= 1


def test_imagenet_normalisation_by_channels() -> None:
    assert synthetic(normalize="imagenet").train.mean == IMAGENET_MEAN
    grey = synthetic(normalize="imagenet", options={"channels": 1}).train
    assert (*grey.mean, *grey.std) == pytest.approx((0.449, 0.226), abs=1e-9)
    with pytest.raises(ConfigError, match=r"dataset\.normalize=imagenet: .*2 channels"):
        synthetic(normalize="imagenet", options={"channels": 2})


@pytest.mark.parametrize("storage", ["auto", "device", "stream"])
def test_storage_does_not_change_values(storage: Literal["auto", "device", "stream"]) -> None:
    assert torch.equal(all_of(synthetic(storage=storage).train), all_of(synthetic().train))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_validation_is_held_out_of_each_class(share: float) -> None:
    whole, data = synthetic(), synthetic(validation=share, normalize="none")
    assert data.validation is not None
    assert len(data.validation) == round(share * 103)
    assert len(data.train) + len(data.validation) == 103
    counts = torch.bincount(data.validation.labels, minlength=4)
    assert (counts - share * torch.bincount(whole.train.labels)).abs().max() <= 1
    both = torch.cat([all_of(data.train), all_of(data.validation)]).flatten(1)
    plain = all_of(synthetic(normalize="none").train).flatten(1)
    assert sorted(both.tolist()) == sorted(plain.tolist())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_a_fraction_of_each_class_is_trained_on_and_what_is_held_out_stays(share: float) -> None:
    whole, data = (synthetic(validation=0.2, normalize="none", fraction=f) for f in (1.0, share))
    assert whole.validation is not None
    assert data.validation is not None
    assert torch.equal(all_of(data.validation), all_of(whole.validation))
    assert torch.equal(all_of(data.test), all_of(whole.test))
    assert len(data.train) == len(whole.train) - round((1 - share) * len(whole.train))
    counts, every = (torch.bincount(each.train.labels, minlength=4) for each in (data, whole))
    assert (counts - share * every).abs().max() <= 1
    chosen, others = all_of(data.train).flatten(1).tolist(), all_of(whole.train).flatten(1).tolist()
    assert all(picture in others for picture in chosen)
    assert len({*map(tuple, chosen)}) == len(chosen)


def test_a_fraction_that_leaves_nothing() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.fraction=0\.001: expected a share that leaves both parts of 103"):
        synthetic(fraction=0.001)


def test_validation_that_leaves_nothing() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.validation"):
        synthetic(validation=0.999)
