"""Steps a second of the clients of a cohort of equal weights, computed as one, against each client by itself.

Both in one process, alternating: first the client part's forward and backward passes alone, a loop over clients against
chunks of clients; then all that clients do in a round of MocoSFL (augmentation, both copies, the step), as the run
accounts it. The weights that either way leads to are compared.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.measure import Spread, machine_options, set_up, timed
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.rounds.federation import Federation

# Of the largest change of a weight: sums in another order. Standardised weights leave little of a gradient, inexactly.
TOLERANCE = {"fp64": 1e-8, "fp32": 2e-2, "bf16": 0.5}


def federation(options: argparse.Namespace, together: str) -> Federation:
    """MocoSFL with every client in each round; ``together`` auto computes them as one, never by themselves."""
    images = [f"dataset.options.{key}" for key in ("channels=3", "height=32", "width=32")]
    return Federation(
        load_config(
            [
                "algorithm=moco_sfl",
                f"algorithm.together={together}",
                f"model={options.model}",
                *(["model.options.stem=small"] if options.model.startswith("resnet18") else []),
                f"model.cut={options.cut}",
                "model.client_norm=group",
                "algorithm.client_copy=shared",
                "algorithm.client_gradient=own",
                "model.client.optimizer.keep=round",
                "model.projector.hidden=32",
                "model.projector.width=32",
                "algorithm.queue=128",
                "dataset=synthetic",
                *images,
                f"dataset.options.n_train={10 * options.clients * options.batch}",
                f"num_clients={options.clients}",
                f"batch_size={options.batch}",
                f"precision={options.precision}",
                f"device={options.device}",
                "lr=1",  # so that rounding is small compared with a change
                "rounds=1000000",
                "eval_interval=1000000",
            ]
        )
    )


def passes(part: nn.Module, x: Tensor, along: Tensor, size: int) -> None:
    """Forward and backward of the client part over chunks of ``size`` samples."""
    for images, gradient in zip(x.split(size), along.split(size), strict=True):
        torch.autograd.backward(part(images), gradient)


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure; exit status 1 if the two ways do not lead to the same weights."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.together", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="resnet18", help="default: resnet18, with a stem for small images")
    parser.add_argument("--cut", default="relu", help="default: relu")
    parser.add_argument("--clients", type=int, default=100, help="default: 100")
    parser.add_argument("--batch", type=int, default=1, help="images of a client in a step (default: 1)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[10, 16, 25, 50, 100], help="samples in a chunk")
    parser.add_argument("--repeats", type=int, default=11, help="measured rounds of each side (default: 11)")
    machine_options(parser)
    options = parser.parse_args(arguments)
    show(f"{set_up(options)}; {options.repeats} repeats, median (min .. max) of ratios of times")
    one, each = federation(options, "auto"), federation(options, "never")
    show(f"{options.model} cut after {options.cut}, {options.clients} clients, {options.batch} images 3x32x32 each")
    _passes(one, options, show)
    return 0 if _rounds(one, each, options, show) else 1


def _passes(one: Federation, options: argparse.Namespace, show: Callable[[str], None]) -> None:
    (part,) = one.setup.blueprint.parts(["client"]).values()
    x = torch.randn(
        options.clients * options.batch, 3, 32, 32, device=one.setup.device, dtype=one.setup.blueprint.dtype
    )
    along = torch.randn_like(part(x))
    for size in options.chunks:
        ratios: list[float] = []
        for _ in range(options.repeats + 1):
            twins = [copy.deepcopy(part) for _ in range(2)]
            alone, _ = timed(one.setup.device, lambda twin=twins[0]: passes(twin, x, along, options.batch))
            chunked, _ = timed(one.setup.device, lambda twin=twins[1], size=size: passes(twin, x, along, size))
            ratios.append(alone.wall / chunked.wall)
        show(f"  forward and backward, chunks of {size:<4} ratio {Spread.of(ratios[1:]).show()}")


def _rounds(one: Federation, each: Federation, options: argparse.Namespace, show: Callable[[str], None]) -> bool:
    ratios: list[float] = []
    gap = 0.0
    for index in range(options.repeats + 1):
        seconds: dict[bool, float] = {}
        for federation in (one, each) if index % 2 else (each, one):
            before = federation.seconds["client"]
            federation.step()
            seconds[federation is one] = federation.seconds["client"] - before
        ratios.append(seconds[False] / seconds[True])
        gap = _gap(one, each) if index == 0 else gap
    show(f"  all that clients do in a round    ratio {Spread.of(ratios[1:]).show()}")
    show(f"  after a round, largest difference of a weight over the largest change of one: {gap:.1e}")
    return gap <= TOLERANCE[options.precision]


def _gap(one: Federation, each: Federation) -> float:
    found, wanted, start = (
        torch.cat([tensor.flatten() for tensor in state.values()])
        for state in (
            *(federation.server.ctx.part("client").state_dict() for federation in (one, each)),
            one.setup.blueprint.initial["client"],
        )
    )
    return float((found - wanted).abs().max() / (wanted - start).abs().max())


if __name__ == "__main__":
    sys.exit(main())
