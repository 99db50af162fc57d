"""What workers are given: equal to what it was, apart where it is written to, and once in memory."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from cutlayer.datasets import DatasetConfig, load
from cutlayer.runtime.workers.shared import Shared

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool)


@given(
    shapes=st.lists(st.lists(st.integers(0, 70), max_size=3), max_size=4),
    dtype=st.sampled_from(DTYPES),
    turned=st.booleans(),
)
def test_tensors_and_arrays_come_back_as_they_were(shapes: list[list[int]], dtype: torch.dtype, turned: bool) -> None:
    value: dict[str, Any] = {}
    for number, shape in enumerate(shapes):
        tensor = torch.randint(0, 2, shape).to(dtype)
        value[f"tensor {number}"] = tensor.T if turned and tensor.dim() == 2 else tensor
        value[f"array {number}"] = np.random.default_rng(0).integers(0, 9, shape)
    before = pickle.loads(pickle.dumps(value))
    shared = Shared(value)
    found = shared.load()
    shared.close()
    for each in (value, found):
        for name, expected in before.items():
            if isinstance(expected, torch.Tensor):
                assert torch.equal(each[name], expected)
                assert (each[name].dtype, each[name].stride()) == (expected.dtype, expected.stride())
            else:
                assert np.array_equal(each[name], expected)


def test_what_one_process_writes_the_others_do_not_see() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 4096))
    images = torch.arange(100_000)
    shared = Shared({"model": model, "same": model[0].weight, "images": images, "view": images})
    one, other = shared.load(), shared.load()
    assert one["same"] is one["model"][0].weight
    assert one["images"] is one["view"]
    with torch.no_grad():
        one["same"].zero_()
        one["images"].zero_()
    for each in (other, {"same": model[0].weight, "images": images}):
        assert bool(each["same"].any())
        assert torch.equal(each["images"], torch.arange(100_000))
    one["model"](torch.ones(2, 64)).sum().backward()
    assert one["same"].grad is not None


def test_large_tensors_of_the_object_itself_move_into_the_shared_memory() -> None:
    """So that the images are in memory once."""
    images = torch.zeros(1000, 3, 32, 32, dtype=torch.uint8)
    before = images.untyped_storage()
    Shared(images)
    assert images.untyped_storage().data_ptr() != before.data_ptr()


@pytest.mark.parametrize("storage", ["device", "stream"])
@pytest.mark.parametrize("augment", ["none", "flip", "crop", "crop_flip", "resized_crop_flip", "moco"])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_images_are_read_the_same_there(packed: bool, augment: Any, storage: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for number in range(6):
            path = tmp_path / "images" / part / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
    root = tmp_path / "images"
    if packed:
        root = tmp_path / "images.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for path in sorted((tmp_path / "images").rglob("*.png")):
                archive.write(path, path.relative_to(tmp_path / "images"))
    config = DatasetConfig(name="image_folder", root=root, augment=augment, storage=storage, workers=2)
    dataset = load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)

    def batches(source: Any) -> list[torch.Tensor]:
        made = source.batches(
            torch.arange(6),
            batch_size=4,
            epochs=1,
            shuffle="epoch",
            augment=True,
            drop_last="never",
            generator=torch.Generator().manual_seed(0),
        )
        return [tensor for batch in made for tensor in batch]

    expected = batches(dataset.train)  # threads are there by now
    shared = Shared(dataset)
    found = batches(shared.load().train)
    assert len(found) == 4
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
