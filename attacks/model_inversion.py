"""Model inversion of a saved run: how well a decoder shows a client's images from its smashed data.

What the attacker knows: the weights of the client part, as the server that averages them does, and images of its own,
the dataset's test images. It makes pairs of smashed data and image with these, and trains a decoder on them. What it
does not know: the target client's images and labels, and which smashed data belongs to what. It is tested on the
smashed data of the target's training images.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cutlayer.attacks import AttackResult, Reported, register
from cutlayer.datasets import Source
from cutlayer.models import build_attacker
from cutlayer.models.cutting import Crossing, tensors
from cutlayer.models.similarity import mse, psnr, ssim
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.files import written_whole
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.session import Workplace
from cutlayer.runtime.scoring.scores import evaluating

PICTURE = "reconstructions.png"
_COLUMNS, _GAP, _LEAST_SIDE = 10, 2, 64
_TEST_BATCH = 250
_MEASURES = {"mse": mse, "ssim": ssim, "psnr": psnr}


@dataclass(frozen=True)
class InversionConfig:
    """Keys of the attack.

    epochs: passes over the attacker's images. lr: learning rate of its Adam. batch_size: images in a step. client:
    whose images are attacked. samples: at most so many of the attacker's images and of the client's are used; None is
    all. width, blocks: channels and residual blocks of the decoder.
    """

    epochs: int = 50
    lr: float = 0.001
    batch_size: int = 128
    client: int = 0
    samples: int | None = None
    width: int = 64
    blocks: int = 4

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "width", "blocks"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "an integer >= 1")
        if not 0 < self.lr < math.inf:
            raise ConfigError("lr", self.lr, "a finite number > 0")
        if self.client < 0:
            raise ConfigError("client", self.client, "the number of a client, from 0")
        if self.samples is not None and self.samples < 1:
            raise ConfigError("samples", self.samples, "an integer >= 1, or null for all")


@dataclass(frozen=True)
class Inversion(AttackResult):
    """What the attack found.

    ``found`` has ``mse``, ``ssim`` and ``psnr`` (dB) of the reconstructions, means over the client's images;
    ``mean_image`` the same where every reconstruction is the mean of the attacker's images, which needs no smashed
    data. ``train_mse`` is the decoder's loss on its own images in the last epoch; ``shape`` is that of what one image
    becomes, of each value that crosses; ``shown`` are some of the images and their reconstructions.
    """

    round: int
    shape: list[list[int]]
    train_images: int
    test_images: int
    train_mse: float
    found: dict[str, float]
    mean_image: dict[str, float]
    shown: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The measures, and what they are of."""
        values = {key: value for key, value in vars(self).items() if key != "shown"}
        return {**values.pop("found"), **values}

    def save(self, folder: Path) -> None:
        """Write the picture."""
        assert self.shown is not None
        with written_whole(folder / PICTURE) as picture:
            _picture(*self.shown).save(picture, "PNG")

    def table(self) -> str:
        """The measures next to those of the mean image, as lines."""
        lines = [f"{'':12}{'MSE':>10}{'SSIM':>10}{'PSNR':>10}"]
        for title, values in (("decoder", self.found), ("mean image", self.mean_image)):
            lines.append(f"{title:12}{values['mse']:10.4f}{values['ssim']:10.4f}{values['psnr']:7.2f} dB")
        return "\n".join(lines)


@register("model_inversion", InversionConfig, "weights of the client part; test images with their smashed data")
def model_inversion(federation: Federation, config: InversionConfig, reported: Reported) -> Inversion:
    """A decoder that is trained on the attacker's own images shows a client's images from its smashed data.

    Raises:
        ConfigError: the method sends no smashed data, there is no such client, or the decoder diverges.
    """
    setup = federation.setup
    if "client" not in setup.algorithm.layout.whole:
        name = setup.config.algorithm_name
        raise ConfigError("algorithm", name, "a run of a method that cuts the model, with a client part")
    if config.client >= setup.population:
        raise ConfigError("attack.client", config.client, f"a client of the run: 0 to {setup.population - 1}")
    target = setup.partition.indices(config.client)
    if not len(target):
        raise ConfigError("attack.client", config.client, "a client with training samples")
    return _Attacker(federation, config, reported).attack(target)


