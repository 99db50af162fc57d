"""`python main.py ... --cuts`: where the configured model can be cut, and what each cut would cost.

Of a model of text these are the ends of its blocks; `--cuts=all` lists every module that ends once. For each cut the
parameters and the floating-point operations of either side, the memory of the client part while it trains, the values
that cross, and the bytes of a round of the configured method. Nothing is trained, and the parts are not compared with
the model: that a run does.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from rich import box
from rich.table import Column, Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cutlayer.algorithms as algorithms
from cutlayer.datasets import Dataset, load
from cutlayer.models import block_ends, build_model, candidates, cuts_recorded, input_channels, sketched_models
from cutlayer.models.cutting import tensors
from cutlayer.models.shapes import KnownIntegers, sample
from cutlayer.runtime.costs.memory import AsOnAProcessor, client_memory
from cutlayer.runtime.costs.traffic import expected_bytes
from cutlayer.runtime.ground.config import ConfigError
from cutlayer.runtime.ground.screen import Screen
from cutlayer.runtime.ground.units import format_bytes
from cutlayer.runtime.rounds.setup import Setup, load_data
from cutlayer.runtime.settings import RunConfig
from cutlayer.runtime.trust import Limit, check_size

log = logging.getLogger(__name__)

_TWO = ("client", "server")
_RECORDED = 16  # length of the texts that passes are recorded with; of others shapes follow


@dataclass(frozen=True)
class Cut:
    """What a cut costs.

    Attributes:
        name: the module that ends the client part.
        client_parameters, server_parameters: of either part.
        client_flops, server_flops: floating-point operations of a sample's forward pass (a multiplication and an
            addition are two).
        shapes: of the values of a sample that cross.
        memory: bytes of the client part while it trains on a batch, see `memory.client_memory`.
        bytes: of the first round's training traffic under the configured method.
    """

    name: str
    client_parameters: int
    server_parameters: int
    client_flops: int
    server_flops: int
    shapes: tuple[tuple[int, ...], ...]
    memory: int
    bytes: int


# By the names of `cutlayer.models.config.BUDGETS`.
_MEASURES: dict[str, Callable[[Cut], float]] = {
    "client_params": lambda cut: cut.client_parameters,
    "client_mflop": lambda cut: cut.client_flops / 1e6,
    "round_mb": lambda cut: cut.bytes / 1e6,
}


def list_cuts(config: RunConfig, dataset: Dataset | None = None, *, every: bool = False) -> Iterator[Cut]:
    """The cuts of the configured model in two, in the order of its layers.

    Args:
        dataset: the configured one, where it is loaded already.
        every: of a model of text those within its blocks and around them too, not only after each.

    Raises:
        ConfigError: the method does not cut the model in two, or the model has no cut.
    """
    dataset = _data(config) if dataset is None else dataset
    _check_method(config)
    info = dataset.repeated(input_channels(config.model, dataset.info)).info
    plain = replace(config.model, client_norm="own", server_norm="own", bottleneck=None, init=None)
    model = build_model(plain, info)
    names = candidates(model, info.shape)
    if not info.length:
        yield from _each(config, dataset, names, sketched=False)
        return
    few = names if every else block_ends(model, names) or names
    yield from _sketched(config, dataset, model, few, (min(_RECORDED, info.length),))


def _check_method(config: RunConfig) -> None:
    cutting = [name for name in algorithms.names() if algorithms.get(name).layout.whole == _TWO]
    if config.algorithm_name not in cutting:
        raise ConfigError("algorithm", config.algorithm_name, "a method that cuts the model in two", cutting)


def _data(config: RunConfig) -> Dataset:
    _check_method(config)
    return load(config.dataset, seed=config.seed, device=torch.device("cpu"), dtype=torch.float32)


def _sketched(
    config: RunConfig, dataset: Dataset, model: nn.Module, names: Sequence[str], shape: Sequence[int]
) -> list[Cut]:
    """The same of a model of text: recorded once for all cuts, and without memory for the weights of its parts."""
    if config.precision == "bf16":  # which the meta device does not have
        with cuts_recorded(model, names, shape):
            return [*_each(config, dataset, names, sketched=False)]
    with cuts_recorded(model, names, shape), sketched_models(), KnownIntegers(), AsOnAProcessor():
        return [*_each(config, dataset, names, sketched=True)]


def _each(config: RunConfig, dataset: Dataset, names: Sequence[str], *, sketched: bool) -> Iterator[Cut]:
    """Those of the cuts that are some."""
    setup: Setup | None = None
    refused: ConfigError | None = None
    for name in names:
        chosen = replace(config, device="cpu", model=replace(config.model, cut=name))
        try:
            setup = Setup(chosen, dataset, sketched=sketched) if setup is None else setup.with_model(chosen)
        except ConfigError as error:
            if error.key not in ("model.cut", "model.auxiliary.size", "model.bottleneck"):
                raise
            refused = error  # what the general rule takes for a cut, and is none
            continue
        yield _cost(name, setup)
    if setup is None and refused is not None:
        raise refused


def prepared(
    config: RunConfig, dataset: Dataset | None = None, *, limit: Limit | None = None, download: bool = True
) -> tuple[RunConfig, Dataset]:
    """What a federation is made of: a configuration whose cut is chosen, and its data.

    Args:
        dataset: the configured one, where it is loaded already.
        limit: how large the model may be; None for any size. It is checked before anything is made of the model.
        download: whether published data that are not here may be downloaded.

    Raises:
        ConfigError: the data or the method cannot be as configured, the model is too large, or no cut is within the
            budget.
    """
    if dataset is None:
        dataset = load_data(config, download=download)
    if limit is not None:
        check_size(config.model, dataset.info, limit)
    return within_budget(config, dataset), dataset


def within_budget(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The configuration with the cut that its budget (`model.cut=auto:client_params<=20000`) leads to, if it has one.

    Under a limit on the client's work it is the cut whose round has the fewest bytes, under one on bytes that with the
    fewest operations at the client; of equals the first.

    Raises:
        ConfigError: no cut is within the budget.
    """
    budget = config.model.budget
    if budget is None:
        return config
    measure = _MEASURES[budget.measure]
    found = list(list_cuts(config, dataset))
    within = [cut for cut in found if measure(cut) <= budget.limit]
    if not within:
        least = min(found, key=measure, default=None)
        cause = f"the least is {measure(least):g}, after {least.name}" if least else "the model has no cut"
        raise ConfigError("model.cut", config.model.cut, f"a budget that some cut keeps; {cause}")
    cost = _MEASURES["client_mflop" if budget.measure == "round_mb" else "round_mb"]
    name = min(within, key=cost).name
    log.info("model.cut=%s, which %s leads to", name, config.model.cut)
    return replace(config, model=replace(config.model, cut=name))


