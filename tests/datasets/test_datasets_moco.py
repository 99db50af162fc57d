"""MoCo v2's augmentation against torchvision, and batches of the same images taken in several ways."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from cutlayer.datasets import DatasetConfig, Source, load
from cutlayer.datasets.augment import augmentation, flip, moco_parameters, resized_crop
from cutlayer.datasets.colour import BRIGHTNESS, CONTRAST, HUE, SATURATION, greyscale, jitter_
from cutlayer.datasets.image_source import ImageSource, ResidentStore, StreamStore
from cutlayer.datasets.normalize import Normalizer
from cutlayer.runtime.ground.config import ConfigError

CPU = torch.device("cpu")
ADJUST: dict[int, Callable[[Tensor, float], Tensor]] = {
    BRIGHTNESS: reference.adjust_brightness,
    CONTRAST: reference.adjust_contrast,
    SATURATION: reference.adjust_saturation,
    HUE: reference.adjust_hue,
}
EXTREMES = {BRIGHTNESS: (0.6, 1.4), CONTRAST: (0.6, 1.4), SATURATION: (0.6, 1.4), HUE: (-0.1, 0.1)}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photographs(n: int, size: int = 32) -> Tensor:
    """Squares cut out of scikit-learn's two photographs at random places: uint8 [n, 3, size, size]."""
    photos = np.stack(load_sample_images().images)
    draw = np.random.default_rng(5)
    places = zip(draw.integers(0, 2, n), draw.integers(0, 427 - size, n), draw.integers(0, 640 - size, n), strict=True)
    cut = [photos[one, top : top + size, left : left + size] for one, top, left in places]
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).contiguous()


def pictures() -> Tensor:
    """Photographs, noise, and pictures of edges: greys, pure colours, ties of two channels, black and white."""
    levels = torch.tensor([0, 1, 128, 254, 255], dtype=torch.uint8)
    edges = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 25, 5).repeat(1, 1, 2, 7)[:, :, :32, :32]
    noise = torch.randint(0, 256, (15, 3, 32, 32), dtype=torch.uint8, generator=rng(3))
    return torch.cat([edges, noise, photographs(32)])


def jittered_by_torchvision(image: Tensor, order: Sequence[int], factors: Sequence[float]) -> Tensor:
    image = image / 255
    for kind in order:
        image = ADJUST[kind](image, factors[kind])
    return image * 255


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", list(ADJUST))
def test_each_operation_is_torchvision_s(kind: int, channels: int) -> None:
    x = pictures()[:, :channels].float()
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(len(x), 1)
    factors[:, kind] = torch.linspace(*EXTREMES[kind], len(x))
    expected = torch.stack([
        jittered_by_torchvision(image, [kind], one) for image, one in zip(x, factors.tolist(), strict=True)
    ])  # fmt: skip
    order = torch.arange(4).repeat(len(x), 1)
    found = jitter_(x.clone(), order, factors, torch.ones(len(x), dtype=torch.bool))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    changes = channels == 3 or kind in (BRIGHTNESS, CONTRAST)
    assert torch.equal(found, x) != changes


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_in_every_order_is_torchvision_s(channels: int) -> None:
    x = pictures()[:, :channels].float()
    orders = list(itertools.permutations(range(4)))
    assert len(x) == 2 * len(orders)
    order = torch.tensor(orders * 2)
    factors = torch.tensor(list(itertools.product(*EXTREMES.values())) * 3)
    chosen = torch.arange(len(x)) % 5 != 2
    found = jitter_(x.clone(), order, factors, chosen)
    rows = zip(x, order.tolist(), factors.tolist(), strict=True)
    expected = torch.stack([jittered_by_torchvision(*row) for row in rows])
    torch.testing.assert_close(found[chosen], expected[chosen], atol=2e-3, rtol=0)
    assert torch.equal(found[~chosen], x[~chosen]), "the others keep their bits"


def test_greyscale_is_torchvision_s() -> None:
    x = pictures().float()
    chosen = torch.arange(len(x)) % 2 == 0
    found = greyscale(x, chosen)
    torch.testing.assert_close(found[chosen], reference.rgb_to_grayscale(x[chosen], 3), atol=1e-3, rtol=0)
    assert torch.equal(found[~chosen], x[~chosen])


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (3, 20, 28), (1, 28, 28)])
def test_the_whole_is_torchvision_s(channels: int, height: int, width: int) -> None:
    x = photographs(60)[:, :channels, :height, :width]
    recipe = augmentation("moco")
    assert recipe is not None
    drawn = recipe.draw((60, height, width), rng())
    assert {len(value) for value in drawn.values()} == {60}
    p = moco_parameters(drawn["uniform"], height, width)
    for name in ("mirrored", "jittered", "grey"):
        assert 0 < int(p[name].sum()) < 60
    expected = []
    for i, image in enumerate(x):
        one = {name: value[i].tolist() for name, value in p.items()}
        out = reference.resized_crop(image.float(), *map(int, one["box"]), size=[height, width], antialias=False)
        out = reference.horizontal_flip(out) if one["mirrored"] else out
        out = jittered_by_torchvision(out, one["order"], one["factors"]) if one["jittered"] else out
        expected.append(reference.rgb_to_grayscale(out, channels) if one["grey"] else out)
    found = recipe.apply(x, drawn)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(expected), atol=0.05, rtol=0)