class _Attacker:
    """A decoder in training and in use, before one client part that stays as it is."""

    def __init__(self, federation: Federation, config: InversionConfig, reported: Reported) -> None:
        self._federation, self._config, self._reported = federation, config, reported
        setup = federation.setup
        blueprint, seed = setup.blueprint, setup.config.seed
        self._client = blueprint.parts(["client"])["client"].requires_grad_(False)
        self._client.load_state_dict(federation.learnt.client_states(config.client, ["client"])["client"])
        # As the evaluation normalises it: by the statistics of the batch where running ones are not shared.
        self._statistics = federation.evaluator.batch_statistics[setup.algorithm.layout.whole.index("client")]
        self._work = Workplace(blueprint, rng.derive(seed, client=config.client, stream="attack"))
        self._generator = rng.torch_generator(seed, client=config.client, stream="attack batches")
        with self._work.working():
            decoder = build_attacker(setup.dataset.info, self._client, config.width, config.blocks)
            self._decoder: nn.Module = decoder.to(setup.device, blueprint.dtype)

    def attack(self, target: Tensor) -> Inversion:
        """Train, then test on the target's images."""
        data, federation = self._federation.setup.dataset, self._federation
        own, target = self._some(torch.arange(len(data.test))), self._some(target)
        with self._work.working(), evaluating([self._client], batch_statistics=[self._statistics]) as client:
            loss = self._train(client, data.test, own)
            total = sum(images.sum(0) for images, _ in self._pairs(client, data.test, own, shuffle=False))
            assert isinstance(total, Tensor)
            found, shown = self._test(client, data.train, target, None)
            mean, _ = self._test(client, data.train, target, total / len(own))
            shape = [list(each.shape[1:]) for each in tensors(self._seen(client, data.train, target))]
        return Inversion(federation.round, shape, len(own), len(target), loss, found, mean, shown)

    def _some(self, indices: Tensor) -> Tensor:
        """As many of the indices as the attack uses, drawn at random."""
        return indices[torch.randperm(len(indices), generator=self._generator)[: self._config.samples]]

    def _pairs(
        self, client: Any, source: Source, indices: Tensor, *, shuffle: bool
    ) -> Generator[tuple[Tensor, Crossing]]:
        """Batches of images [b, c, h, w] with values 0..1, and what crosses the cut for them."""
        size = self._config.batch_size if shuffle else min(_TEST_BATCH, len(indices))
        for x, _ in source.batches(indices, batch_size=size, shuffle=shuffle, generator=self._generator):
            with torch.no_grad():
                z = client(x)
            yield source.pixels(x), z

    def _seen(self, client: Any, source: Source, indices: Tensor) -> Crossing:
        return next(self._pairs(client, source, indices[:2], shuffle=False))[1]

    def _train(self, client: Any, source: Source, indices: Tensor) -> float:
        """Adam on the mean squared error of the pixels; gives that of the last epoch."""
        config = self._config
        optimizer = torch.optim.Adam(self._decoder.parameters(), lr=config.lr)
        mean = math.nan
        for epoch in range(config.epochs):
            total = torch.zeros((), device=self._federation.setup.device, dtype=torch.float64)
            for images, z in self._pairs(client, source, indices, shuffle=True):
                loss = mse(self._decoder(z), images).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(images)
            mean = float(total) / len(indices)
            if not math.isfinite(mean):
                raise ConfigError("attack.lr", config.lr, f"a rate that converges: the loss is {mean}")
            self._reported(epoch + 1, config.epochs, f"mean squared error {mean:.5f}")
        return mean

    @torch.no_grad()
    def _test(
        self, client: Any, source: Source, indices: Tensor, always: Tensor | None
    ) -> tuple[dict[str, float], tuple[Tensor, Tensor]]:
        """Measures of the reconstructions, or of `always` [c, h, w] in the place of each; and the first of them."""
        values: dict[str, list[Tensor]] = {name: [] for name in _MEASURES}
        first: tuple[Tensor, Tensor] | None = None
        self._decoder.eval()
        for images, z in self._pairs(client, source, indices, shuffle=False):
            guess = self._decoder(z) if always is None else always.expand_as(images)
            first = first or (images[:_COLUMNS].float().cpu(), guess[:_COLUMNS].float().cpu())
            for name, measure in _MEASURES.items():
                values[name].append(measure(guess, images).double().cpu())
        assert first is not None
        return {name: float(torch.cat(each).mean()) for name, each in values.items()}, first


def _picture(originals: Tensor, guesses: Tensor) -> Image.Image:
    """Images [k, c, h, w] with values 0..1 in a row, and their reconstructions below; of two channels the first."""
    colours = 3 if originals.shape[1] == 3 else 1
    rows = torch.stack([originals, guesses])[:, :, :colours].expand(-1, -1, 3, -1, -1)
    pixels = rows.clamp(0, 1).mul(255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    zoom = max(1, -(-_LEAST_SIDE // min(pixels.shape[2:4])))
    pixels = pixels.repeat(zoom, 2).repeat(zoom, 3)
    _, count, height, width, _ = pixels.shape
    canvas = np.full((2 * height + _GAP, count * (width + _GAP) - _GAP, 3), 255, dtype=np.uint8)
    for row, column in np.ndindex(2, count):
        top, left = row * (height + _GAP), column * (width + _GAP)
        canvas[top : top + height, left : left + width] = pixels[row, column]
    return Image.fromarray(canvas)
