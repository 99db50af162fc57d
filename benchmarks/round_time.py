"""Wall time of a round: the platform against a bare PyTorch loop, in one process, alternating.

Both start each round from the same weights and train on the same batches; after each round their weights must agree.
The platform's time is that of ``Federation.step`` without evaluation: drawing the cohort, gathering and normalising the
batches, every message with its copies and its bytes, training, averaging and closing the ledger. Writing results and
checkpoints is not in it unless ``--record`` asks for it. With ``--workers`` the platform's clients are at so many, and
their processor time counts as its own. The bare loop gets its batches as normalised float tensors, cut and shuffled in
lists made before its clock starts: it pays nothing for data, which counts against the platform.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.bare import BARE, Batches, State
from benchmarks.measure import Seconds, Spread, machine_options, processor_seconds, set_up, timed
from cutlayer.runtime.ground import rng
from cutlayer.runtime.launching.hydra_support import load_config
from cutlayer.runtime.parties.optim import make_optimizer
from cutlayer.runtime.records.results import Results
from cutlayer.runtime.rounds.federation import Federation
from cutlayer.runtime.rounds.local_clients import LocalClients
from cutlayer.runtime.workers.clients import WorkerClients


@dataclass(frozen=True)
class Case:
    """A setting to measure.

    Attributes:
        model, image: the model and the (channels, height, width) of its images.
        clients, images, batch: clients, all in each round; training images of each; size of a batch.
        targets: by algorithm, the largest ratio that is accepted; an algorithm without one is for the record.
    """

    model: str
    image: tuple[int, int, int]
    clients: int
    images: int
    batch: int
    targets: dict[str, float]


CASES = {
    "resnet18": Case("resnet18", (3, 32, 32), clients=2, images=256, batch=128, targets={"fed_avg": 1.10}),
    "cnn2": Case("cnn2", (1, 28, 28), clients=50, images=50, batch=10, targets={"fed_avg": 1.25}),
    "tiny": Case("mlp", (1, 8, 8), clients=3, images=20, batch=10, targets={}),
}


def federation(case: Case, algorithm: str, options: argparse.Namespace, folder: Path | None = None) -> Federation:
    """The platform's side of a case: as ``python main.py`` would set it up, without evaluation."""
    channels, height, width = case.image
    sizes = {"n_train": case.clients * case.images, "channels": channels, "height": height, "width": width}
    return Federation(
        load_config(
            [
                f"algorithm={algorithm}",
                f"model={case.model}",
                "dataset=synthetic",
                *(f"dataset.options.{key}={value}" for key, value in sizes.items()),
                f"num_clients={case.clients}",
                f"batch_size={case.batch}",
                f"optimizer={options.optimizer}",
                f"lr={options.lr}",
                f"device={options.device}",
                f"precision={options.precision}",
                "rounds=1000000",
                "eval_interval=1000000",
                f"workers={options.workers or 1}",
            ]
        ),
        folder,
        clients=WorkerClients if options.workers else LocalClients,
    )


class Race:
    """The platform and the bare loop side by side, from equal weights in every round.

    Args:
        record: also write what a run writes after each round (metrics, communication), and a checkpoint each ten.
        bare: a federation whose parts, precision and optimizers the bare loop has; None for the platform's own.
    """

    def __init__(self, platform: Federation, results: Results | None = None, *, bare: Federation | None = None) -> None:
        self._platform = platform
        self._results = results
        setup = (bare or platform).setup
        blueprint, config = setup.blueprint, setup.config
        self._names = platform.setup.algorithm.layout.server
        parts = blueprint.parts(self._names)
        modules = {id(part): name for name, part in parts.items()}

        def optimizer(part: nn.Module) -> torch.optim.Optimizer:
            return make_optimizer(config.optimizer_for(modules[id(part)]), part.parameters())

        def autocast() -> torch.autocast:
            return torch.autocast(platform.setup.device.type, torch.bfloat16, enabled=config.precision == "bf16")

        self._bare, self._images = BARE[config.algorithm_name](parts, optimizer, autocast), setup.dataset.train

    def round(self, *, platform_first: bool) -> tuple[Seconds, Seconds, float]:
        """Time of the platform, time of the bare loop, and how far their weights are apart (see `_difference`)."""
        start = {name: _copied(state) for name, state in self._weights().items()}
        cohort = self._cohort()

        def bare() -> dict[str, State]:
            return self._bare.round(start, cohort)

        device = self._platform.setup.device
        if platform_first:
            ours = self._timed_step(device)
            theirs, reached = timed(device, bare)
        else:
            theirs, reached = timed(device, bare)
            ours = self._timed_step(device)
        return ours, theirs, _difference(self._weights(), reached, start)

    def _timed_step(self, device: torch.device) -> Seconds:
        """A round's time, its workers' included."""
        clients = self._platform.clients
        workers = clients.pool.living() if isinstance(clients, WorkerClients) else []
        before = {worker: processor_seconds(worker) for worker in workers}
        seconds, _ = timed(device, self._step)
        return seconds._replace(
            processor=seconds.processor + sum(processor_seconds(worker) - spent for worker, spent in before.items())
        )

    def _step(self) -> None:
        record, traffic = self._platform.step()
        if self._results is not None:
            self._results.record(record, traffic)
            if self._platform.round % self._platform.setup.config.checkpoint_interval == 0:
                self._platform.checkpoint(self._results.state())

    def _weights(self) -> dict[str, State]:
        return {name: self._platform.server.ctx.part(name).state_dict() for name in self._names}

    def _cohort(self) -> list[Batches]:
        """The batches that the platform is about to use, in its order of clients, ready on the device."""
        platform, config = self._platform, self._platform.setup.config
        return [
            list(
                self._images.batches(
                    platform.setup.partition.indices(client),
                    batch_size=config.batch_size,
                    epochs=config.local_epochs,
                    shuffle=config.dataset.shuffle,
                    augment=True,
                    drop_last=config.dataset.drop_last,
                    generator=rng.torch_generator(config.seed, round=platform.round, client=client, stream="batches"),
                )
            )
            for client in platform.cohort(platform.round)
        ]


