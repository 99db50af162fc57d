"""The clients' personal bodies: what is between client part and tail, for each client in an architecture of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cutlayer.models.config import ModelConfig
from cutlayer.models.cutting import Crossing, tensors
from cutlayer.models.part_registry import Making, PartConfig, part
from cutlayer.models.registry import entry
from cutlayer.models.shapes import sample, trace
from cutlayer.models.splitting import children_of, split_in_three
from cutlayer.models.three import Thirds, divide, two_cuts
from cutlayer.runtime.ground.config import ConfigError, build

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo


@dataclass(frozen=True)
class PersonalConfig(PartConfig):
    """The clients' personal bodies.

    `variants` are options over those of the model: a body is what such a model has between the two cuts, which the key
    `cut` gives where they are not the model's. They are given to the clients in turn: of n variants, client i has
    variant i mod n. None means the model's own.
    """

    variants: tuple[dict[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        if self.variants is not None and not self.variants:
            raise ConfigError(
                "variants", self.variants, "null or a list of one or more mappings of the model's options"
            )

    def check(self, config: ModelConfig) -> None:
        variant_options(config)

    def try_on(self, model: nn.Module, config: ModelConfig, info: DatasetInfo, parts: Collection[str]) -> None:
        between_children = isinstance(model, nn.Sequential) and {"tail", "personal"}.issubset(parts)
        if between_children and not any("." in cut for cut in two_cuts(config, model)):
            with torch.device("meta"):
                build_personal(config, info, divide(config, info, model))


def variants(config: ModelConfig) -> tuple[Mapping[str, Any], ...]:
    """The options of each variant of the personal body, over those of the model."""
    own = config.part("personal", PersonalConfig).variants
    return entry(config.name).variants if own is None else own


def variant_options(config: ModelConfig) -> list[tuple[Any, tuple[str, str] | None]]:
    """The typed options of the models that variants' bodies are from; and where each is cut, if it says.

    Raises:
        ConfigError: options that the model does not have; those of a model from a source are checked when it is built.
    """
    kind = entry(config.name).options
    found: list[tuple[Any, tuple[str, str] | None]] = []
    for i, variant in enumerate(variants(config)):
        options, where = {**config.options, **variant}, f"personal.variants.{i}"
        cut = options.pop("cut", None)
        if cut is not None and not (len(cut) == 2 and all(isinstance(name, str) for name in cut)):
            raise ConfigError(f"{where}.cut", cut, "two modules as [first,second]")
        typed = options if kind is None else build(kind, options, where)
        found.append((typed, None if cut is None else (cut[0], cut[1])))
    return found


@part("personal", needs=("client", "server", "tail"), config=PersonalConfig)
def _personal(making: Making) -> Sequence[nn.Module]:
    client, server, tail = (making.parts[name] for name in ("client", "server", "tail"))
    return build_personal(making.config, making.info, (client, server, tail))


def build_personal(config: ModelConfig, info: DatasetInfo, thirds: Thirds) -> list[nn.Module]:
    """Fresh personal bodies for a model in thirds, one a variant: what its client part gives -> what its tail takes.

    A variant's body is the server part of the model with the variant's options: cut where the variant says, else
    between as many first and last children as client part and tail have or, of parts that are no sequences, where the
    model itself is cut. It may give another shape than the server part where the tail takes that, such as a larger map.
    Weights come from torch's global generator; the thirds are neither changed nor kept. A body that does not fit
    between the two is a `ConfigError`.
    """
    client, server, tail = thirds
    # Two images: BatchNorm in training mode refuses one value a channel.
    z = trace(client, sample(info.shape, 2, dtype=next(client.parameters()).dtype, device="meta"))
    output = trace(server, z)
    logits = _shapes(trace(tail, output))
    bodies: list[nn.Module] = []
    for i, (options, chosen) in enumerate(variant_options(config)):
        variant = entry(config.name).build(info, options)
        if chosen is None and isinstance(client, nn.Sequential) and isinstance(tail, nn.Sequential):
            children = OrderedDict(list(children_of(variant).items())[len(client) : -len(tail)])
            body: nn.Module = nn.Sequential(children)
        else:
            body = split_in_three(variant, *(chosen or two_cuts(config, variant)), info.shape)[1]
        fits, found = False, "takes no such input"
        try:
            between = trace(body, z)
            found = f"gives {_shapes(between)}"
            fits = _shapes(trace(tail, between)) == logits and any(True for _ in body.parameters())
        except (RuntimeError, TypeError, ValueError):
            pass
        if not fits:
            expected = (
                f"a body with weights from {_shapes(z)} to {_shapes(output)}, as the server part has; this {found}"
            )
            raise ConfigError(f"model.personal.variants.{i}", dict(variants(config)[i]), expected)
        bodies.append(body)
    return bodies


def _shapes(crossing: Crossing) -> str:
    """The shapes of what crosses for one sample, as text."""
    return " and ".join(str(list(each.shape[1:])) for each in tensors(crossing))
