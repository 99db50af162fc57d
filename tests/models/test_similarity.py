"""SSIM, PSNR and mean squared error against closed forms, SciPy's filters, scikit-image and finite differences."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from cutlayer.models.similarity import mse, psnr, ssim

C1, C2 = 0.01**2, 0.03**2


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images with something in common."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(shape, generator=generator, dtype=dtype)
    return x, (0.6 * x + 0.4 * torch.rand(shape, generator=generator, dtype=dtype)).clamp(0, 1)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 1, 8, 8), (3, 1, 1, 5)])
def test_an_image_is_like_itself(shape: tuple[int, ...]) -> None:
    x, _ = pair(*shape)
    assert torch.allclose(ssim(x, x), torch.ones(shape[0], dtype=x.dtype), atol=1e-12)
    assert torch.equal(mse(x, x), torch.zeros(shape[0], dtype=x.dtype))
    assert torch.equal(psnr(x, x), torch.full((shape[0],), 100.0, dtype=x.dtype))


def test_of_constants_only_the_luminance_counts() -> None:
    values = torch.tensor([[0.0, 1.0], [0.2, 0.3], [0.9, 0.5]], dtype=torch.float64)
    x, y = (values[:, i].view(-1, 1, 1, 1).expand(-1, 3, 16, 12) for i in (0, 1))
    a, b = values.unbind(1)
    assert torch.allclose(ssim(x, y), (2 * a * b + C1) / (a**2 + b**2 + C1), rtol=1e-10)
    assert torch.allclose(mse(x, y), (a - b) ** 2)
    assert torch.allclose(psnr(x, y), -20 * (a - b).abs().log10())


def test_an_image_against_its_negative_about_one_half() -> None:
    """Means m and 1 - m, variances v and covariance -v, of every window."""
    x, _ = pair(1, 1, 11, 11)
    profile = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(profile, profile) / profile.sum() ** 2
    image = x[0, 0].numpy()
    mean = (window * image).sum()
    variance = (window * (image - mean) ** 2).sum()
    luminance = (2 * mean * (1 - mean) + C1) / (mean**2 + (1 - mean) ** 2 + C1)
    assert float(ssim(x, 1 - x)) == pytest.approx(luminance * (C2 - 2 * variance) / (C2 + 2 * variance), rel=1e-9)


def by_scipy(x: np.ndarray, y: np.ndarray, radius: int) -> float:
    """SSIM of two planes [h, w] with SciPy's Gaussian filter."""

    def blurred(plane: np.ndarray) -> np.ndarray:
        inside = tuple(slice(radius, side - radius) for side in plane.shape)
        return ndimage.gaussian_filter(plane, 1.5, radius=radius)[inside]

    a, b = blurred(x), blurred(y)
    u, v, w = blurred(x * x) - a * a, blurred(y * y) - b * b, blurred(x * y) - a * b
    return float(((2 * a * b + C1) * (2 * w + C2) / ((a * a + b * b + C1) * (u + v + C2))).mean())


@pytest.mark.parametrize(("side", "radius"), [((32, 32), 5), ((11, 17), 5), ((10, 30), 4), ((8, 8), 3), ((5, 7), 2)])
def test_against_scipys_filter_with_a_window_that_fits(side: tuple[int, int], radius: int) -> None:
    x, y = pair(2, 3, *side)
    found = ssim(x, y)
    for image in range(2):
        planes = [by_scipy(x[image, c].numpy(), y[image, c].numpy(), radius) for c in range(3)]
        assert float(found[image]) == pytest.approx(np.mean(planes), rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 11, 40)])
def test_against_scikit_image(shape: tuple[int, int, int]) -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is in the extra dev")
    x, y = pair(1, *shape)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    a, b = x[0].numpy(), y[0].numpy()
    wanted = metrics.structural_similarity(a, b, channel_axis=0, **settings)
    assert float(ssim(x, y)) == pytest.approx(wanted, rel=1e-9)
    assert float(psnr(x, y)) == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=1.0))


@pytest.mark.parametrize("measure", [ssim, psnr, mse])
def test_gradients_against_finite_differences(measure) -> None:
    x, y = pair(2, 2, 12, 11)
    assert torch.autograd.gradcheck(lambda given: measure(given, y), x.requires_grad_(), atol=1e-6, fast_mode=True)


def test_half_precision_is_widened() -> None:
    x, y = pair(2, 3, 16, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = ssim(x, y)
    assert torch.allclose(found.double(), ssim(x.double(), y.double()), atol=1e-5)
    assert ssim(x.bfloat16(), y.bfloat16()).dtype == torch.float32