def _copied(state: State) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


def _difference(ours: dict[str, State], theirs: dict[str, State], start: dict[str, State]) -> float:
    """Norm of the difference over the norm of the round's change, over all floating-point tensors."""

    def flat(states: dict[str, State]) -> Tensor:
        values = [states[part][name] for part in sorted(ours) for name in sorted(ours[part])]
        return torch.cat([value.detach().double().flatten() for value in values if value.is_floating_point()])

    return float((flat(ours) - flat(theirs)).norm() / (flat(ours) - flat(start)).norm())


def compare(case: Case, algorithm: str, options: argparse.Namespace) -> tuple[str, bool]:
    """Measure one case; returns the text to print, and whether both ended every round with the same weights."""
    with ExitStack() as stack:
        folder = results = None
        if options.record:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            results = Results(folder, [])
            stack.callback(results.close)
        platform = federation(case, algorithm, options, folder)
        if isinstance(platform.clients, WorkerClients):
            stack.callback(platform.clients.close)
        if results is not None:
            platform.resume()
            results.start(platform.setup.config.to_mapping())
        race = Race(platform, results)
        race.round(platform_first=True)  # lets caches, pools and the allocator settle
        rounds = [race.round(platform_first=index % 2 == 0) for index in range(options.repeats)]
    ratio = Spread.of([ours.wall / theirs.wall for ours, theirs, _ in rounds])
    processor = Spread.of([ours.processor / theirs.processor for ours, theirs, _ in rounds])
    overhead = Spread.of([(ours.processor - theirs.processor) / case.clients for ours, theirs, _ in rounds])
    platform_time = Spread.of([ours.wall for ours, _, _ in rounds]).show(1e3, 1, " ms")
    bare_time = Spread.of([theirs.wall for _, theirs, _ in rounds]).show(1e3, 1, " ms")
    worst = max(difference for _, _, difference in rounds)
    same = worst < _tolerance(options)
    lines = (
        f"{algorithm}: platform {platform_time}, bare {bare_time}",
        f"  ratio {ratio.show(digits=3)}, target {_verdict(ratio.median, case.targets.get(algorithm))}",
        f"  ratio of processor time {processor.show(digits=3)}, {overhead.show(1e3, 2, ' ms')} more for each client",
        f"  weights {'agree' if same else 'DIFFER'}, apart by {worst:.0e} of a round's change",
    )
    return "\n  ".join(lines), same


def _tolerance(options: argparse.Namespace) -> float:
    """The mean is summed in another order; on a GPU, and in bf16, the training itself is not repeatable to the bit."""
    if options.precision == "bf16" or options.device != "cpu":
        return 0.1
    return 1e-2 if options.precision == "fp32" else 1e-9


def _verdict(ratio: float, target: float | None) -> str:
    if target is None:
        return "none"
    return f"{target:.2f} {'met' if ratio <= target else 'MISSED'}"


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> int:
    """Measure the cases that the options name; exit status 1 if the weights of any case differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.round_time", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=["resnet18", "cnn2"], help="default: both")
    parser.add_argument("--algorithm", nargs="+", choices=BARE, default=list(BARE), help="default: both")
    parser.add_argument("--repeats", type=int, default=11, help="measured rounds of each side (default: 11)")
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "adam", "adamw"), help="default: sgd")
    parser.add_argument("--lr", type=float, default=0.01, help="default: 0.01")
    parser.add_argument("--workers", type=int, default=0, help="of the platform (default: none, its own process)")
    parser.add_argument("--record", action="store_true", help="count writing metrics and checkpoints to disk too")
    machine_options(parser)
    options = parser.parse_args(arguments)
    show(f"{set_up(options)}; {options.repeats} repeats, median (min .. max)")
    agreed = True
    for name in options.case:
        case = CASES[name]
        shape = "x".join(str(side) for side in case.image)
        show(f"{name}: {case.clients} clients of {case.images} images {shape}, batch {case.batch}, {options.optimizer}")
        for algorithm in options.algorithm:
            line, same = compare(case, algorithm, options)
            show(f"  {line}")
            agreed &= same
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
