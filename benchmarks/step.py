"""What surrounds a training step: a question to the server and its answer, and a step whose kernels are recorded.

In one process, on a processor, without the computation itself. A question with smashed data goes through the channel of
a run and comes back as a gradient; its parts are timed apart. A step whose passes and optimizer are recorded
(``compile``) is timed on recordings that do nothing, beside one whose optimizer is not: what is left is what a GPU's
program has to do itself, kernels of the loss and copies among it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Spread, machine_options, set_up
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.messages.boundary import ask
from cutlayer.runtime.messages.ledger import Ledger
from cutlayer.runtime.parties.graphs import PassRecorder
from cutlayer.runtime.parties.optim import PartOptimizer
from cutlayer.runtime.rounds.session import Channel, Workplace
from cutlayer.runtime.rounds.setup import Setup

T = TypeVar("T")
SYNTHETIC = ("dataset=synthetic", "dataset.options.n_train=20", "dataset.options.n_test=10")
MODELS = {"resnet18": ("model.options.width=2",), "cnn2": ()}
"""By name, with keys that leave the parameters' number and little of their size."""


class Idle:
    """Records nothing: a replay leaves what the work gave when it was recorded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def run(self, work: Callable[[], T]) -> T:
        """Compute it."""
        return work()

    def record(self, work: Callable[[], T], *, large: bool = False) -> tuple[Callable[[], None], T]:
        """Compute it once."""
        return lambda: None, work()


def microseconds(works: Mapping[str, Callable[[], object]], times: int, repeats: int) -> dict[str, Spread]:
    """Processor time of each piece of work, in turns of so many."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            begun = time.process_time()
            for _ in range(times):
                work()
            found[name].append((time.process_time() - begun) / times * 1e6)
    return {name: Spread.of(each[1:]) for name, each in found.items()}


def question(times: int, repeats: int) -> dict[str, Spread]:
    """A question with smashed data [10, 64, 7, 7] and its answer, and what it is made of."""
    setup = Setup(load_config([*SYNTHETIC, "algorithm=sl_single_server", "model=cnn2"]))
    z, y = torch.randn(10, 64, 7, 7), torch.arange(10)
    asked, answer = {"z": z, "y": y}, {"grad": torch.randn_like(z)}
    channel, copying, ledger = Channel(Ledger()), Channel(Ledger()), Ledger()
    client, server = (Workplace(setup.blueprint, seed) for seed in (1, 2))

    def work() -> None:
        for party in (client, server):
            with party.working():
                pass

    def whole() -> None:
        with client.working():
            message = ask("smashed", z=z, y=y)
        channel.up(0, message.kind, asked)
        with server.working():
            pass
        channel.reply(0, message.kind, answer)

    def charge() -> None:
        ledger.charge("up", "smashed", 0, asked)
        ledger.count_reply()
        ledger.charge("down", "smashed", 0, answer)

    def copy() -> None:
        copying.hand_over(asked)
        copying.hand_over(answer)

    pieces = {"stream, precision, clock": work, "ledger": charge, "copies": copy}
    message = {"message": lambda: ask("smashed", z=z, y=y)}
    return microseconds({"question and answer": whole, **pieces, **message}, times, repeats)


def recorded(model: str, times: int, repeats: int) -> dict[str, Spread]:
    """Steps whose passes are recorded, with an optimizer that steps by itself and with one that is recorded too."""
    setup = Setup(load_config([*SYNTHETIC, "algorithm=fed_avg", f"model={model}", *MODELS[model]]))
    recorder = PassRecorder(Idle)
    x, y = torch.randn(2, *setup.dataset.info.shape), torch.zeros(2, dtype=torch.int64)

    def stepping(own: PassRecorder | None) -> Callable[[], None]:
        (part,) = setup.blueprint.parts(["model"]).values()
        recorder.attach(part)
        optimizer = PartOptimizer([torch.optim.SGD(part.parameters(), 0.1, momentum=0.9, fused=True)], own)
        return _settled(part, optimizer, x, y)

    return microseconds({"passes recorded": stepping(None), "steps too": stepping(recorder)}, times, repeats)


def _settled(part: nn.Module, optimizer: PartOptimizer, x: Tensor, y: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.update(F.cross_entropy(part(x), y))

    for _ in range(8):  # recordings are made in the first ones
        step()
    return step


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure both."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=int, default=200, help="of each piece of work in a turn (default: 200)")
    parser.add_argument("--repeats", type=int, default=11, help="turns (default: 11)")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[*MODELS], help="default: both")
    machine_options(parser)
    options = parser.parse_args(arguments)
    show(f"{set_up(options)}; {options.repeats} turns of {options.times}, us of processor time, median (min .. max)")
    for name, spread in question(options.times, options.repeats).items():
        show(f"  {name:<27} {spread.show(digits=1)}")
    for model in options.model:
        show(f"a step of {model}, SGD with momentum, fused, without its kernels")
        for name, spread in recorded(model, options.times, options.repeats).items():
            show(f"  {name:<27} {spread.show(digits=0)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