def test_mirroring_the_crop_is_mirroring_its_result() -> None:
    x = photographs(30)
    p = moco_parameters(torch.rand(30, 30, generator=rng()), 32, 32)
    assert torch.equal(resized_crop(x, p["box"], p["mirrored"]), flip(resized_crop(x, p["box"]), p["mirrored"]))


def decoded(draws: int, height: int = 32, width: int = 32) -> dict[str, Tensor]:
    recipe = augmentation("moco")
    assert recipe is not None
    return moco_parameters(recipe.draw((draws, height, width), rng(1))["uniform"], height, width)


@pytest.fixture
def seeded() -> Iterator[None]:
    """torchvision draws from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        yield


def alike(found: np.ndarray, expected: np.ndarray) -> float:
    """The chance of a difference this large if both were drawn from one distribution."""
    return float(stats.ks_2samp(found, expected, method="asymp").pvalue)


# In the last size no box of ten fits in three cases of four, and one from the middle is taken.
@pytest.mark.parametrize(("height", "width", "draws"), [(32, 32, 10_000), (24, 40, 4000), (9, 48, 1000)])
def test_boxes_are_distributed_as_torchvision_s(height: int, width: int, draws: int, seeded: None) -> None:
    box = decoded(draws, height, width)["box"].numpy()
    top, left, tall, wide = box.T
    assert np.array_equal(box, np.round(box))
    assert min(top.min(), left.min(), tall.min() - 1, wide.min() - 1) >= 0
    assert (top + tall).max() <= height
    assert (left + wide).max() <= width
    image = torch.empty(3, height, width)
    other = np.array([v2.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(draws)])
    measures: dict[str, Callable[[Any], Any]] = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 2] / b[:, 3],
        "height": lambda b: b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "below": lambda b: height - b[:, 0] - b[:, 2],
        "diagonal": lambda b: b[:, 0] - b[:, 1],
    }
    for name, measure in measures.items():
        assert alike(measure(box), measure(other)) > 0.01, name
    smallest = [np.quantile(measures["area"](one), 0.01) for one in (box, other)]
    assert smallest[0] == pytest.approx(smallest[1], abs=0.005 * height * width)


def test_jitter_is_drawn_as_torchvision_s(seeded: None) -> None:
    p = decoded(10_000)
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    others = [v2.ColorJitter.get_params(*ranges) for _ in range(10_000)]
    factors = np.array([other[1:] for other in others])
    for kind, (low, high) in enumerate(ranges):
        found = p["factors"][:, kind].numpy()
        assert low <= found.min() < low + 1e-3
        assert high - 1e-3 < found.max() <= high
        assert found.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert alike(found, factors[:, kind]) > 0.01
    table = np.zeros((2, 256))
    powers = 4 ** np.arange(4)
    np.add.at(table[0], (p["order"].numpy() * powers).sum(1), 1)
    np.add.at(table[1], (np.array([other[0].tolist() for other in others]) * powers).sum(1), 1)
    assert ((table > 0).sum(1) == 24).all()
    assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 0.01


def test_chances_and_independence() -> None:
    p = decoded(10_000)
    for name, chance in {"jittered": 0.8, "grey": 0.2, "mirrored": 0.5}.items():
        assert stats.binomtest(int(p[name].sum()), 10_000, chance).pvalue > 0.01, name
    columns = [p["box"][:, :2].T, p["factors"].T, (p["order"] == HUE).float().argmax(1)[None]]
    columns += [p[name][None] for name in ("jittered", "grey", "mirrored")]
    together = np.corrcoef(torch.cat([column.double() for column in columns]).numpy())
    # Only the corners of a box hang together: the smaller it is, the farther both may be.
    assert 0.05 < together[0, 1] < 0.5
    together[0, 1] = together[1, 0] = 0
    assert abs(together - np.eye(len(together))).max() < 0.04


def test_pixels_are_distributed_as_torchvision_s(seeded: None) -> None:
    """Averages over 2,000 images: to 2.5 grey levels of 255, some three standard errors of the pairs."""
    x = photographs(2000)
    recipe = augmentation("moco")
    assert recipe is not None
    found = recipe.apply(x, recipe.draw((2000, 32, 32), rng(1)))
    compose = v2.Compose([
        v2.RandomResizedCrop(32, scale=(0.2, 1.0)),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip
    expected = torch.stack([compose(image) for image in x / 255]) * 255
    for measure in (
        lambda x: x.mean((2, 3)),
        lambda x: x.std((2, 3)),
        lambda x: (x.amax(1) - x.amin(1)).mean((1, 2))[:, None],
    ):
        mine, theirs = measure(found), measure(expected)
        assert (mine.mean(0) - theirs.mean(0)).abs().max() < 2.5
        assert (mine.std(0) - theirs.std(0)).abs().max() < 2.5
        for channel in range(mine.shape[1]):
            assert alike(mine[:, channel].numpy(), theirs[:, channel].numpy()) > 0.01


def make(
    store: ResidentStore | StreamStore,
    augment: Any = "moco",
    resize: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Source:
    channels = store.shape[0]
    normalizer = Normalizer((0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels], CPU, dtype)
    return ImageSource(store, torch.arange(50), normalizer, augmentation(augment), CPU, resize)


def concatenated(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("augment", ["flip", "crop", "crop_flip", "resized_crop_flip", "moco"])
@pytest.mark.parametrize(("channels", "resize"), [(3, None), (1, None), (3, 20)])
def test_taken_together_is_taken_apart(augment: str, channels: int, resize: int | None) -> None:
    source = make(ResidentStore(photographs(50)[:, :channels], CPU), augment, resize)
    if channels == 1:
        source = source.repeated(3)
    order = torch.randperm(50, generator=rng())[:23]
    generator = rng(4)
    parts = order.split([1] * 10 + [2, 11])
    views = [[source.draw(len(part), generator) for _ in range(2)] for part in parts]
    apart = [source.take(part, [*view, {}]) for part, view in zip(parts, views, strict=True)]
    together = source.take(order, [*(concatenated(view) for view in zip(*views, strict=True)), {}])
    for whole, pieces in zip(together, zip(*apart, strict=True), strict=True):
        assert whole.shape == (23, *source.shape)
        assert torch.equal(whole, torch.cat(pieces))
    assert not torch.equal(together[0], together[1])
    (plain,) = [x for x, _ in source.batches(order, batch_size=23)]
    assert torch.equal(together[2], plain)


@pytest.mark.parametrize("augment", ["none", "crop_flip", "moco"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taking_is_what_batches_do(augment: str, dtype: torch.dtype) -> None:
    images = photographs(50)
    source = make(ResidentStore(images, CPU), augment, dtype=dtype)
    order = torch.arange(49, 9, -1)
    (taken,) = source.take(order, [source.draw(40, rng(2))])
    batches = [x for x, _ in source.batches(order, batch_size=7, augment=True, generator=rng(2))]
    assert taken.dtype == dtype
    assert torch.equal(taken, torch.cat(batches))
    assert torch.equal(images, photographs(50)), "what is stored stays as it is"


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_read_once(workers: int) -> None:
    read: list[int] = []

    class Counting(StreamStore):
        def _read(self, out: Tensor, piece: Tensor, boxes: Tensor | None) -> None:
            read.extend(piece.tolist())
            super()._read(out, piece, boxes)

    images = photographs(50)
    order = torch.tensor([3, 44, 17])
    stream, resident = make(Counting(images, CPU, workers)), make(ResidentStore(images, CPU))
    params = [stream.draw(3, rng(seed)) for seed in (0, 1)]
    for found, expected in zip(stream.take(order, params), resident.take(order, params), strict=True):
        assert torch.equal(found, expected)
    assert sorted(read) == [3, 17, 44]
    assert [len(found) for found in resident.take(order[:0], [resident.draw(0, rng()), {}])] == [0, 0]


def test_parameters_without_an_augmentation_are_refused() -> None:
    store = ResidentStore(photographs(50), CPU)
    assert make(store, "none").draw(3, rng()) == {}
    with pytest.raises(ValueError, match="has none"):
        make(store, "none").take(torch.arange(3), [{}, make(store).draw(3, rng())])


def test_images_of_two_channels_have_no_colours_to_jitter() -> None:
    config = DatasetConfig("synthetic", augment="moco", options={"n_train": 20, "n_test": 10, "channels": 2})
    with pytest.raises(ConfigError, match=r"dataset\.augment=moco: .*2 channels"):
        load(config, seed=1, device=CPU, dtype=torch.float32)