def _cost(name: str, setup: Setup) -> Cut:
    blueprint = setup.blueprint
    x: Any = sample(setup.dataset.info.shape, 1, dtype=blueprint.dtype, device=setup.device)
    flops: dict[str, int] = {}
    shapes: list[tuple[int, ...]] = []
    for part, module in blueprint.parts(_TWO).items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            x = module.eval()(x)
        flops[part] = counter.get_total_flops()
        if part == "client":
            shapes = [tuple(value.shape[1:]) for value in tensors(x)]
    return Cut(
        name,
        client_parameters=blueprint.parameters("client"),
        server_parameters=blueprint.parameters("server"),
        client_flops=flops["client"],
        server_flops=flops["server"],
        shapes=tuple(shapes),
        memory=client_memory(setup),
        bytes=sum(expected_bytes(setup, range(1)).values()),
    )


def show_cuts(config: RunConfig, *, every: bool = False) -> None:
    """Print the table of `list_cuts`."""
    titles = (
        *("model.cut", "parameters: client", "server", "MFLOP: client", "server", "memory: client"),
        *("crossing", "a sample", "a round"),
    )
    dataset = _data(config)
    rows = [_row(cut) for cut in list_cuts(config, dataset, every=every)]
    columns = (Column(title, justify="left" if title == "model.cut" else "right") for title in titles)
    table = Table(*columns, box=box.ASCII)
    for row in rows:
        table.add_row(*row)
    title = f"{config.algorithm_name}, {config.model.name}, {config.dataset.name}: {len(rows)} cuts"
    if dataset.info.length and not every:
        title += ", at the ends of blocks; --cuts=all lists all"
    console = Screen(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(title, table, sep="\n")


def _row(cut: Cut) -> tuple[str, ...]:
    values = sum(prod(shape) for shape in cut.shapes)
    return (
        cut.name,
        f"{cut.client_parameters:,}",
        f"{cut.server_parameters:,}",
        *(f"{flops / 1e6:.2f}" for flops in (cut.client_flops, cut.server_flops)),
        format_bytes(cut.memory),
        " + ".join("x".join(map(str, shape)) for shape in cut.shapes),
        f"{values:,}",
        format_bytes(cut.bytes),
    )
