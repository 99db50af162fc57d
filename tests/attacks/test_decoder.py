"""The decoder: any smashed data to images of any size."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cutlayer.datasets import DatasetInfo
from cutlayer.models import Decoder, build_attacker
from cutlayer.models.decoder import merged_tensor


@pytest.mark.parametrize("image", [(1, 8, 8), (3, 32, 32), (3, 28, 36), (1, 7, 5)])
@pytest.mark.parametrize("z", [(5, 4, 4), (3, 1, 1), (2, 3, 7), (4, 40, 40), (17,), (10, 6), (1, 4)])
def test_any_shape_becomes_an_image(z: tuple[int, ...], image: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    decoder = Decoder(z, image, width=6, blocks=1).double()
    x = torch.randn(3, *z, dtype=torch.float64)
    found = decoder(x)
    assert found.shape == (3, *image)
    assert bool(((found > 0) & (found < 1)).all())
    alone = torch.cat([decoder(each[None]) for each in x])
    assert torch.allclose(found, alone), "what a sample becomes does not depend on its batch"
    assert found.std(0).max() > 1e-6, "and it depends on the sample"


def test_growth_by_transposed_convolutions_while_it_fits() -> None:
    def steps(z: tuple[int, ...], image: tuple[int, int, int]) -> int:
        return len(Decoder(z, image, width=4, blocks=1).grow)

    assert [steps((2, side, side), (3, 32, 32)) for side in (1, 4, 8, 15, 16, 17, 32, 64)] == [5, 3, 2, 1, 1, 0, 0, 0]
    assert steps((2, 4, 16), (3, 32, 32)) == 1, "the side that is the least smaller decides"


def test_width_and_blocks_are_what_they_say() -> None:
    decoder = Decoder((3, 8, 8), (3, 32, 32), width=64, blocks=4)
    convolutions = [each for each in decoder.modules() if isinstance(each, nn.Conv2d | nn.ConvTranspose2d)]
    assert [(each.in_channels, each.out_channels) for each in convolutions] == [(3, 64), *[(64, 64)] * 10, (64, 3)]
    residual = sum(parameter.numel() for parameter in decoder.blocks.parameters())
    assert residual == 4 * 2 * (64 * 64 * 9 + 64 + 2 * 64)


def test_several_values_that_cross_are_joined() -> None:
    small, large, vector = torch.rand(2, 3, 4, 4), torch.rand(2, 1, 8, 6), torch.rand(2, 5)
    one = merged_tensor((small, torch.zeros(2, 3, dtype=torch.int64)))
    assert one is small, "what cannot have a gradient shows nothing"
    both = merged_tensor((small, large))
    assert both.shape == (2, 4, 8, 6)
    assert torch.equal(both[:, :3], F.interpolate(small, (8, 6)))
    assert torch.equal(both[:, 3:], large)
    assert torch.equal(merged_tensor((small, vector)), torch.cat([small.flatten(1), vector], 1))
    assert merged_tensor((torch.rand(2, 7, 3), torch.rand(2, 7, 4))).shape == (2, 7, 7)


def test_an_attacker_fits_its_client_part() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, self.conv(x)

    client = Two()
    attacker = build_attacker(DatasetInfo("any", 3, 9, 9, 2, ("a", "b")), client, width=4, blocks=1)
    assert attacker(client(torch.rand(2, 3, 9, 9))).shape == (2, 3, 9, 9)


def test_it_learns_to_show_what_it_is_given() -> None:
    """Every pixel of the image is there, those of a square as channels."""
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(16, 1, 3, 3), (8, 8), mode="bilinear")
    given = F.pixel_unshuffle(images, 2)
    decoder = Decoder((4, 4, 4), (1, 8, 8), width=16, blocks=1)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        loss = (decoder(given) - images).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * images.var(0).mean().item()
