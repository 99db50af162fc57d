"""The images of a batch in another shape than the stored ones: resized, and grey ones repeated to colours."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from cutlayer.datasets import Dataset, DatasetConfig, Source, load
from cutlayer.datasets.image_source import CHUNK_VALUES
from cutlayer.runtime.ground.config import ConfigError, build

CPU = torch.device("cpu")
OPTIONS = {"n_train": 41, "n_test": 9, "channels": 1, "height": 12, "width": 10, "classes": 3}


def synthetic(channels: int = 1, **values: Any) -> Dataset:
    config = DatasetConfig("synthetic", options={**OPTIONS, "channels": channels}, **values)
    return load(config, seed=1, device=CPU, dtype=torch.float32)


def all_of(source: Source, size: int = 17, **how: Any) -> Tensor:
    return torch.cat([x for x, _ in source.batches(torch.arange(len(source)), batch_size=size, **how)])


@pytest.mark.parametrize("side", [5, 12, 32])
def test_images_are_resized_as_torchvision_does(side: int) -> None:
    plain, resized = synthetic(3), synthetic(3, resize=side)
    assert resized.info.shape == resized.train.shape == resized.test.shape == (3, side, side)
    expected = reference.resize(all_of(plain.train), [side, side], antialias=True)
    assert torch.allclose(all_of(resized.train), expected, atol=1e-6)
    assert torch.allclose(
        all_of(resized.test), reference.resize(all_of(plain.test), [side, side], antialias=True), atol=1e-6
    )


def test_the_augmentation_comes_first_and_is_that_of_the_stored_size() -> None:
    plain, resized = synthetic(augment="crop_flip"), synthetic(augment="crop_flip", resize=24)
    drawn = [all_of(data.train, augment=True, generator=torch.Generator().manual_seed(4)) for data in (plain, resized)]
    assert torch.allclose(drawn[1], reference.resize(drawn[0], [24, 24], antialias=True), atol=1e-6)


@pytest.mark.parametrize("storage", ["device", "stream"])
def test_where_images_are_and_how_they_are_cut_into_batches_changes_nothing(storage: Any) -> None:
    data = synthetic(resize=20, storage=storage, validation=0.2).repeated(3)
    other = synthetic(resize=20, validation=0.2).repeated(3)
    assert data.validation is not None
    assert other.validation is not None
    for mine, theirs in ((data.train, other.train), (data.test, other.test), (data.validation, other.validation)):
        assert torch.equal(all_of(mine, 3), all_of(theirs, 16))


def test_what_is_resized_at_once_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    resize = torch.nn.functional.interpolate

    def counted(x: Tensor, *args: Any, **how: Any) -> Tensor:
        y = resize(x, *args, **how)
        sizes.append(y.numel())
        return y

    monkeypatch.setattr("cutlayer.datasets.image_source.functional.interpolate", counted)
    assert all_of(synthetic(resize=300).train, size=1).shape == (41, 1, 300, 300)
    assert max(sizes) <= CHUNK_VALUES < sum(sizes)


def test_grey_images_are_repeated_in_the_memory_of_one() -> None:
    grey = synthetic()
    colours = grey.repeated(3)
    assert colours.info == replace(grey.info, channels=3)
    assert colours.train.shape == (3, 12, 10)
    x, y = next(colours.train.batches(torch.arange(8), batch_size=8))
    assert x.shape == (8, 3, 12, 10)
    assert x.stride(1) == 0, "the three are one"
    assert torch.equal(x, all_of(grey.train)[:8].repeat(1, 3, 1, 1))
    assert torch.equal(y, grey.train.labels[:8])
    assert grey.train.shape == (1, 12, 10), "the grey ones are as they were"


def test_nothing_is_done_where_nothing_is_to_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cutlayer.datasets.image_source.functional.interpolate", None)
    square = DatasetConfig("synthetic", options={**OPTIONS, "width": 12}, resize=12)
    data = load(square, seed=1, device=CPU, dtype=torch.float32)
    assert data.repeated(1) is data
    x, _ = next(data.train.batches(torch.arange(8), batch_size=8))
    assert x.is_contiguous()


@pytest.mark.parametrize("value", [0, -3, "large", 2.5])
def test_a_size_is_a_whole_number_of_pixels(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.resize=.*: expected"):
        build(DatasetConfig, {"name": "digits", "resize": value}, "dataset")
