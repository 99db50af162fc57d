"""The crops and the blur of MoCo's views, by the keys that change them."""

import pytest
import torch
from scipy import stats
from scipy.ndimage import gaussian_filter

from cutlayer.datasets import DatasetConfig
from cutlayer.datasets.augment import augmentation, blur_parameters, moco_parameters, of_whole_pictures
from cutlayer.datasets.blur import blur
from cutlayer.runtime.ground.config import ConfigError
from tests.datasets.test_datasets_moco import photographs, rng


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 7, 5)])
def test_the_blur_is_scipy_s(channels: int, height: int, width: int) -> None:
    x = photographs(20)[:, :channels, :height, :width].float()
    deviation = torch.linspace(0.1, 2, 20)
    chosen = torch.arange(20) % 3 > 0
    found = blur(x, deviation, chosen)
    assert torch.equal(found[~chosen], x[~chosen])
    for image, blurred, sigma in zip(x[chosen], found[chosen], deviation[chosen], strict=True):
        for one, other in zip(image, blurred, strict=True):
            expected = gaussian_filter(one.double().numpy(), float(sigma), mode="nearest", radius=8)
            torch.testing.assert_close(other.double(), torch.from_numpy(expected), atol=1e-3, rtol=0)


def test_an_image_s_blur_does_not_depend_on_the_rest_of_its_batch() -> None:
    x, deviation = photographs(20).float(), torch.linspace(0.1, 2, 20)
    whole = blur(x, deviation, torch.ones(20, dtype=torch.bool))
    for place in range(20):
        alone = blur(x[[place]], deviation[[place]], torch.tensor([True]))
        assert torch.equal(whole[place], alone[0])


def test_half_of_the_views_are_blurred_by_any_deviation() -> None:
    recipe = augmentation("moco", 0.08, 0.5)
    assert recipe is not None
    deviation, chosen = blur_parameters(recipe.draw((20_000, 32, 32), rng())["uniform"], 0.5)
    assert float(chosen.double().mean()) == pytest.approx(0.5, abs=0.02)
    for some in (deviation[chosen], deviation[~chosen]):
        assert stats.kstest(some.double().numpy(), stats.uniform(0.1, 1.9).cdf).pvalue > 0.001


def test_the_whole_is_the_views_without_blur_and_then_blurred() -> None:
    x, plain, blurring = photographs(60), augmentation("moco"), augmentation("moco", moco_blur=0.5)
    assert plain is not None
    assert blurring is not None
    uniform = blurring.draw((60, 32, 32), rng())["uniform"]
    expected = blur(plain.apply(x, {"uniform": uniform[:, :30]}), *blur_parameters(uniform, 0.5))
    found = blurring.apply(x, {"uniform": uniform})
    torch.testing.assert_close(found, expected)
    assert (
        15 < sum(not torch.equal(a, b) for a, b in zip(found, plain.apply(x, {"uniform": uniform}), strict=True)) < 45
    )


def test_boxes_are_no_smaller_than_the_least_area() -> None:
    for least in (0.08, 0.2, 0.6):
        p = moco_parameters(torch.rand(5000, 30, generator=rng()), 32, 32, least)
        share = p["box"][:, 2:].prod(1) / 1024
        assert least - 0.03 < float(share.min()) < least + 0.05
        assert float(share.max()) > 0.97
    whole = of_whole_pictures("moco", 0.08)
    assert whole is not None
    assert whole.area == (0.08, 1.0)


@pytest.mark.parametrize(
    ("key", "value"), [("moco_area", 0.0), ("moco_area", 1.5), ("moco_blur", -0.1), ("moco_blur", 2.0)]
)
def test_mistakes_are_one_line(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}={value}: expected a number"):
        DatasetConfig("digits", **{key: value})  # pyright: ignore[reportArgumentType]


def test_a_run_takes_the_keys(configure) -> None:
    from cutlayer.runtime.rounds.federation import Federation

    small = (
        "algorithm=moco_sfl",
        "model.projector.hidden=8",
        "model.projector.width=8",
        "algorithm.queue=64",
        "rounds=1",
    )
    weights = []
    for more in ((), ("dataset.moco_area=0.9",), ("dataset.moco_blur=1",)):
        federation = Federation(configure(*small, *more))
        federation.step()
        weights.append(federation.server.ctx.part("client").state_dict())
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert any(not torch.equal(weights[one][key], weights[other][key]) for key in weights[one])
