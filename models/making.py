"""All parts that a method has, made in the order of what they need, each with random numbers of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cutlayer.models.part_registry import WHOLE, Making, divider, divisions, registered_part
from cutlayer.runtime.ground import rng
from cutlayer.runtime.ground.config import ConfigError

if TYPE_CHECKING:
    from cutlayer.datasets import DatasetInfo
    from cutlayer.models.config import ModelConfig


def division_of(parts: Collection[str]) -> tuple[str, ...]:
    """Those of the parts that make up the model, in the order in which data goes through them.

    Raises:
        ConfigError: they make up none.
    """
    found = next((names for names in divisions() if {*parts}.issuperset(names)), None)
    if found is None:
        raise ConfigError("parts", sorted(parts), "all parts of a model", [" ".join(names) for names in divisions()])
    return found


def in_order(parts: Collection[str]) -> tuple[str, ...]:
    """The parts and all that they need, each after what it needs.

    Raises:
        ConfigError: an unknown part, one that the model is not divided into, or parts that need each other.
    """
    whole = division_of(parts)
    order: list[str] = []

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            circle = " -> ".join([*above[above.index(name) :], name])
            raise ConfigError("parts", circle, "parts that do not need each other")
        if name in order:
            return
        found = registered_part(name)
        if found is None and name not in whole:
            needed = f", which {above[-1]} needs" if above else ""
            raise ConfigError("parts", sorted(parts), f"a model that is divided into {name} and others{needed}")
        for needed in (WHOLE,) if found is None else found.needs:
            add(needed, (*above, name))
        order.append(name)

    for name in (WHOLE, *whole, *sorted(parts)):
        add(name, ())
    return tuple(order)


def make_parts(
    config: ModelConfig,
    info: DatasetInfo,
    parts: Collection[str],
    *,
    seed: int,
    options: Callable[[str], Mapping[str, Any]] = lambda _: {},
    compare: bool = True,
) -> dict[str, list[nn.Module]]:
    """The parts, float32 on the CPU, by name: one module each, or the variants of a part that has such.

    The weights of each come from a stream of its own, which follows from `seed` and its name: they are the same
    whatever parts there are beside it.

    Args:
        options: what the method's configuration says of a part.
        compare: whether a model that is cut is compared with the whole one.
    """
    order, whole = in_order(parts), division_of(parts)
    made: dict[str, list[nn.Module]] = {}

    def making(name: str) -> Making:
        return Making(config, info, {each: modules[0] for each, modules in made.items()}, options(name), compare)

    for name in order:
        found = registered_part(name)
        if name in made:
            continue
        if found is None:
            made |= {each: [module] for each, module in zip(whole, divider(whole)(making(name)), strict=True)}
            continue
        with rng.TorchStream(rng.derive(seed, stream=name.replace("_", " ")), torch.device("cpu")):
            built = found.build(making(name))
        made[name] = [built] if isinstance(built, nn.Module) else [*built]
        if name == WHOLE:
            for each in order:
                if (part := registered_part(each)) is not None and part.prepare is not None:
                    part.prepare(made[WHOLE][0], info)
    return {name: made[name] for name in order if name in parts}
