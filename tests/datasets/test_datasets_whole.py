"""Random crops are cut out of whole pictures, as torchvision's recipes cut them, and not out of their centres."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from cutlayer.datasets import Dataset, DatasetConfig, load
from cutlayer.datasets.augment import of_whole_pictures
from cutlayer.datasets.boxes import BOX_NUMBERS, random_boxes
from cutlayer.runtime.ground.config import ConfigError

AREA = (0.08, 1.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(root: Path, sizes: list[tuple[int, int]]) -> list[Image.Image]:
    """Smooth pictures of these heights and widths in two classes; the training ones in order of path."""
    made: list[Image.Image] = []
    draw = np.random.default_rng(0)
    for at, (height, width) in enumerate(sizes):
        coarse = Image.fromarray(draw.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
        for part in ("train", "test"):
            path = root / part / ("ant" if at < len(sizes) // 2 else "bee") / f"{at:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        made.append(picture)
    return made


SIZES = [(40, 60), (64, 30), (33, 33), (30, 90), (50, 41), (37, 52)]


def loaded(root: Path, augment: Any = "resized_crop_flip", **values: Any) -> Dataset:
    config = DatasetConfig("image_folder", root=root, normalize="none", augment=augment, options={"size": 24}, **values)
    return load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_crop_is_torchvision_s_of_the_whole_picture(tmp_path: Path, workers: int) -> None:
    made = pictures(tmp_path, SIZES)
    source = loaded(tmp_path, workers=workers).train
    params = source.draw(6, rng())
    (found,) = source.take(torch.arange(6), [params])
    for at, picture in enumerate(made):
        box = random_boxes(params["uniform"][at : at + 1], picture.height, picture.width, AREA)[0].int().tolist()
        expected = reference.pil_to_tensor(reference.resized_crop(picture, *box, size=[24, 24]))
        expected = expected.flip(-1) if params["mirrored"][at] else expected
        assert torch.equal((found[at] * 255).round().byte(), expected)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 160), (64, 64)])
def test_boxes_are_drawn_as_torchvision_draws_them(height: int, width: int) -> None:
    n = 3000
    torch.manual_seed(1)
    transform, image = v2.RandomResizedCrop(224), torch.zeros(1, height, width)
    drawn = [transform.make_params([image]) for _ in range(n)]
    theirs = np.array([[each[key] for key in ("top", "left", "height", "width")] for each in drawn])
    ours = random_boxes(torch.rand(n, BOX_NUMBERS, generator=rng(2)), height, width, AREA).numpy()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3


@pytest.mark.parametrize("augment", ["resized_crop_flip", "moco"])
def test_what_lies_outside_of_the_centre_is_seen(tmp_path: Path, augment: str) -> None:
    """Red ends of a broad picture, which its centre lacks: random crops show them, the test never does."""
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            values = np.zeros((30, 120, 3), dtype=np.uint8)
            values[:, :40, 0] = values[:, 80:, 0] = 255
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(values).save(tmp_path / part / name / "a.png")
    data = loaded(tmp_path, augment)

    def reds(**how: Any) -> float:
        x = torch.cat([x for x, _ in data.train.batches(torch.tensor([0, 1]), batch_size=2, epochs=100, **how)])
        return float((x.amax((1, 2, 3)) > 0.2).double().mean())

    assert reds(augment=True, generator=rng()) > 0.25
    assert reds() == 0
    (test, _) = next(data.test.batches(torch.tensor([0]), batch_size=1))
    assert test.max() == 0


@pytest.mark.parametrize("augment", ["resized_crop_flip", "moco"])
def test_values_do_not_depend_on_batches_workers_or_the_way(tmp_path: Path, augment: str) -> None:
    pictures(tmp_path, SIZES)
    sources = [
        loaded(tmp_path, augment, workers=workers, storage=s).train for workers, s in ((0, "stream"), (3, "auto"))
    ]
    order = torch.tensor([4, 0, 5, 1])

    def batches(source: Any, size: int) -> Tensor:
        found = source.batches(order, batch_size=size, epochs=2, shuffle=True, augment=True, generator=rng(3))
        return torch.cat([x for x, _ in found])

    whole = batches(sources[0], 4)
    assert torch.equal(whole, batches(sources[1], 4))
    assert torch.equal(whole, batches(sources[1], 1))
    views = [sources[0].draw(4, rng(seed)) for seed in (0, 1)]
    one, two, plain = sources[0].take(order, [*views, {}])
    assert not torch.equal(one, two)
    assert torch.equal(two, sources[1].take(order, views[1:])[0])
    assert torch.equal(plain, torch.cat([x for x, _ in sources[0].batches(order, batch_size=3)]))


def test_what_is_stored_whole_is_cropped_where_it_is(tmp_path: Path) -> None:
    """Images of the files' own size may stay in memory; those that are cut may not, if boxes are to be cut instead."""
    pictures(tmp_path, [(24, 24)] * 4)
    config = DatasetConfig("image_folder", root=tmp_path, augment="resized_crop_flip", storage="device")
    data = load(config, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    assert {*data.train.draw(3, rng())} == {"box", "mirrored"}
    assert of_whole_pictures("crop_flip") is None
    with pytest.raises(ConfigError, match=r"dataset\.storage=device: .*augment=resized_crop_flip, which cuts boxes"):
        loaded(tmp_path, storage="device")
    loaded(tmp_path, "flip", storage="device")
